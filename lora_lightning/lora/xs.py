"""LoRA-XS: a small trained core between frozen singular vectors of the layer's own weight.

The frozen factors are computed from the base's weight when needed, so that neither a file nor
a checkpoint holds them: about r² numbers a layer. Adapters of one rank on one tensor share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import TargetError
from lora_lightning.linalg.decompose import checked, signs
from lora_lightning.lora import parametrizations
from lora_lightning.lora.factors import Factors
from lora_lightning.lora.precision import factor_dtype, floating, kept_wide
from lora_lightning.lora.sharding import whole
from lora_lightning.lora.spec import matrix_shape

FLOOR = 1e-6  # of the largest singular value: below it, directions are rounding noise
AGREEMENT = 3e-2  # tolerance of `Basis.probe`, for bfloat16; other bases differ far more


class Basis(nn.Module):
    r"""The frozen halves of a weight's truncated SVD.

    .. math:: W \approx U_r S_r V_r^T, \qquad B = U_r S_r, \quad A = V_r^T

    In float64 on the CPU whatever the weight's device and precision, so that machines agree also
    where singular values lie close together (not where they are equal); signs as in
    `decompose.truncated_svd`. A direction whose singular value is zero is left out
    (zeros in A and B). Neither buffer is part of a state dict.

    Shapes: weight (out, in·kernel), ``lora_A`` (r, in·kernel), ``lora_B`` (out, r).
    """

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, columns = weight.shape
        like: Any = {"device": weight.device, "dtype": factor_dtype(weight)}
        self.register_buffer("lora_A", torch.zeros(rank, columns, **like), persistent=False)
        self.register_buffer("lora_B", torch.zeros(rows, rank, **like), persistent=False)

    @torch.no_grad()
    def renew(self, weight: Tensor) -> Basis:
        """Compute both from this weight, unless they are its own already.

        Raises:
            DecompositionError: it holds NaN or infinity.
        """
        if not weight.is_meta and not self.fits(weight):
            lora_B, lora_A = leading_halves(weight, len(self.lora_A))
            like: Any = {"device": weight.device, "dtype": factor_dtype(weight)}
            self.lora_A, self.lora_B = lora_A.to(**like), lora_B.to(**like)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        return super()._apply(kept_wide(fn), recurse)  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """Set both to zero, where there is no weight yet to compute them from."""
        self.lora_A.zero_()
        self.lora_B.zero_()

    def fits(self, weight: Tensor) -> bool:
        """Whether they are this weight's: W Aᵀ = B, up to rounding, and not zero."""
        if self.lora_A.is_meta or not bool(self.lora_B.any()):
            return False
        rest = weight.double() @ self.lora_A.double().T - self.lora_B.double()
        allowed = 2 * torch.finfo(weight.dtype).eps * self.lora_B.double().norm()
        return bool(rest.norm() <= allowed)

    def probe(self) -> float:
        r"""A number that identifies this basis: :math:`x^T B K A y / (\|B\| \sqrt r)`.

        For fixed vectors x, y and a fixed core K; of the order of 1, 0 without a basis. Rotated or
        reflected singular vectors give another number.
        """
        lora_B, lora_A = self.lora_B.double().cpu(), self.lora_A.double().cpu()
        size, rank = float(lora_B.norm()), len(lora_A)
        if not size > 0:
            return 0.0
        x, y = _chirp(len(lora_B), 0.5), _chirp(lora_A.shape[1], 0.25)
        core = _chirp(rank * rank, 0.0).view(rank, rank)
        return round(float(x @ lora_B @ core @ (lora_A @ y)) / (size * math.sqrt(rank)), 6)

    def is_as(self, probe: Any) -> bool:
        """Whether `probe` is this basis's; true on the meta device, where it is unknown."""
        if self.lora_A.is_meta:
            return True
        return isinstance(probe, (int, float)) and abs(self.probe() - probe) <= AGREEMENT


def leading_halves(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""(:math:`U_r S_r`, :math:`V_r^T`) of a matrix (rows, columns), in float64 on the CPU.

    From the r largest eigenvalues of the smaller Gram matrix (LAPACK's ``syevr``, by SciPy):
    several times as fast as the whole SVD, and in float64 exact enough for a float32 weight.

    Raises:
        DecompositionError: see `lora_lightning.linalg.decompose.checked`.
    """
    from scipy.linalg import eigh

    wide = checked(matrix.detach(), rank).double().cpu()
    tall = wide.shape[0] >= wide.shape[1]
    gram = wide.T @ wide if tall else wide @ wide.T
    last = len(gram) - 1
    values, vectors = eigh(gram.numpy(), subset_by_index=[last + 1 - rank, last])
    found = torch.from_numpy(vectors).flip(1)
    size = torch.from_numpy(values).flip(0).clamp_min(0).sqrt()
    kept = size > FLOOR * size[0]
    if tall:
        lora_B, lora_A = wide @ found, found.T
    else:
        lora_B, lora_A = found * size, (found.T @ wide) / size.clamp_min(1e-300)[:, None]
    sign = signs(lora_B) * kept
    # `where`, since infinity times zero would be NaN.
    return lora_B * sign, torch.where(kept[:, None], lora_A * sign[:, None], 0.0)


def _chirp(count: int, shift: float) -> Tensor:
    """Numbers of variance 1 without pattern, the same on every machine and in every version."""
    steps = torch.arange(count, dtype=torch.float64, device="cpu") + shift
    return math.sqrt(2) * torch.cos(steps.square())


class XSFactors(Factors):
    r"""A core between frozen singular vectors of the weight.

    .. math:: \Delta W = s\,U_r S_r\,R\,V_r^T

    R (r, r) alone trains, and starts at zero: the function stays, and the first gradient of R,
    :math:`s\,S_r U_r^T G V_r`, is not zero. Bałazy et al. 2024, "LoRA-XS", arXiv:2405.17604, who
    draw R with a deviation of 1e-5.

    In products ``lora_B`` is :math:`U_r S_r R` and ``lora_A`` is :math:`V_r^T`; neither
    is a parameter.
    """

    basis: Basis

    def _allocate(self, weight: Tensor) -> None:
        seen = weight.detach().reshape(self.matrix)
        rank, dtype = self.spec.rank, factor_dtype(weight)
        self.core = nn.Parameter(seen.new_zeros(rank, rank, dtype=dtype))
        self.basis = Basis(seen, self.spec.rank)

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        """(r, in·kernel), frozen."""
        return self.basis.lora_A

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]
        """(out, r), through which the gradient reaches the core; as precise as A under autocast."""
        device = self.core.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.basis.lora_B @ whole(self.core)
        return self.basis.lora_B @ whole(self.core)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(A, B), computed."""
        return self.lora_A, self.lora_B

    def matrices(self) -> tuple[nn.Parameter, ...]:
        """The core alone."""
        return (self.core,)

    def linear_in(self) -> tuple[Tensor, ...]:
        """The core."""
        return (self.core,)

    @torch.no_grad()
    def reset(self, weight: Tensor | None = None, data: Any = None) -> None:
        """Set the core to zero; without a weight there is no basis either, until `follow`."""
        if self.core.is_meta:
            return
        self.core.zero_()
        if weight is None:
            self.basis.clear()

    def follow(self, weight: Tensor) -> None:
        """Compute the frozen factors from another base weight."""
        self.basis.renew(floating(whole(weight.detach())).reshape(self.matrix))


def check_weights(weights: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    """Check that the weights have singular vectors, and keep them.

    Raises:
        TargetError: a weight is zero throughout, or not finite, or is among those `trained` in full
            under another name, as an output layer that is tied to an adapted embedding.
    """
    names = {id(tensor): name for name, tensor in trained.items()}
    for path, weight in weights.items():
        if id(weight) in names:
            raise TargetError(
                f"xs=True takes its frozen factors from {path}, which is tied to "
                f"{names[id(weight)]} and trained in full under that name, so that no state dict "
                "would hold the weight to compute them from again: leave one of the two out, by "
                "exclude_modules or trainable"
            )
    known = {path: floating(w.detach()) for path, w in weights.items() if not w.is_meta}
    bad = [path for path, w in known.items() if not bool(w.isfinite().all() and w.any())]
    if bad:
        raise TargetError(
            f"xs=True takes its frozen factors from the weight; zero throughout, or with NaN or "
            f"infinity in it: {', '.join(bad[:5])}{' …' if len(bad) > 5 else ''}. Load the "
            "source's weights before injecting, or list these in exclude_modules"
        )


def basis_of(module: nn.Module, tensor: str, weight: Tensor, rank: int, bare: bool) -> Basis:
    """The basis of this weight of a layer: another adapter's where it fits, else a new one.

    Raises:
        DecompositionError: the weight holds NaN or infinity.
    """
    parametrizations.recompute(module, tensor)
    seen = floating(weight.detach()).reshape(matrix_shape(tuple(weight.shape), bare))
    adapters: Any = module._modules.get("lora") or {}
    for per_tensor in adapters.values():
        other = per_tensor._modules.get(tensor)
        if isinstance(other, XSFactors) and other.spec.rank == rank:
            if not seen.is_meta and other.basis.fits(seen):
                return other.basis
            break  # all adapters of that rank share it
    return Basis(seen, rank).renew(seen)
