r"""Adapted modules: the class of a live module is swapped for a subclass of it.

`adapt` puts low-rank factors on a live module and swaps the module's *class* for a subclass
of its own class, in which each adapted tensor is a property that yields the effective weight

.. math:: W' = W + s\,B A .

The raw weight stays in ``_parameters``, so names, shapes, ties, hooks, optimizers and
``isinstance`` are unaffected; code that *reads* ``module.weight``, such as
``F.linear(x, self.qkv.weight)`` in a model's own forward, gets the adapted weight. Where the
product can be kept in factors, `lora_lightning.lora.factorised` has a cheaper ``forward``.

`release` swaps the class back. Reading order: `adapt`, `adapted_class`, `AdaptedModule`; then
`lora_lightning.lora.factors` for BA itself and `lora_lightning.lora.merging` for W' in W's place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from lora_lightning.errors import AdapterError
from lora_lightning.lora import parametrizations
from lora_lightning.lora.effective_weight import EffectiveWeight, WholeWeights, refuse_tracing
from lora_lightning.lora.factors import Factors
from lora_lightning.lora.layers import base_class, has_foreign_lora, overrides, refresh
from lora_lightning.lora.module_tree import find
from lora_lightning.lora.precision import floating
from lora_lightning.lora.spec import FactorSpec, matrix_shape
from lora_lightning.lora.swapped_class import once, swapped_class
from lora_lightning.lora.xs import Basis, XSFactors, basis_of

_GET_PARAMETER = nn.Module.get_parameter.__code__
# FSDP2 and distributed checkpoints look their parameters up by attribute.
_SHARDING = ("torch.distributed.fsdp.", "torch.distributed.checkpoint.")


class _Uncompilable(Sequence[str]):
    """Read by TorchScript when it compiles an adapted class: raises, as that is unsupported."""

    def __len__(self) -> int:
        raise AdapterError(
            "TorchScript cannot compile an adapter that is not merged: call merge(model) before "
            "torch.jit.script or torch.jit.trace, and unmerge(model) afterwards to train on"
        )

    def __getitem__(self, index: Any) -> Any:
        return [][index]


class AdaptedModule(WholeWeights):
    """Mixin of the class of every adapted module, for ``isinstance``.

    Attributes:
        lora: adapter name → tensor name → `Factors`.
        lora_active: name of the active adapter; ``None``: the base alone.
    """

    lora: nn.ModuleDict
    lora_active: str | None
    _modules: dict[str, Any]
    __jit_ignored_attributes__ = _Uncompilable()

    def factors(self, tensor: str) -> Factors | None:
        """The active adapter's factors of this tensor, or ``None``."""
        # By the tables, as in all that runs in every forward: an attribute takes longer.
        per_tensor = self._modules["lora"]._modules.get(self.lora_active)
        if per_tensor is None:
            return None
        if is_fx_symbolic_tracing():
            refuse_tracing()
        found: Factors | None = per_tensor._modules.get(tensor)
        return found

    def factors_of(self, name: str | None) -> dict[str, Factors]:
        """Tensor name → factors of the adapter `name`; empty where it has none here."""
        per_tensor = self._modules["lora"]._modules.get(name)
        return {} if per_tensor is None else per_tensor._modules

    def set_lora_active(self, name: str | None) -> None:
        """Activate the adapter `name`; where it is ``None`` or has no factors here, the base."""
        self.__dict__["lora_active"] = name if self.factors_of(name) else None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        module: Any = self
        found = [item for name in self.lora for item in self.factors_of(name).items()]
        dora = [(tensor, factors) for tensor, factors in found if factors.magnitude is not None]
        before = {tensor: raw_tensor(module, tensor).dtype for tensor, _ in dora}
        out = super()._apply(fn, recurse)  # type: ignore[misc]
        for tensor, factors in dora:
            parametrizations.recompute(module, tensor)
            raw = raw_tensor(module, tensor)
            if raw.dtype != before[tensor] and not raw.is_meta:
                factors.rebase(raw)  # until they train, magnitudes are the rounded weight's norms
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: pickle its ingredients.
        reduced = super().__reduce_ex__(protocol)
        return (_new, (self._adapted_base, self._adapted_tensors), *reduced[2:])


def _new(base: type[nn.Module], tensors: tuple[str, ...]) -> nn.Module:
    cls = adapted_class(base, tensors)
    return cls.__new__(cls)


@once
def adapted_class(base: type[nn.Module], tensors: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of `base` in which these tensors are effective; made once for each."""
    body = {**overrides(base), "_adapted_tensors": tensors}
    # Shown by tools that find no rule for a class, such as `torch.ao.quantization.fuse_modules`.
    body["__qualname__"] = f"LoRA{base.__name__} (call merge(model) first)"
    return swapped_class("LoRA", (AdaptedModule, base), base, tensors, _effective, body)


def _effective(module: Any, tensor: str) -> Any:
    raw = raw_tensor(module, tensor)
    factors = module.factors(tensor)
    if factors is None:
        return raw
    if torch.compiler.is_compiling():
        return factors.effective(raw)
    frame = sys._getframe(2)
    reader = frame.f_code
    if reader is _GET_PARAMETER or frame.f_globals.get("__name__", "").startswith(_SHARDING):
        return raw  # the parameter of this name, as in `named_parameters`
    if reader.co_name == "set_input_size":  # timm's, into a new layer without an adapter
        raise AdapterError(
            f"set_input_size would resize {tensor} of an adapted {module._adapted_base.__name__} "
            "and lose its adapter: call it before inject, or merge(model) first"
        )
    return guarded(factors.effective(raw))


def guarded(weight: Tensor) -> Tensor:
    """`weight` as a tensor that refuses writes, except under `torch.func`'s wrappers."""
    if torch._C._functorch.maybe_current_level() is not None:
        return weight
    return weight.as_subclass(EffectiveWeight)


def raw_tensor(module: nn.Module, tensor: str) -> Any:
    """The base's own value of an adapted tensor, whatever is active."""
    if tensor in module._parameters:
        return module._parameters[tensor]
    inherited = getattr(base_class(module), tensor, None)
    if isinstance(inherited, property):
        return inherited.fget(module)  # type: ignore[misc]
    return module.__dict__[tensor]


def located(model: nn.Module, path: str) -> tuple[Any, str]:
    """(module, tensor's name) of a full tensor path such as ``blocks.0.attn.qkv.weight``."""
    owner, _, tensor = path.rpartition(".")
    return find(model, owner), tensor


def adapt(
    module: nn.Module,
    name: str,
    specs: dict[str, FactorSpec],
    bare: bool = False,
    bases: Mapping[str, Basis | None] | None = None,
    values: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Put factors called `name` on these tensors of a live module, in place.

    `bases` are LoRA-XS's and `values` the factors' own (copied), both by tensor, where the caller
    has them already. Existing factors of that name and of the same shapes take the values.
    """
    if not isinstance(module, AdaptedModule):
        if has_foreign_lora(module):
            raise AdapterError(f"{type(module).__name__} already has an attribute 'lora'")
        module._modules["lora"] = nn.ModuleDict()
        module.__dict__["lora_active"] = None
    tensors = tuple(sorted({*getattr(type(module), "_adapted_tensors", ()), *specs}))
    # A recurrent layer has many tensors, which an adapter's file adds one at a time.
    # Into the tables, since `ModuleDict` checks names slowly.
    adapters: Any = module._modules["lora"]._modules  # type: ignore[union-attr]
    factors = adapters.pop(name) if name in adapters else nn.ModuleDict()
    for tensor, spec in specs.items():
        parametrizations.recompute(module, tensor)
        weight = floating(raw_tensor(module, tensor))
        matrix, given = matrix_shape(tuple(weight.shape), bare), (values or {}).get(tensor)
        new = _placed(factors._modules.pop(tensor, None), weight, matrix, spec, given)
        if spec.xs:
            known = (bases or {}).get(tensor)
            new.basis = known or basis_of(module, tensor, weight, spec.rank, bare)
        factors._modules[tensor] = new
        if new.training is not module.training:
            new.train(module.training)
    for container in (module._modules["lora"], factors):
        container.__dict__["training"] = module.training
    adapters[name] = factors
    cls = adapted_class(base_class(module), tensors)
    if type(module) is not cls:
        object.__setattr__(module, "__class__", cls)  # the module's own would look for parameters
    refresh(module)


def _placed(
    old: Any,
    weight: Tensor,
    matrix: tuple[int, int],
    spec: FactorSpec,
    values: Mapping[str, Tensor] | None,
) -> Any:
    """Factors of this spec: the existing ones, where they can take the values."""
    made = XSFactors if spec.xs else Factors
    if type(old) is made and values is not None and old.take(weight, matrix, spec, values):
        return old
    return made(weight, matrix, spec, values)


def release(module: nn.Module, name: str) -> None:
    """Remove the factors called `name`; without any the module has its own class again."""
    live: Any = module
    if name in live.lora:
        del live.lora[name]
    if len(live.lora):
        return
    live.__class__ = live._adapted_base
    del module._modules["lora"], module.__dict__["lora_active"]
    refresh(module)
