"""`EffectiveWeight`: the read-only tensor that `.weight` of an adapted layer returns.

An effective weight W + sBA is recomputed at each read, so a write into it would be lost. This
tensor subclass computes like any tensor and raises on every write, through views as well.
Compiled and exported graphs get a plain tensor: they read weights, they do not write them.

What is read as W + sBA cannot be assigned as W either (`WholeWeights`): a program that reads a
weight, transforms it and assigns the result (fusing with BatchNorm, quantising, resizing) would
count BA twice.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterError, WeightWriteError
from lora_lightning.lora.sharding import FSDP1, is_sharded

# add_, copy_, kaiming_uniform_ …; w[i] = …; w.data = …, w.requires_grad = …; w += ….
_WRITES = re.compile(r"^(?:.*[^_]_|__setitem__|__set__|__i(?!nit|nvert|nt|ndex|ter)\w+__)$")

_MESSAGE = (
    "{op} would write into the effective weight W + s·BA of an adapted layer, which is computed at "
    "each read: the write would be lost. Call merge(model) first, which makes it the layer's own "
    "weight; to change the base weight W, do it inside `with lora_lightning.disabled(model):` or "
    "use `load_state_dict`."
)
_ASSIGNED = (
    "{name} of an adapted {kind} is read as the effective weight W + s·BA, so that assigning it, "
    "or taking it away, would count BA twice or lose it: call merge(model) first. To replace the "
    "base weight W, assign it inside `with lora_lightning.disabled(model):`."
)


class EffectiveWeight(Tensor):
    """A read-only tensor: reads give plain results, writes raise `WeightWriteError`."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func` on the plain tensors, refuse writes, keep the guard on views."""
        kwargs = kwargs or {}
        _refuse_write(getattr(func, "__name__", ""), args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            sources = [a for a in args if isinstance(a, EffectiveWeight)]
            return _guard_views(out, sources)


def _refuse_write(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    out = kwargs.get("out")
    if isinstance(out, EffectiveWeight):
        raise WeightWriteError(_MESSAGE.format(op=f"{name}(out=...)"))
    # torch.nn.init passes its tensor by keyword.
    written = args[0] if args else kwargs.get("tensor")
    listed = isinstance(written, (list, tuple)) and any(
        isinstance(w, EffectiveWeight) for w in written
    )
    if (listed or isinstance(written, EffectiveWeight)) and _WRITES.match(name):
        raise WeightWriteError(_MESSAGE.format(op=name))


def _guard_views(out: Any, sources: list[EffectiveWeight]) -> Any:
    if isinstance(out, (tuple, list)):
        return (
            type(out)(_guard_views(o, sources) for o in out) if type(out) in (tuple, list) else out
        )
    if isinstance(out, Tensor) and any(
        out.untyped_storage()._cdata == s.untyped_storage()._cdata for s in sources
    ):
        return out.as_subclass(EffectiveWeight)
    return out


class WholeWeights:
    """Mixin of adapted modules: a tensor that is read as W + s·BA is not assigned as W."""

    _adapted_tensors: tuple[str, ...]
    _adapted_base: type[nn.Module]
    lora_active: str | None
    factors: Callable[[str], Any]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """What assigning a parameter comes to.

        Not `__setattr__`, by which FSDP2 would no longer take this for a plain module.

        Raises:
            WeightWriteError: see `check_assignment`.
        """
        self.check_assignment(name, param)
        super().register_parameter(name, param)  # type: ignore[misc]

    def check_assignment(self, name: str, value: Any) -> None:
        """Refuse to assign `value` to a tensor whose adapter acts, or an effective weight at all.

        Raises:
            WeightWriteError: what is read is not what is assigned; `disabled` makes them the same.
            AdapterError: it is a part of a weight.
        """
        acting = self.factors(name) if name in self._adapted_tensors else None
        if acting and is_sharded(value):
            raise AdapterError(
                f"a tensor-parallel plan (parallelize_module) would shard {name} of an adapted "
                f"{self._adapted_base.__name__}, and not its factors: use fully_shard alone, or "
                "merge(model) first"
            )
        if isinstance(value, EffectiveWeight) or (acting and self._replaces(name, value, acting)):
            raise WeightWriteError(_ASSIGNED.format(name=name, kind=self._adapted_base.__name__))

    def _replaces(self, name: str, value: Any, acting: Any) -> bool:
        with self._as_base():
            raw = getattr(self, name)
        if value is raw or raw.is_meta:
            return False
        # At B = 0 both are one; DoRA's magnitudes give it up to rounding.
        whole = acting.effective(raw, dropout=False)
        return not torch.allclose(whole, raw, rtol=1e-6, atol=1e-12)

    @contextmanager
    def _as_base(self) -> Iterator[None]:
        active = self.lora_active
        self.__dict__["lora_active"] = None
        try:
            yield
        finally:
            self.__dict__["lora_active"] = active

    def __delattr__(self, name: str) -> None:
        # As torch's parametrizations and spectral_norm begin.
        if name in self._adapted_tensors:
            if sys._getframe(1).f_globals.get("__name__", "").startswith("torch.distributed.fsdp"):
                raise AdapterError(FSDP1)
            raise WeightWriteError(_ASSIGNED.format(name=name, kind=self._adapted_base.__name__))
        super().__delattr__(name)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        with self._as_base():  # with `assign=True` it assigns raw weights
            super()._load_from_state_dict(*args, **options)  # type: ignore[misc]


def refuse_tracing() -> None:
    """Refuse `torch.fx.symbolic_trace`: a graph would hold today's factors as constants."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if get_proxy_mode() is None:  # `make_fx` and `export` see every operation
        raise AdapterError(
            "torch.fx cannot trace an adapter that is not merged: call merge(model) before "
            "symbolic_trace, create_feature_extractor or prepare_fx, or inject into their result"
        )
