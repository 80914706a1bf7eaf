"""`Factors`: the low-rank factors of one tensor, and DoRA's magnitudes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.initialisation import METHODS, initialised
from lora_lightning.lora.precision import factor_dtype, floating, kept_wide
from lora_lightning.lora.sharding import assign, whole
from lora_lightning.lora.spec import FactorSpec

Values = Mapping[str, Tensor]
# Initial factors are kept where the product began away from zero; the core is LoRA-XS's.
TENSORS = ("lora_A", "lora_B", "start_A", "start_B", "core", "magnitude")


class Factors(nn.Module):
    r"""The factors of one adapter on one tensor.

    .. math:: \Delta W = s\,B A, \qquad W' = W + \Delta W

    and with DoRA (arXiv:2402.09353) :math:`W' = m \odot (W + \Delta W) / \lVert W + \Delta W
    \rVert_{row}`, the norm taken as a constant in the backward pass as the paper advises.

    Factors initialised away from zero (see `lora_lightning.lora.initialisation`) keep B₀ and A₀:
    :math:`\Delta W = s\,(B A - B_0 A_0)`, so that W is not changed.

    Shapes: ``lora_A``, ``start_A`` (r, in·kernel), ``lora_B``, ``start_B`` (out, r),
    ``magnitude`` (out,).

    Without `values`, by name, they are initialised by the spec's `init`.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        weight: Tensor,
        matrix: tuple[int, int],
        spec: FactorSpec,
        values: Values | None = None,
    ):
        super().__init__()
        self.spec: FactorSpec
        self.matrix: tuple[int, int]
        self.start_A: Tensor | None
        self.start_B: Tensor | None
        self.magnitude: nn.Parameter | None
        # Into the tables, since assignment by attribute checks names slowly.
        self.__dict__.update(spec=spec, matrix=matrix)
        self._buffers.update(start_A=None, start_B=None)
        if values is not None:
            self._adopt(weight, values)
            return
        self._allocate(weight)
        self._parameters["magnitude"] = None
        if spec.dora:
            self.magnitude = nn.Parameter(self.row_norm(weight.detach()))
        self.reset(weight)

    def _allocate(self, weight: Tensor) -> None:
        (rows, columns), spec = self.matrix, self.spec
        empty = partial(torch.empty, dtype=factor_dtype(weight), device=weight.device)
        lora_A = nn.Parameter(empty(spec.rank, columns), not spec.freeze_a)
        lora_B = nn.Parameter(empty(rows, spec.rank))
        self._parameters.update(lora_A=lora_A, lora_B=lora_B)
        if spec.offset:
            self.start_A = torch.zeros_like(self.lora_A, requires_grad=False)
            self.start_B = torch.zeros_like(self.lora_B, requires_grad=False)

    def _adopt(self, weight: Tensor, values: Values) -> None:
        """Hold copies of these; DoRA's magnitude last, as when allocated."""
        device, dtype, parameters = weight.device, factor_dtype(weight), self._parameters
        for name in (name for name in TENSORS if name in values):
            own = values[name].to(device, dtype, copy=True)
            if name.startswith("start"):
                self._buffers[name] = own
            else:
                parameters[name] = nn.Parameter(own, self.spec.trains(name))
        parameters.setdefault("magnitude", None)

    def take(
        self, weight: Tensor, matrix: tuple[int, int], spec: FactorSpec, values: Values
    ) -> bool:
        """Copy these values in place, under ``no_grad``; gradients are dropped.

        Nothing changes for other sizes, precision, device, or a tensor that is not plain.
        """
        own, device, dtype = self.tensors(), weight.device, factor_dtype(weight)
        if self.matrix != matrix or own.keys() != values.keys():
            return False
        for name, tensor in own.items():
            alike = tensor.shape == values[name].shape and tensor.dtype is dtype
            plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference()
            if not (alike and plain and tensor.device == device):
                return False
        self.__dict__["spec"] = spec
        for name, tensor in own.items():
            tensor.copy_(values[name])
            if name in self._parameters:
                tensor.grad = None
                tensor.requires_grad_(self.spec.trains(name))
        return True

    def matrices(self) -> tuple[nn.Parameter, ...]:
        """The parameters whose product is ΔW, whether they train or not."""
        return self.lora_A, self.lora_B

    def pair(self) -> tuple[Tensor, Tensor]:
        """(A, B), by the table: an attribute takes longer."""
        parameters: Any = self._parameters
        return parameters["lora_A"], parameters["lora_B"]

    def linear_in(self) -> tuple[Tensor, ...]:
        """Tensors in which ΔW is linear: of the two products BA and B₀A₀ both B."""
        return (self.lora_B,) if self.start_B is None else (self.lora_B, self.start_B)

    @torch.no_grad()
    def reset(self, weight: Tensor | None = None, data: Any = None) -> None:
        """Initialise the factors from the raw weight, and statistics for a data-driven method."""
        own = self.lora_A.detach()
        if own.is_meta:
            return
        lora_A, lora_B = initialised(self.spec, self.matrix, own, weight, data)
        if lora_A is not own:
            assign(own, lora_A)
        if lora_B is None:
            self.lora_B.zero_()
        else:
            assign(self.lora_B, lora_B)
        if self.start_A is not None and self.start_B is not None:
            self.start_A.copy_(whole(self.lora_A))
            self.start_B.copy_(whole(self.lora_B))

    @torch.no_grad()
    def resize(self, rank: int, scaling: float) -> None:
        """Resize to another rank; the parameters, which an optimizer may hold, stay the objects."""
        self._rows_of(lambda rows: rows.new_zeros(rank, rows.shape[1]))
        self.spec = dataclasses.replace(self.spec, scaling=scaling)

    @torch.no_grad()
    def keep(self, directions: Tensor) -> None:
        """Drop all directions but these, in this order; parameters stay the objects they were."""
        self._rows_of(lambda rows: rows[directions.to(rows.device)].clone())

    def _rows_of(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change A (r, in) and Bᵀ (r, out), and their initial values, in the same way."""
        for tensor in (self.lora_A, self.start_A):
            if tensor is not None:
                tensor.data, tensor.grad = change(tensor.data), None
        for tensor in (self.lora_B, self.start_B):
            if tensor is not None:
                tensor.data, tensor.grad = change(tensor.data.T).T.contiguous(), None
        self.spec = dataclasses.replace(self.spec, rank=len(self.lora_A))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of these factors in a file or a state dict, by name."""
        own = {**self._parameters, **self._buffers}
        return {key: tensor for key, tensor in own.items() if tensor is not None}

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(B, A) with ΔW = s·BA, of rank 2r where initial factors are kept; whole ones."""
        lora_B, lora_A = whole(self.lora_B), whole(self.lora_A)
        if self.start_A is None or self.start_B is None:
            return lora_B, lora_A
        return torch.cat([lora_B, -self.start_B], dim=1), torch.cat([lora_A, self.start_A])

    @torch.no_grad()
    def rebase(self, weight: Tensor) -> None:
        """Recompute values that depend on the base weight, unless training has begun."""
        lora_B = whole(self.lora_B)
        if bool((lora_B if self.start_B is None else lora_B - self.start_B).any()):
            return
        if METHODS[self.spec.init].moves and METHODS[self.spec.init].needs == "nothing":
            self.reset(whole(weight))
        if self.magnitude is not None:
            assign(self.magnitude, self.row_norm(whole(weight)))

    def follow(self, weight: Tensor) -> None:
        """Recompute values that always depend on the base weight: none here."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # A module injected on the meta device has no values until it is materialised.
        was_meta = self.matrices()[0].is_meta
        out = super()._apply(kept_wide(fn), recurse)  # type: ignore[no-untyped-call]
        if was_meta:
            self.reset()
        return out

    def delta(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """ΔW = s·BA in the weight's own shape, in the factors' precision whatever autocast's."""
        return self._product().view(shape)

    def _product(self, mask: Tensor | None = None) -> Tensor:
        device = self.lora_A.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._product(mask)
        lora_A = whole(self.lora_A) if mask is None else whole(self.lora_A) * mask
        product: Tensor = whole(self.lora_B) @ lora_A
        if self.start_A is not None and self.start_B is not None:
            # The same mask for both, so that they are equal at the start.
            kept = self.start_A if mask is None else self.start_A * mask
            product = product - self.start_B @ kept
        scaled: Tensor = self.spec.scaling * product
        return scaled

    def effective(self, weight: Tensor, dropout: bool = True) -> Tensor:
        """W' from W, rounded once to its dtype; dropout drops whole columns of A for this read."""
        mask: Tensor | None = None
        if dropout and self.training and self.spec.dropout > 0:
            keep = torch.ones_like(whole(self.lora_A)[:1])
            mask = nn.functional.dropout(keep, self.spec.dropout)
        out: Tensor = floating(whole(weight)) + self._product(mask).view(weight.shape)
        if self.magnitude is not None:
            scaled: Tensor = out.reshape(self.matrix) * self.row_scale(out)[:, None]
            out = scaled.view(weight.shape)
        return out.to(weight.dtype)

    def row_scale(self, summed: Tensor) -> Tensor:
        """DoRA's factor m / ‖W + ΔW‖ for each row of `summed`, shape (out,)."""
        assert self.magnitude is not None
        return whole(self.magnitude).div(self.row_norm(summed.detach()))

    def row_norm(self, weight: Tensor) -> Tensor:
        """The norm of each row of `weight`, shape (out,): DoRA's magnitudes at the start."""
        rows, dtype = weight.reshape(self.matrix), factor_dtype(weight)
        norm: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
        return norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def require_grad(self, on: bool = True) -> None:
        """Let what trains require a gradient (or nothing, if not `on`), and the rest none."""
        for key, parameter in self._parameters.items():
            if parameter is not None:
                parameter.requires_grad_(on and self.spec.trains(key))

    def extra_repr(self) -> str:
        """Rank, alpha and options, for ``print(model)``."""
        s = self.spec
        flags = "".join(f", {f}" for f in ("xs", "dora", "freeze_a") if getattr(s, f))
        return f"{self.matrix[0]}×{self.matrix[1]}, rank={s.rank}, scaling={s.scaling:.4g}{flags}"
