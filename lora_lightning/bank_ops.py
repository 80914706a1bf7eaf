"""What torch does with a weight, done with another weight for every item of the batch.

Each function below takes the arguments of the torch function that it stands for, in which weights
and biases may be tensors with a `Mix`. The item's own part is added to the base's output in place,
by batched products on views: activations are not copied where the layout allows it.

Shapes: n items, N entries along the items' dimension, r rank, C channels in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.bank_layout import Layout
from lora_lightning.bank_mix import Mix
from lora_lightning.errors import AdapterError


def mix_of(tensor: Any) -> Mix | None:
    """The mix behind a tensor; ``None`` where it is one for all items."""
    found: Mix | None = getattr(tensor, "mix", None)
    return found


def _where(x: Tensor, *tensors: Tensor | None) -> tuple[int, Layout]:
    mix = next(m for t in tensors if (m := mix_of(t)) is not None)
    return mix.n, mix.where(x)


def _values(tensor: Tensor | None) -> Tensor | None:
    """One value an item, (n, …), or (1, …) for all."""
    if tensor is None:
        return None
    mix = mix_of(tensor)
    return tensor[None] if mix is None else mix.value()


def _affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, layout: Layout, at: int
) -> Tensor:
    """x·w + b of every item, whose values begin at dimension `at`, counted from the end."""
    out = layout.split(x, n)
    if weight is not None:
        out = out * layout.spread(weight, x, at)
    if bias is not None:
        out = out + layout.spread(bias, x, at)
    return layout.join(out)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`."""
    n, layout = _where(input, weight, bias)
    mix = mix_of(weight)
    if mix is None:
        return _affine(F.linear(input, weight), None, _values(bias), n, layout, -1)
    late = mix_of(bias) is not None or mix.scale is not None or mix.full is not None
    if mix.full is not None:
        items = layout.items(input, n)
        rows = torch.bmm(items.flatten(1, -2), mix.full.mT)
        out = layout.back(rows.unflatten(1, items.shape[1:-1]))
    else:
        out = F.linear(input, mix.raw, None if late else bias)
        _add_linear(out, input, mix, layout)
    return _affine(out, mix.scale, _values(bias), n, layout, -1) if late else out


def _add_linear(out: Tensor, x: Tensor, mix: Mix, layout: Layout) -> None:
    assert mix.lora_A is not None and mix.lora_B is not None
    low = torch.bmm(layout.items(x, mix.n).flatten(1, -2), mix.lora_A.mT)
    low, lora_B = low.to(out.dtype), mix.lora_B.mT.to(out.dtype)
    items = layout.items(out, mix.n)
    rows = items.flatten(1, -2)
    if rows.data_ptr() == items.data_ptr():
        rows.baddbmm_(low, lora_B)
    else:  # flattening copied: no three dimensions can express this layout
        items += torch.bmm(low, lora_B).view(items.shape)


def conv(
    op: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv1d`, `conv2d` or `conv3d`, which is `op`."""
    n, layout = _where(input, weight, bias)
    options = (stride, padding, dilation)
    mix = mix_of(weight)
    if mix is None:
        out = op(input, weight, None, *options, groups)
        return _affine(out, None, _values(bias), n, layout, 1 - out.dim())
    # No factors of rank r make a product per group: there each entry gets its whole weight.
    whole = mix.full is not None or groups > 1
    late = whole or mix.scale is not None or mix_of(bias) is not None
    if whole:
        out = _own_conv(op, input, layout.each(mix.value(), len(input)), options, groups)
    else:
        out = op(input, mix.raw, None if late else bias, *options, groups)
        _add_conv(op, out, input, mix, layout, options)
    scale = None if whole else mix.scale
    return _affine(out, scale, _values(bias), n, layout, 1 - out.dim()) if late else out


def _own_conv(
    op: Callable[..., Tensor], x: Tensor, weights: Tensor, options: tuple[Any, ...], groups: int
) -> Tensor:
    """Entry e convolved with weights[e]: each entry is a group of channels of its own."""
    N, out = weights.shape[:2]
    if N == 1 or weights.stride(0) == 0:
        return op(x, weights[0], None, *options, groups)
    if groups == 1 and _is_pointwise(weights, options):
        rows = torch.bmm(weights.reshape(N, out, -1), x.flatten(2))
        return rows.view(N, out, *x.shape[2:])
    folded = x.reshape(1, N * x.shape[1], *x.shape[2:])
    y = op(folded, weights.flatten(0, 1), None, *options, N * groups)
    return y.view(N, out, *y.shape[2:])


def _is_pointwise(weights: Tensor, options: tuple[Any, ...]) -> bool:
    stride, padding = (set(o) if isinstance(o, (tuple, list)) else {o} for o in options[:2])
    return set(weights.shape[3:]) == {1} and stride == {1} and padding <= {0, "same", "valid"}


def _add_conv(
    op: Callable[..., Tensor],
    out: Tensor,
    x: Tensor,
    mix: Mix,
    layout: Layout,
    options: tuple[Any, ...],
) -> None:
    assert mix.lora_A is not None and mix.lora_B is not None
    lora_A = layout.each(mix.lora_A, len(x)).unflatten(2, mix.raw.shape[1:])
    low = _own_conv(op, x, lora_A, options, groups=1).flatten(2).to(out.dtype)
    out.flatten(2).baddbmm_(layout.each(mix.lora_B, len(x)).to(out.dtype), low)


def embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """`torch.nn.functional.embedding` (what only its backward pass looks at has no effect)."""
    n, layout = _where(input, weight)
    mix = mix_of(weight)
    assert mix is not None
    index = layout.items(input, n)
    rows, item = index.flatten(1), torch.arange(n, device=input.device)[:, None]
    if mix.full is not None:
        found = mix.full[item, rows]
    else:
        assert mix.lora_A is not None and mix.lora_B is not None
        found = F.embedding(rows, mix.raw) + mix.lora_B[item, rows] @ mix.lora_A
    if mix.scale is not None:
        found = found * mix.scale[item, rows][..., None]
    return layout.back(found.unflatten(1, index.shape[1:]))


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm`."""
    n, layout = _where(input, weight, bias)
    out = F.layer_norm(input, normalized_shape, None, None, eps)
    return _affine(out, _values(weight), _values(bias), n, layout, -len(normalized_shape))


def rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`torch.nn.functional.rms_norm`."""
    n, layout = _where(input, weight)
    out = F.rms_norm(input, normalized_shape, None, eps)
    return _affine(out, _values(weight), None, n, layout, -len(normalized_shape))


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.group_norm`."""
    n, layout = _where(input, weight, bias)
    out = F.group_norm(input, num_groups, None, None, eps)
    return _affine(out, _values(weight), _values(bias), n, layout, 1 - out.dim())


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
    n, layout = _where(input, running_mean, running_var, weight, bias)
    mean, variance = _values(running_mean), _values(running_var)
    if training or mean is None or variance is None:
        raise AdapterError(
            "a BatchNorm that normalises by the batch mixes its items: call model.eval(), or give "
            "it running statistics"
        )
    a, b = (variance + eps).rsqrt(), _values(bias)
    if weight is not None:
        scale = _values(weight)
        assert scale is not None
        a = a * scale
    shift = -mean * a if b is None else b - mean * a
    return _affine(input, a, shift, n, layout, 1 - input.dim())


# Torch function → (what stands for it, how many dimensions its first argument, the input, has at
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
