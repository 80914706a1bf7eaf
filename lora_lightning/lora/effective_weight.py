"""`EffectiveWeight`: the read-only tensor that `.weight` of an adapted layer returns.

An effective weight W + sBA is recomputed at each read, so a write into it would be lost. This
tensor subclass computes like any tensor and raises on every write, through views as well.
Compiled and exported graphs get a plain tensor: they read weights, they do not write them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import WeightWriteError

# add_, copy_, kaiming_uniform_ …; w[i] = …; w.data = …, w.requires_grad = …; w += ….
_WRITES = re.compile(r"^(?:.*[^_]_|__setitem__|__set__|__i(?!nit|nvert|nt|ndex|ter)\w+__)$")

_MESSAGE = (
    "{op} would write into the effective weight W + s·BA of an adapted layer, which is computed at "
    "each read: the write would be lost. To change the base weight W, do it inside "
    "`with lora_lightning.disabled(model):`, assign `layer.weight = nn.Parameter(...)`, or use "
    "`load_state_dict`."
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
    if isinstance(out, Tensor) and any(_shares_storage(out, s) for s in sources):
        return out.as_subclass(EffectiveWeight)
    return out


def _shares_storage(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
