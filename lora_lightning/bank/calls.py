"""Calls of a model: their number of items, their kind, and variants of them for a probe.

The runs that are compared (see `lora_lightning.bank.probe`) are variants of the caller's own call.
Each runs on tensors and containers of its own: a model may write into its inputs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lora_lightning.errors import AdapterError
from lora_lightning.model.calling import Call

Kind = tuple[Any, ...]


def items_of(call: Call, dim: int) -> int:
    """The number of items of a call of the model, by its first input."""
    for leaf in tree_leaves(call):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[dim if leaf.dim() > dim else 0]
    raise AdapterError("the model is called with no tensor that could hold a batch of items")


def check_lists(call: Call, n: int) -> None:
    """Refuse n tensors of n entries each: n items, or one item in each of n tensors?"""
    args, kwargs = call
    first = next(iter((*args, *kwargs.values())), None)
    if isinstance(first, (list, tuple)) and len(first) == n and isinstance(first[0], Tensor):
        raise AdapterError(
            f"the first input is a list of {n} tensors for {n} names: a bank cannot tell whether "
            "each tensor is one item or holds all of them. Pad the items into one tensor"
        )


def item_dim(x: Any, n: int, dim: int) -> int | None:
    """The dimension of an input that holds the items: `dim`, else the first that fits."""
    if not isinstance(x, Tensor):
        return None
    dims = [dim, *range(x.dim())]
    return next((d for d in dims if d < x.dim() and x.shape[d] == n), None)


def kind_of(call: Call, n: int, dim: int) -> Kind:
    """The kind of a call; calls of one kind are assumed to have the same layouts.

    The inputs, their numbers of dimensions, and which of these have only one entry: a dimension of
    one entry hides where it is folded, (n, 1, W) → (1·n·W). So does a mask left out.
    """

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf if isinstance(leaf, (bool, str)) else type(leaf)
        own = item_dim(leaf, n, dim)
        return tuple(size == 1 for d, size in enumerate(leaf.shape) if d != own), own is None

    return (*call[1], *[of(leaf) for leaf in tree_leaves(call)])


def lengths_of(call: Call, n: int, dim: int) -> list[Any]:
    """The values of all lengths and masks."""
    return [leaf.tolist() for leaf in tree_leaves(call) if _tells_length(leaf, n, dim)]


def variants(call: Call, n: int, dim: int) -> list[tuple[Call, int]]:
    """The call as it is, with its last item repeated, with the first and the last changed.

    Where it has lengths or masks, then twice with others, each as it is and with the first item
    changed.
    """

    def more(x: Any) -> Any:
        d = item_dim(x, n, dim)
        return x if d is None else torch.cat([x, x.narrow(d, n - 1, 1)], d)

    found = [
        (call, n),
        (tree_map(more, call), n + 1),
        (_moved(call, 0, n, dim), n),
        (_moved(call, n - 1, n, dim), n),
    ]
    if any(_tells_length(leaf, n, dim) for leaf in tree_leaves(call)):
        for item in (0, n - 1):  # in whichever order a model sorts by length, one of them moves
            other = _shortened(call, item, n, dim)
            found += [(other, n), (_moved(other, 0, n, dim), n)]
    return found


def owned(call: Call) -> Call:
    """The call with tensors and containers of its own."""
    return tree_map(_copied, call)  # type: ignore[no-any-return]


def _copied(x: Any) -> Any:
    """The caller's tensors and caches stay as they are."""
    if isinstance(x, Tensor):
        return x.clone()
    try:
        return x if isinstance(x, nn.Module) else copy.deepcopy(x)
    except Exception:  # a lock, a generator: not a container of items
        return x


def _moved(call: Call, item: int, n: int, dim: int) -> Call:
    """The call with other values in one item, where those stay valid."""
    generator = torch.Generator().manual_seed(item)

    def move(x: Any) -> Any:
        d = item_dim(x, n, dim)
        if d is None or x.dim() < 2 or x.dtype == torch.bool:
            return x  # lengths, masks
        x = x.clone()
        one = x.select(d, item)
        if x.is_floating_point() or x.is_complex():
            like = {"dtype": one.dtype, "device": "cpu"}
            noise = torch.randn(one.shape, generator=generator, **like).to(one.device)
            one += noise * (one.std(correction=0) + 1e-2)
        else:  # tokens: the same ones in another order
            one.copy_(one.flatten().roll(1).view(one.shape))
        return x

    return tree_map(move, call)  # type: ignore[no-any-return]


# ---- lengths and masks -----------------------------------------------------------------------


def _tells_length(x: Any, n: int, dim: int) -> bool:
    """Whether this input may be the items' lengths (one number an item), or a mask."""
    if item_dim(x, n, dim) is None or x.is_complex():
        return False
    if x.numel() == n or x.dtype == torch.bool:
        return True
    return not x.is_floating_point() and bool(((x == 0) | (x == 1)).all())


def _shortened(call: Call, item: int, n: int, dim: int) -> Call:
    """The call with a shorter item, and with the item at the other end as long as the longest."""

    def shorten(x: Any) -> Any:
        if not _tells_length(x, n, dim):
            return x
        x, d = x.clone(), item_dim(x, n, dim)
        one = x.select(d, item)
        if x.numel() > n or x.dtype == torch.bool:
            _mask_more(one)
            return x
        x.select(d, n - 1 - item).fill_(x.max())  # lengths: none above the largest
        one.copy_(torch.where(one > 1, one // 2, one) if not x.is_floating_point() else one / 2)
        return x

    return tree_map(shorten, call)  # type: ignore[no-any-return]


def _mask_more(mask: Tensor) -> None:
    """Set the second half to the other value; or, where it has that, to the first half's."""
    if not mask.dim():
        mask.copy_(mask == 0)
        return
    tail = mask[..., mask.shape[-1] // 2 :]
    head = mask[..., :1].clone()
    other = (head == 0).to(mask.dtype).expand_as(tail)
    tail.copy_(head.expand_as(tail) if torch.equal(tail, other) else other)
