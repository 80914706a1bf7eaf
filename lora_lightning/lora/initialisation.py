"""Initialisations of the factors: one function a method, registered in `METHODS`.

A method sees the layer's weight as a matrix W (out, in·kernel) and gives A and B. Where its
product s·BA is not zero, the layer keeps that product, frozen, and adapts by

    ΔW = s (B A − B₀ A₀),

which is zero at the start: the function is the source's, its weights are unchanged, and removing
the adapter needs no arithmetic. (The papers subtract s·B₀A₀ from the weight instead, which is
the same sum, but changes the base.) Data-driven methods are given statistics of the inputs, see
`lora_lightning.model.data_driven.initialise`.

Shapes: A (r, in), B (out, r), inputs' directions (r, in), gradient (out, in), covariance (in, in).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_lightning.errors import DecompositionError
from lora_lightning.linalg.decompose import SVD, pivoted_qr, truncated_svd
from lora_lightning.lora.sharding import is_sharded
from lora_lightning.lora.spec import FactorSpec
from lora_lightning.registry import Registry

GAMMA = 16.0  # LoRA-GA's: the larger, the smaller the initial factors
RANDOMISED_FROM = 512  # smaller side of a weight from which its SVD is randomised


@dataclass(frozen=True)
class Setting:
    """The inputs of a method."""

    matrix: Tensor  # W (out, in·kernel)
    rank: int  # r
    scaling: float  # s
    generator: torch.Generator  # for random numbers; on the CPU, so that every device starts alike
    data: Any = None  # statistics of target batches for the method; None for the others
    room: Tensor | None = None  # memory for A (r, in); None: newly allocated


Start = tuple[Tensor, Tensor | None]  # A, and B where it is not zero


@dataclass(frozen=True)
class Method:
    """How an initialisation is used."""

    start: Callable[[Setting], Start]  # from a `Setting` to A and B
    # Data of the target: "nothing", "inputs", "rows" (a sample of the inputs), "covariance" or
    # "gradient"
    needs: str
    moves: bool  # whether B starts away from zero, so that the initial factors are kept


METHODS: Registry[Method] = Registry("initialisation")
F = TypeVar("F", bound=Callable[[Setting], Start])


def initialisation(name: str, *, needs: str = "nothing", moves: bool = False) -> Callable[[F], F]:
    """Decorator that makes a function the initialisation ``init=name``; for the rest see `Method`.

    Raises:
        ConfigError: the name is taken.
    """

    def add(start: F) -> F:
        METHODS.register(name)(Method(start, needs, moves))
        return start

    return add


@initialisation("zero")
def uniform(s: Setting) -> Start:
    r"""B = 0 and A uniform in :math:`\pm 1/\sqrt{in}`.

    The bound is that of `torch.nn.Linear` (Kaiming uniform with a = sqrt 5), as in Hu et al.
    2021, arXiv:2106.09685.
    """
    columns = s.matrix.shape[1]
    bound = 1 / math.sqrt(columns)
    drawn = s.room
    if drawn is None:
        drawn = torch.empty(s.rank, columns, dtype=torch.float32, device="cpu")
    return drawn.uniform_(-bound, bound, generator=s.generator), None


@initialisation("orthogonal")
def orthogonal(s: Setting) -> Start:
    r"""B = 0 and A with orthonormal rows, :math:`A A^T = I / 3`.

    Rows as long as those of `uniform` on average, without redundant directions.
    Saxe et al. 2014, arXiv:1312.6120.
    """
    drawn = torch.randn(s.matrix.shape[1], s.rank, generator=s.generator, device="cpu")
    q: Tensor = torch.linalg.qr(drawn).Q.T
    return q / math.sqrt(3), None


@initialisation("pissa", moves=True)
def pissa(s: Setting) -> Start:
    r"""The principal singular values and vectors: :math:`s\,BA = U_r S_r V_r^T`.

    :math:`A = \sqrt{S_r/s}\,V_r^T, B = U_r\sqrt{S_r/s}`. Meng et al. 2024, "PiSSA",
    arXiv:2404.02948.
    """
    randomised = min(s.matrix.shape) >= RANDOMISED_FROM
    lora_B, lora_A = truncated_svd(s.matrix, s.rank, randomised=randomised).halves(s.scaling)
    return lora_A, lora_B


@initialisation("milora", moves=True)
def milora(s: Setting) -> Start:
    r"""The smallest singular values and vectors, so that the principal ones are preserved.

    As `pissa`, with the last r of all. Wang et al. 2024, "MiLoRA", arXiv:2406.09044.
    """
    u, values, vh = truncated_svd(s.matrix)
    last = SVD(u[:, -s.rank :], values[-s.rank :], vh[-s.rank :])
    lora_B, lora_A = last.halves(s.scaling)
    return lora_A, lora_B


@initialisation("olora", moves=True)
def olora(s: Setting) -> Start:
    r"""An orthonormal B: :math:`s\,BA = Q_r R_r` of the weight's pivoted QR.

    Büyükakyüz 2024, "OLoRA", arXiv:2406.01775, who does not pivot: his R_r holds the first
    rows' worth of the weight, this one what its largest columns span.
    """
    q, r = pivoted_qr(s.matrix, s.rank)
    return r / s.scaling, q


@initialisation("eva", needs="inputs")
def eva(s: Setting) -> Start:
    """B = 0 and A the right singular vectors of the layer's inputs on the target.

    `data`: (r, in), orthonormal. Paischer et al. 2024, "Explained variance adaptation",
    arXiv:2410.07170.
    """
    return _directions(s, s.data), None


@initialisation("activation-nmf", needs="rows")
def activation_nmf(s: Setting) -> Start:
    """B = 0 and A the unit-length parts of a non-negative factorisation of the layer's inputs.

    By NMF where no input is negative (after a ReLU, from a power spectrogram), else by semi-NMF,
    whose parts are signed. `data`: (N, in), a sample of the inputs. After Lee & Seung 1999,
    "Learning the parts of objects by non-negative matrix factorization", Nature 401.
    """
    from lora_lightning.linalg.nonnegative import nmf, semi_nmf

    rows: Tensor = s.data
    seed = int(torch.randint(2**31, (), generator=s.generator, device="cpu"))
    rank = min(s.rank, *rows.shape)
    found = (semi_nmf if bool((rows < 0).any()) else nmf)(rows, rank, seed=seed)
    length = torch.linalg.vector_norm(found.H, dim=1, keepdim=True)
    return _directions(s, found.H / length.clamp_min(torch.finfo(length.dtype).tiny)), None


@initialisation("lora-ga", needs="gradient", moves=True)
def lora_ga(s: Setting) -> Start:
    r"""Gradient approximation: the first step is that of full fine-tuning, as far as rank r allows.

    With the gradient :math:`G = U S V^T` of the loss on target batches: A the first r rows of
    :math:`V^T`, B the columns r to 2r of U (or what there is), both scaled by
    :math:`\sqrt[4]{out / \gamma^2}` with γ = 16. Wang, Yu & Li 2024, "LoRA-GA",
    arXiv:2407.05000. `data`: (out, in).
    """
    u, _, vh = truncated_svd(s.data)
    # With fewer than 2r directions A and B share some of them.
    of_b = torch.arange(s.rank, 2 * s.rank, device="cpu") % u.shape[1]
    size = len(s.matrix) ** 0.25 / math.sqrt(GAMMA)
    return size * vh[: s.rank], size * u[:, of_b]


@initialisation("corda", needs="covariance", moves=True)
def corda(s: Setting) -> Start:
    r"""Covariance-weighted SVD: :math:`W C = U S V^T, s\,BA = U_r S_r V_r^T C^{-1}`.

    C the uncentred covariance of the inputs. Yang et al. 2024, "CorDA", arXiv:2406.05223, in its
    instruction-previewed mode. `data`: (in, in). C is made invertible as there: a part of its
    mean diagonal is added to it.
    """
    c = s.data.double()
    mean = c.diagonal().mean()
    if not mean > 0:
        raise DecompositionError("the layer's inputs are all zero on these batches")
    c = c + 0.01 * mean * torch.eye(len(c), dtype=c.dtype, device=c.device)
    lora_B, weighed = truncated_svd(s.matrix.double() @ c, s.rank).halves(s.scaling)
    return torch.linalg.solve(c, weighed.T).T, lora_B  # C is symmetric


def _directions(s: Setting, found: Tensor) -> Tensor:
    """(r, in): directions of the data, completed by random orthogonal ones."""
    missing = s.rank - len(found)
    if missing <= 0:
        return found[: s.rank]
    drawn = torch.randn(missing, found.shape[1], generator=s.generator, device="cpu").to(found)
    basis = torch.linalg.qr(found.T).Q
    rest = torch.linalg.qr((drawn - (drawn @ basis) @ basis.T).T).Q.T
    return torch.cat([found, rest])


def initialised(
    spec: FactorSpec, shape: tuple[int, int], own: Tensor, weight: Tensor | None, data: Any
) -> Start:
    """The initial factors by the spec's method: the same seed gives the same values.

    Args:
        spec: Of the factors.
        shape: Of the weight as a matrix.
        own: A as it is; the new one is written into it and returned, where that is possible.
        weight: The raw weight, which some methods use.
        data: Statistics for a data-driven method; without them it starts as "zero" does.
    """
    method = METHODS[spec.init]
    if (method.needs != "nothing" and data is None) or (method.moves and weight is None):
        method = METHODS["zero"]
    matrix = torch.empty(shape, device="meta") if weight is None else weight.detach()
    matrix = matrix if matrix.shape == shape else matrix.reshape(shape)
    # Drawn in float32 on the CPU wherever the factors are, so that a seed gives one result.
    fits = own.dtype is torch.float32 and own.device.type == "cpu" and own.is_contiguous()
    room = own if fits and not is_sharded(own) else None
    setting = Setting(matrix, spec.rank, spec.scaling, spec.generator(), data, room)
    return method.start(setting)
