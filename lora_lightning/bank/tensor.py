"""`BankTensor`: the weight that a layer reads while a mixed batch runs.

It has the shape of the source's own tensor. It intercepts every function that is called with it
(``__torch_function__``), and where `OPS` has the function, each item of the batch gets its own
values. So a layer, and any code that reads its weight, runs unchanged: ``F.linear(x,
self.qkv.weight)`` in BEiT, raw ``in_proj_weight`` in WavLM, "same" padding. Code that uses the
tensor in another function, such as `torch.nn.MultiheadAttention`, runs in groups of items that
share an adapter: the source's values are never used silently.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lora_lightning.bank.mix import Mix
from lora_lightning.bank.products import affine, conv, linear, mix_of, values, where
from lora_lightning.errors import AdapterError


class BankTensor(Tensor):
    """The source's tensor by its shape and dtype, a `Mix` in computations."""

    mix: Mix

    @classmethod
    def of(cls, mix: Mix) -> BankTensor:
        """The tensor for this mix."""
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
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _SAME:
            return _same(func, args, kwargs)
        return _compute(func, args, kwargs)


def _compute(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    mixes = [m for m in map(mix_of, tree_leaves((args, kwargs))) if m is not None]
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
        "have adapters of their own, and was used otherwise when the bank probed the model. "
        "Call bank.probe(batch) with a batch of this kind"
    )


def _input(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mixes: list[Mix]) -> Any:
    """The input of a function that `OPS` supports here; ``None`` for any other use."""
    if func not in OPS or any(mix.is_bare for mix in mixes):
        return None
    x = args[0] if args else kwargs.get("input")
    fits = isinstance(x, Tensor) and mix_of(x) is None and x.dim() >= OPS[func][1]
    return x if fits else None


def _plain(mix: Mix) -> Tensor:
    return mix.value()[0]


def _each(tree: Any, value: Callable[[Mix], Tensor]) -> Any:
    """The tree with plain tensors for the bank's."""
    return tree_map(lambda leaf: leaf if (mix := mix_of(leaf)) is None else value(mix), tree)


def name_of(func: Any) -> str:
    """A torch function's name, for a message."""
    return str(getattr(func, "__name__", func))


def _same(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tensor in another representation; or another tensor in that of the bank's."""
    (tensor, *rest), kwargs = args, _each(kwargs, lambda m: m.raw)
    rest = _each(rest, lambda m: m.raw)
    mix = mix_of(tensor)
    if mix is None:
        return func(tensor, *rest, **kwargs)
    return BankTensor.of(mix.map(lambda t: func(t, *rest, **kwargs)))


# Functions that do not depend on the values.
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
_SAME: frozenset[Any] = frozenset(
    [Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16,
     Tensor.contiguous, Tensor.detach, Tensor.type_as]
)  # fmt: skip


# ---- torch's functions of a weight, with a weight for every item ------------------------------
# Each function takes the arguments of the torch function that it replaces.


def embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """`torch.nn.functional.embedding` (arguments for its backward pass have no effect)."""
    n, layout = where(input, weight)
    mix = mix_of(weight)
    assert mix is not None
    index = layout.items(input, n)
    rows, item = index.flatten(1), torch.arange(n, device=input.device)[:, None]
    if mix.full is not None:
        found = mix.full[item, rows]
    else:
        lora_A, lora_B = mix.factors()
        found = F.embedding(rows, mix.raw) + lora_B[item, rows] @ lora_A
    if mix.scale is not None:
        found = found * mix.scale[item, rows][..., None]
    return layout.back(found.view(*index.shape, -1))


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm`."""
    n, layout = where(input, weight, bias)
    out = F.layer_norm(input, normalized_shape, None, None, eps)
    return affine(out, values(weight), values(bias), n, layout, -len(normalized_shape))


def rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`torch.nn.functional.rms_norm`."""
    n, layout = where(input, weight)
    out = F.rms_norm(input, normalized_shape, None, eps)
    return affine(out, values(weight), None, n, layout, -len(normalized_shape))


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.group_norm`."""
    n, layout = where(input, weight, bias)
    out = F.group_norm(input, num_groups, None, None, eps)
    return affine(out, values(weight), values(bias), n, layout, 1 - out.dim())


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""`torch.nn.functional.batch_norm` with running statistics, :math:`x a + b` of each item."""
    n, layout = where(input, running_mean, running_var, weight, bias)
    mean, variance = values(running_mean), values(running_var)
    if training or mean is None or variance is None:
        raise AdapterError(
            "a BatchNorm that normalises by the batch mixes its items: call model.eval(), or give "
            "it running statistics"
        )
    a, b = (variance + eps).rsqrt(), values(bias)
    if weight is not None:
        scale = values(weight)
        assert scale is not None
        a = a * scale
    shift = -mean * a if b is None else b - mean * a
    return affine(input, a, shift, n, layout, 1 - input.dim())


# Torch function → (its replacement, how many dimensions its first argument, the input, has at
# least where there are items in it).
OPS: dict[Any, tuple[Callable[..., Tensor], int]] = {
    F.linear: (linear, 2),
    F.conv1d: (partial(conv, F.conv1d), 3),
    F.conv2d: (partial(conv, F.conv2d), 4),
    F.conv3d: (partial(conv, F.conv3d), 5),
    F.embedding: (embedding, 1),
    F.layer_norm: (layer_norm, 2),
    F.rms_norm: (rms_norm, 2),
    F.group_norm: (group_norm, 2),
    F.batch_norm: (batch_norm, 2),
}

# Those that support the items in the first dimension only.
ITEMS_FIRST: frozenset[Any] = frozenset([F.conv1d, F.conv2d, F.conv3d, F.group_norm])


def _called_conv(op: Any, layer: Any, x: Tensor, weight: Any, bias: Any) -> Tensor:
    if layer.padding_mode != "zeros":
        raise AdapterError("a bank cannot be compiled with convolutions that pad by themselves")
    return conv(op, x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


# The forward of a layer → the same with a weight and a bias that are given.
CALLED: dict[Any, Callable[..., Tensor]] = {
    nn.Linear.forward: lambda layer, x, weight, bias: linear(x, weight, bias),
    nn.Conv1d.forward: partial(_called_conv, F.conv1d),
    nn.Conv2d.forward: partial(_called_conv, F.conv2d),
    nn.Conv3d.forward: partial(_called_conv, F.conv3d),
}
