"""Batched products with another weight for every item: linear layers and convolutions.

Each function below takes the arguments of the torch function that it replaces, in which weights
and biases may be tensors with a `Mix`. The item's own part is added to the base's output in place,
by batched products on views: activations are not copied where the layout allows it.

Shapes: n items, N entries along the items' dimension, r rank, C channels in.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.bank.layout import Layout
from lora_lightning.bank.mix import Mix
from lora_lightning.lora.fused.plan import adds_exactly

# Least multiplications of a call for each thread: some 50 µs of work, a call costs 5 µs.
_WORTH_A_CALL = 2_000_000


def mix_of(tensor: Any) -> Mix | None:
    """The mix behind a tensor; ``None`` where it is the same for all items."""
    if isinstance(tensor, Mix):
        return tensor
    found: Mix | None = getattr(tensor, "mix", None) if isinstance(tensor, Tensor) else None
    return found


def where(x: Tensor, *tensors: Tensor | None) -> tuple[int, Layout]:
    """Number of items, and where they lie in the input of these tensors."""
    mix = next(m for m in map(mix_of, tensors) if m is not None)
    return mix.n, mix.where(x)


def values(tensor: Tensor | None) -> Tensor | None:
    """One value an item, (n, …), or (1, …) for all."""
    if tensor is None:
        return None
    mix = mix_of(tensor)
    return tensor[None] if mix is None else mix.value()


def affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, layout: Layout, at: int
) -> Tensor:
    """x·w + b of every item, whose values begin at dimension `at`, counted from the end.

    In the dtype of `x`, as with torch's own functions where w and b have another.
    """
    out = layout.split(x, n)
    if weight is not None:
        out = out * layout.spread(weight, x, at)
    if bias is not None:
        out = out + layout.spread(bias, x, at)
    return layout.join(out).to(x.dtype)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`."""
    n, layout = where(input, weight, bias)
    mix = mix_of(weight)
    if mix is None:
        return affine(F.linear(input, weight), None, values(bias), n, layout, -1)
    late = mix_of(bias) is not None or mix.scale is not None or mix.full is not None
    if mix.full is not None:
        items = layout.items(input, n)
        rows = torch.bmm(items.flatten(1, -2), mix.full.mT)
        out = layout.back(rows.view(*items.shape[:-1], -1))
    else:
        out = _own_linear(input, mix, None if late else bias, layout)
    return affine(out, mix.scale, values(bias), n, layout, -1) if late else out


def _own_linear(x: Tensor, mix: Mix, bias: Tensor | None, layout: Layout) -> Tensor:
    """x (W + B A)ᵀ + b, with the factors of each item, or of the one adapter for all."""
    shared = _shared(mix, x)
    if shared is not None:
        return F.linear(x, shared, bias)
    if _worth_joining(x, mix):
        out = x.new_empty(*x.shape[:-1], len(mix.raw))
        items = layout.items(out, mix.n)
        if _flattens(items):
            _item_by_item(items.flatten(1, -2), layout.items(x, mix.n).flatten(1, -2), mix, bias)
            return out
    if layout.place == 0:
        rows = layout.items(x, mix.n).flatten(1, -2)
        return _items_first(rows, mix, bias).view(*x.shape[:-1], len(mix.raw))
    out = F.linear(x, mix.raw, bias)
    lora_A, lora_B = mix.factors()
    low = torch.bmm(layout.items(x, mix.n).flatten(1, -2), lora_A.mT)
    low, lora_B = low.to(out.dtype), lora_B.mT.to(out.dtype)  # under autocast they differ
    items = layout.items(out, mix.n)
    if _flattens(items):
        items.flatten(1, -2).baddbmm_(low, lora_B)
    else:  # this layout does not fit a batched product
        items += torch.bmm(low, lora_B).view(items.shape)
    return out


def _shared(mix: Mix, x: Tensor) -> Tensor | None:
    """The weight of the one adapter of all items, where there is only one."""
    if mix.n > 1 or not adds_exactly(x, mix.raw):
        return None
    lora_A, lora_B = mix.factors()
    return torch.addmm(mix.raw.flatten(1), lora_B[0], lora_A[0]).view_as(mix.raw)


def _worth_joining(x: Tensor, mix: Mix) -> bool:
    """Whether to compute the weight of every item, and to multiply item by item.

    Adding B A to W takes r·in·out multiplications, the factorised product rows·r·(in + out). On a
    CPU one item's tensors fit into a core's cache, where the whole batch does not. Each call must
    be large enough, and no graph can be recorded of it.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    out, into = mix.raw.shape
    rows = x.numel() // into // mix.n
    large = rows * into * out >= _WORTH_A_CALL * torch.get_num_threads()
    return large and rows * (into + out) >= into * out and adds_exactly(x, mix.raw)


def _item_by_item(out: Tensor, x: Tensor, mix: Mix, bias: Tensor | None) -> None:
    """x (W + B A)ᵀ + b item by item, into `out`, with the memory of one weight."""
    weight = torch.empty_like(mix.raw)
    for y, item, A, B in zip(out, x, *mix.factors(), strict=True):
        torch.addmm(mix.raw, B, A, out=weight)
        if bias is None:
            torch.mm(item, weight.t(), out=y)
        else:
            torch.addmm(bias, item, weight.t(), out=y)


def _items_first(x: Tensor, mix: Mix, bias: Tensor | None) -> Tensor:
    """Write the items' part and the bias first, as one product, and add x Wᵀ to it.

    ``F.linear`` would write the bias, add its product to it, and the items' part would be a third
    pass through an output that is larger than any cache.
    """
    lora_A, lora_B = mix.factors()
    low = torch.bmm(x, lora_A.mT)
    if bias is not None:
        low = F.pad(low, (0, 1), value=1.0)
        lora_B = torch.cat([lora_B, bias.expand(mix.n, -1)[..., None]], 2)
    out = torch.bmm(low, lora_B.mT).flatten(0, 1)
    out.addmm_(x.flatten(0, 1).to(out.dtype), mix.raw.t().to(out.dtype))  # autocast: they differ
    return out


def _flattens(items: Tensor) -> bool:
    """Whether all dimensions but the first and the last can be seen as one, without a copy."""
    kept = [
        (size, step)
        for size, step in zip(items.shape[1:-1], items.stride()[1:-1], strict=True)
        if size != 1
    ]
    return all(a[1] == b[0] * b[1] for a, b in pairwise(kept))


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
    n, layout = where(input, weight, bias)
    options = (stride, padding, dilation)
    mix = mix_of(weight)
    if mix is None:
        out = op(input, weight, None, *options, groups)
        return affine(out, None, values(bias), n, layout, 1 - out.dim())
    # Grouped convolutions have no product of rank r: each entry gets its whole weight.
    whole = mix.full is not None or groups > 1
    late = whole or mix.scale is not None or mix_of(bias) is not None
    if whole:
        out = _own_conv(op, input, layout.each(mix.value(), len(input)), options, groups)
    else:
        shared = _shared(mix, input)
        weight = mix.raw if shared is None else shared
        out = op(input, weight, None if late else bias, *options, groups)
        if shared is None:
            _add_conv(op, out, input, mix, layout, options)
    scale = None if whole else mix.scale
    return affine(out, scale, values(bias), n, layout, 1 - out.dim()) if late else out


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
    lora_A, lora_B = (layout.each(factor, len(x)) for factor in mix.factors())
    lora_A = lora_A.view(*lora_A.shape[:2], *mix.raw.shape[1:])
    low = _own_conv(op, x, lora_A, options, groups=1).flatten(2).to(out.dtype)
    out.flatten(2).baddbmm_(lora_B.to(out.dtype), low)
