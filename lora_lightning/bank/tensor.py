"""`BankTensor`: what a layer reads as its weight while a batch of many adapters runs.

It looks like the source's own tensor. Torch hands over every function that is called with it, and
where `lora_lightning.bank.ops` knows the function, each item of the batch gets its own values. A
layer, and whoever reads its weight, so runs its own code: ``F.linear(x, self.qkv.weight)`` in
BEiT, raw ``in_proj_weight`` in WavLM, "same" padding. What is not known is an error that names the
tensor: nothing ever computes with the source's values in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lora_lightning.bank.mix import Mix
from lora_lightning.bank.ops import OPS
from lora_lightning.bank.products import mix_of
from lora_lightning.errors import AdapterError


class BankTensor(Tensor):
    """The source's tensor to look at, a `Mix` to compute with."""

    mix: Mix

    @classmethod
    def of(cls, mix: Mix) -> BankTensor:
        """The tensor that stands for this mix."""
        tensor = mix.raw.detach().as_subclass(cls)
        tensor.mix = mix
        return tensor

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func` with each item's own values."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return _attention(*args, **kwargs)
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _ROWS and (cut := _rows(func, args, kwargs)) is not None:
            return cut
        if func in _SAME:
            return _same(func, args, kwargs)
        return _compute(func, args, kwargs)


def _compute(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    mixes = [m for leaf in tree_leaves((args, kwargs)) if (m := mix_of(leaf)) is not None]
    x = _input(func, args, kwargs, mixes)
    if mixes[0].watch is not None:
        for mix in mixes:
            mixes[0].watch(mix, func, x)
        return func(*_each(args, lambda m: m.raw), **_each(kwargs, lambda m: m.raw))
    if x is not None:
        return OPS[func][0](*args, **kwargs)
    if mixes[0].n == 1:
        return func(*_each(args, _plain), **_each(kwargs, _plain))
    raise AdapterError(
        f"{mixes[0].path} is used by {name_of(func)} here, in which the items of a batch cannot "
        "have adapters of their own, and was used otherwise when the bank looked at the model. "
        "Call bank.probe(batch) with a batch of this kind"
    )


def _input(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mixes: list[Mix]) -> Any:
    """The input of a function that `OPS` can do here; ``None`` for any other use."""
    if func not in OPS or any(mix.is_bare for mix in mixes):
        return None
    x = args[0] if args else kwargs.get("input")
    fits = isinstance(x, Tensor) and mix_of(x) is None and x.dim() >= OPS[func][1]
    return x if fits else None


def _plain(mix: Mix) -> Tensor:
    return mix.value()[0]


def _each(tree: Any, value: Callable[[Mix], Tensor]) -> Any:
    """Plain tensors in the place of the bank's."""
    return tree_map(lambda leaf: leaf if (mix := mix_of(leaf)) is None else value(mix), tree)


def name_of(func: Any) -> str:
    """A torch function's name, for a message."""
    return str(getattr(func, "__name__", func))


def _rows(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows of the tensor as tensors like it; ``None`` where something else is asked for."""
    tensor, *rest = args
    if tensor.mix.is_bare:
        return None
    if any(isinstance(r, (tuple, Tensor)) or r is None or r is Ellipsis for r in rest):
        return None
    if len(rest) > 1 or kwargs.get("dim", 0) != 0:
        return None
    cut = func(torch.arange(len(tensor.mix.raw)), *rest, **kwargs)
    parts = [cut] if isinstance(cut, Tensor) else cut
    if any(p.dim() != 1 or not len(p) or len(p) != p[-1] - p[0] + 1 for p in parts):
        return None
    found = [BankTensor.of(tensor.mix.rows(slice(int(p[0]), int(p[-1]) + 1))) for p in parts]
    return found[0] if isinstance(cut, Tensor) else tuple(found)


def _same(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tensor in another representation; or another tensor in that of the bank's."""
    (tensor, *rest), kwargs = args, _each(kwargs, lambda m: m.raw)
    rest = _each(rest, lambda m: m.raw)
    mix = mix_of(tensor)
    if mix is None:
        return func(tensor, *rest, **kwargs)
    return BankTensor.of(mix.map(lambda t: func(t, *rest, **kwargs)))


def _without_dispatch(function: Any) -> Any:
    """Torch's own function, which no longer asks whether its arguments want to take over."""
    space = {**function.__globals__, "has_torch_function": lambda tensors: False}
    made = FunctionType(function.__code__, space, function.__name__, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


# Its projections are F.linear on the packed weight, or on rows of it, and so come back here.
_attention = _without_dispatch(F.multi_head_attention_forward)

# What does not depend on the values.
_LOOKS: frozenset[Any] = frozenset(
    [
        *(
            getattr(Tensor, name).__get__
            for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda",
                         "is_nested", "is_sparse", "is_quantized", "is_meta", "is_cpu", "itemsize")
        ),
        Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.stride,
        Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex,
        Tensor.is_contiguous, Tensor.element_size, Tensor.get_device, Tensor.ndimension,
    ]
)  # fmt: skip
_ROWS: frozenset[Any] = frozenset(
    [Tensor.chunk, torch.chunk, Tensor.split, torch.split, Tensor.__getitem__]
)
_SAME: frozenset[Any] = frozenset(
    [Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16,
     Tensor.contiguous, Tensor.detach, Tensor.type_as]
)  # fmt: skip
