r"""The one idea of this package: an adapted module is still itself.

`adapt` puts low-rank factors on a live module and swaps the module's *class* for a subclass
of its own class, in which each adapted tensor is a property that yields the effective weight

.. math:: W' = W + s\,B A .

The raw weight stays in ``_parameters``, so names, shapes, ties, hooks, optimizers and
``isinstance`` see what they saw before; whoever *reads* ``module.weight``, be it
``F.linear(x, self.qkv.weight)`` in a model's own forward, gets the adapted weight. Where the
product can be kept in factors, `lora_lightning.layers` adds a cheaper ``forward``.

`release` swaps the class back; `merge_layer` puts W' in the raw weight's place, as a new
parameter, and keeps the raw one aside, so that `unmerge_layer` restores it bit for bit.

Reading order: `Factors`, `adapted_class`, `adapt`, `merge_layer`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning import parametrized
from lora_lightning.errors import AdapterError
from lora_lightning.guard import EffectiveWeight
from lora_lightning.initialize import INITIALIZERS

MERGED = "_lora_merged"


@dataclass(frozen=True)
class FactorSpec:
    """What decides one pair of factors: sizes, scaling and options."""

    rank: int
    alpha: float
    scaling: float
    dropout: float = 0.0
    dora: bool = False
    freeze_a: bool = False
    init: str = "zero"
    seed: int = 0
    key: str = ""  # the tensor's full name: each tensor draws other numbers from one seed


def matrix_shape(shape: tuple[int, ...], bare: bool = False) -> tuple[int, int]:
    """The (rows, columns) in which a weight of this shape is seen: out × in·kernel.

    A bare parameter such as ``pos_embed`` (1, N, D) is seen without its leading ones.
    """
    while bare and len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape[0], math.prod(shape[1:])


class Factors(nn.Module):
    r"""The factors of one adapter on one tensor.

    .. math:: \Delta W = s\,B A, \qquad W' = W + \Delta W

    and with DoRA (arXiv:2402.09353) :math:`W' = m \odot (W + \Delta W) / \lVert W + \Delta W
    \rVert_{row}`, the norm taken as a constant in the backward pass as the paper advises.

    Shapes: ``lora_A`` (r, in·kernel), ``lora_B`` (out, r), ``magnitude`` (out,).
    """

    def __init__(self, weight: Tensor, matrix: tuple[int, int], spec: FactorSpec):
        super().__init__()
        rows, columns = matrix
        self.spec = spec
        self.matrix = matrix
        self.lora_A = nn.Parameter(_empty_like(weight, spec.rank, columns), not spec.freeze_a)
        self.lora_B = nn.Parameter(_empty_like(weight, rows, spec.rank))
        self.magnitude: nn.Parameter | None
        self.register_parameter("magnitude", None)
        if spec.dora:
            self.magnitude = nn.Parameter(self._row_norm(weight.detach()))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw the starting factors again: the same seed gives the same numbers."""
        if self.lora_A.is_meta:
            return
        name_hash = zlib.crc32(self.spec.key.encode())
        generator = torch.Generator().manual_seed((self.spec.seed * 0x9E3779B1 + name_hash) % 2**63)
        INITIALIZERS[self.spec.init](self.lora_A, self.lora_B, generator)

    @torch.no_grad()
    def renorm(self, weight: Tensor) -> None:
        """Take DoRA's magnitudes from a new base weight, unless training has begun (B ≠ 0)."""
        if self.magnitude is not None and not self.lora_B.any():
            self.magnitude.copy_(self._row_norm(weight))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # A module injected on the meta device has no numbers until it is materialised.
        was_meta = self.lora_A.is_meta
        out = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta:
            self.reset()
        return out

    def delta(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """ΔW = s·BA in the weight's own shape, never in autocast's lower precision."""
        return self._product(self.lora_A).view(shape)

    def _product(self, lora_A: Tensor) -> Tensor:
        device = lora_A.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._product(lora_A)
        product: Tensor = self.spec.scaling * (self.lora_B @ lora_A)
        return product

    def effective(self, weight: Tensor, dropout: bool = True) -> Tensor:
        """W' from W. In training with dropout, whole columns of A are dropped for this read."""
        lora_A: Tensor = self.lora_A
        if dropout and self.training and self.spec.dropout > 0:
            keep = torch.ones_like(lora_A[:1])
            lora_A = lora_A * nn.functional.dropout(keep, self.spec.dropout)
        out: Tensor = weight + self._product(lora_A).view(weight.shape)
        if self.magnitude is None:
            return out
        return (out.reshape(self.matrix) * self.row_scale(out)[:, None]).view(weight.shape)

    def row_scale(self, summed: Tensor) -> Tensor:
        """DoRA's factor m / ‖W + ΔW‖ for each row of `summed`, shape (out,)."""
        assert self.magnitude is not None
        ratio: Tensor = self.magnitude / self._row_norm(summed.detach())
        return ratio

    def _row_norm(self, weight: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(weight.reshape(self.matrix), dim=1)
        return norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def extra_repr(self) -> str:
        """Rank, alpha and options, for ``print(model)``."""
        s = self.spec
        flags = "".join(f", {f}" for f, on in (("dora", s.dora), ("freeze_a", s.freeze_a)) if on)
        return f"{self.matrix[0]}×{self.matrix[1]}, rank={s.rank}, scaling={s.scaling:.4g}{flags}"


def _empty_like(weight: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=weight.dtype, device=weight.device)


class AdaptedModule:
    """Mixed into the class of every adapted module; ``isinstance`` tells adapted ones by it.

    Attributes:
        lora: adapter name → tensor name → `Factors`.
        lora_active: name of the adapter in force; ``None``: the base alone.
    """

    lora: nn.ModuleDict
    lora_active: str | None
    _adapted_base: type[nn.Module]
    _adapted_tensors: tuple[str, ...]

    def factors(self, tensor: str) -> Factors | None:
        """The factors in force on this tensor, or ``None``."""
        if self.lora_active is None or self.lora_active not in self.lora:
            return None
        per_tensor: Any = self.lora[self.lora_active]
        found: Factors | None = per_tensor._modules.get(tensor)
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: pickle what it is made of.
        reduced = super().__reduce_ex__(protocol)
        return (_new, (self._adapted_base, self._adapted_tensors), *reduced[2:])


def _new(base: type[nn.Module], tensors: tuple[str, ...]) -> nn.Module:
    cls = adapted_class(base, tensors)
    return cls.__new__(cls)


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def adapted_class(base: type[nn.Module], tensors: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of `base` in which these tensors are effective; made once for each."""
    if (base, tensors) not in _CLASSES:
        _CLASSES[base, tensors] = _make_class(base, tensors)
    return _CLASSES[base, tensors]


def _make_class(base: type[nn.Module], tensors: tuple[str, ...]) -> type[nn.Module]:
    from lora_lightning.layers import overrides  # layers are written in terms of this module

    body: dict[str, Any] = {tensor: _effective_property(base, tensor) for tensor in tensors}
    body |= overrides(base)
    body |= {"_adapted_base": base, "_adapted_tensors": tensors, "__module__": __name__}
    return type(f"LoRA{base.__name__}", (AdaptedModule, base), body)


def _effective_property(base: type[nn.Module], tensor: str) -> property:
    def read(module: Any) -> Any:
        raw = raw_tensor(module, tensor)
        factors = module.factors(tensor)
        if factors is None:
            return raw
        weight = factors.effective(raw)
        return weight if torch.compiler.is_compiling() else guarded(weight)

    def write(module: Any, value: Any) -> None:
        inherited = getattr(base, tensor, None)
        if isinstance(inherited, property) and inherited.fset is not None:
            inherited.fset(module, value)  # a parametrization keeps its own originals
        else:
            module.__dict__[tensor] = value  # what the old weight_norm hook computes

    return property(read, write)


def guarded(weight: Tensor) -> Tensor:
    """`weight` as a tensor that refuses writes, except under `torch.func`'s wrappers."""
    if torch._C._functorch.maybe_current_level() is not None:
        return weight
    return weight.as_subclass(EffectiveWeight)


def raw_tensor(module: nn.Module, tensor: str) -> Any:
    """The base's own value of an adapted tensor, whatever is active."""
    if tensor in module._parameters:
        return module._parameters[tensor]
    base = getattr(module, "_adapted_base", type(module))
    inherited = getattr(base, tensor, None)
    if isinstance(inherited, property):
        return inherited.fget(module)  # type: ignore[misc]
    return module.__dict__[tensor]


def adapt(module: nn.Module, name: str, specs: dict[str, FactorSpec], bare: bool = False) -> None:
    """Put factors called `name` on these tensors of a live module, in place."""
    if not isinstance(module, AdaptedModule):
        if hasattr(module, "lora"):
            raise AdapterError(f"{type(module).__name__} already has an attribute 'lora'")
        module.add_module("lora", nn.ModuleDict())
        module.__dict__["lora_active"] = None
    live: Any = module
    base = getattr(module, "_adapted_base", type(module))
    tensors = tuple(sorted({*getattr(module, "_adapted_tensors", ()), *specs}))
    factors = nn.ModuleDict()
    for tensor, spec in specs.items():
        parametrized.recompute(module, tensor)
        weight = raw_tensor(module, tensor)
        factors[tensor] = Factors(weight, matrix_shape(tuple(weight.shape), bare), spec)
    factors.train(module.training)
    live.lora[name] = factors
    live.__class__ = adapted_class(base, tensors)
    _refresh(module)


def release(module: nn.Module, name: str) -> None:
    """Take the factors called `name` off; with the last one the class is itself again."""
    live: Any = module
    if name in live.lora:
        del live.lora[name]
    if len(live.lora):
        return
    live.__class__ = live._adapted_base
    del module._modules["lora"], module.__dict__["lora_active"]
    _refresh(module)


def _refresh(module: nn.Module) -> None:
    """Recurrent layers cache their weights in a list, which must be the raw ones again."""
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)
        if not isinstance(module, AdaptedModule):
            module._init_flat_weights()


@dataclass
class Merged:
    """What a merged layer keeps aside to be unmerged exactly."""

    base: type[nn.Module]
    tensors: tuple[str, ...]
    active: str | None
    lora: nn.Module
    raw: dict[str, nn.Parameter]
    placed: dict[str, nn.Parameter]

    def changed(self, module: nn.Module) -> list[str]:
        """Parameters written to since the merge (a fresh parameter has version 0)."""
        live = {key: parametrized.locate(module, key) for key in self.placed}
        return [k for k, p in self.placed.items() if live[k] is not p or p._version > 0]


@torch.no_grad()
def merge_layer(module: nn.Module) -> None:
    """Put the effective weights in the raw ones' place; the class is the base's own again."""
    live: Any = module
    for tensor in live._adapted_tensors:
        parametrized.recompute(module, tensor)
    effective = {
        tensor: factors.effective(raw_tensor(module, tensor), dropout=False)
        for tensor in live._adapted_tensors
        if (factors := live.factors(tensor)) is not None
    }
    base, tensors, active = live._adapted_base, live._adapted_tensors, live.lora_active
    lora = module._modules.pop("lora")
    assert lora is not None
    live.__class__ = base
    del module.__dict__["lora_active"]
    raw: dict[str, nn.Parameter] = {}
    placed: dict[str, nn.Parameter] = {}
    for tensor, value in effective.items():
        for key, new in parametrized.originals(module, tensor, value).items():
            raw[key] = parametrized.locate(module, key)
            placed[key] = nn.Parameter(new, raw[key].requires_grad)
            parametrized.place(module, key, placed[key])
        parametrized.recompute(module, tensor)
    module.__dict__[MERGED] = Merged(base, tensors, active, lora, raw, placed)
    _refresh(module)


def unmerge_layer(module: nn.Module, discard_changes: bool = False) -> None:
    """Undo `merge_layer`: the raw parameters themselves come back, bit for bit.

    Raises:
        AdapterError: the merged weights were written to since, and the writes would be lost.
    """
    merged: Merged = module.__dict__[MERGED]
    if not discard_changes and (changed := merged.changed(module)):
        raise AdapterError(
            f"{', '.join(changed)} of a merged {type(module).__name__} changed since merge(); "
            "unmerging would lose that. Pass discard_changes=True to drop the changes."
        )
    live: Any = module
    for key, raw in merged.raw.items():
        now = parametrized.locate(module, key)
        raw.data = raw.data.to(device=now.device, dtype=now.dtype)
        parametrized.place(module, key, raw)
    for tensor in merged.tensors:
        parametrized.recompute(module, tensor)
    del module.__dict__[MERGED]
    module._modules["lora"] = merged.lora
    module.__dict__["lora_active"] = merged.active
    live.__class__ = adapted_class(merged.base, merged.tensors)
    _refresh(module)
    # What moved the merged module did not see the factors.
    reference = next(iter(merged.raw.values()), None)
    if reference is not None and not reference.is_meta:
        merged.lora.to(device=reference.device, dtype=reference.dtype)
    merged.lora.train(module.training)


def is_merged(module: nn.Module) -> bool:
    """Whether this layer holds merged weights."""
    return MERGED in module.__dict__
