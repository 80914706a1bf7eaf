"""One value of a call: where its items are, taken apart, put together, compared.

A value holds B·k along one dimension, k for each of B items of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import ConfigError
from lora_lightning.model.probing import difference
from lora_lightning.training.prefix_cache.calls import Call, Leaf


def sort(value: Any) -> Any:
    """What a value is, as far as it decides how it is stored."""
    return value.is_floating_point() if isinstance(value, Tensor) else type(value)


def varies(leaf: Leaf) -> bool:
    """Whether a value has items; else all batches of one shape share it."""
    return leaf.dim is not None


def held(leaf: Leaf, value: Any) -> Any:
    """What is held of a value while a forward goes on: of one that is not kept, its shape."""
    if not isinstance(value, Tensor):
        return value
    # A copy of what is kept: what comes next may write into it.
    return value.clone() if leaf.kept else _shape(value, list(value.shape))


def outline(call: Call, leaf: Leaf, value: Any, size: int) -> Any:
    """What batches of one shape share: a shape for one item, or a value that has no items."""
    if not isinstance(value, Tensor) or leaf.dim is None:
        return value
    shape = list(value.shape)
    if value.ndim != len(leaf.order) or shape[leaf.dim] % size:
        raise ConfigError(
            f"PrefixCache: {call.path} gives a tensor of shape {tuple(shape)} for {size} items, "
            "and gave one that could be taken apart by item before. Leave PrefixCache out"
        )
    shape[leaf.dim] //= size
    return _shape(value, shape)


def _shape(value: Tensor, shape: list[int]) -> Tensor:
    """Shape, precision and device in no memory."""
    return value.new_empty(()).expand(shape)


def alike(leaf: Leaf, one: Any, other: Any) -> bool:
    """Whether outlines from two batches agree."""
    if isinstance(one, Tensor) and isinstance(other, Tensor) and (varies(leaf) or not leaf.kept):
        return one.shape == other.shape and one.dtype == other.dtype
    return same(one, other, nan=True)


def part(leaf: Leaf, value: Tensor, item: int, size: int) -> Tensor:
    """What belongs to one of `size` items, contiguous in the order of memory of the value."""
    assert leaf.dim is not None
    per_item = value.shape[leaf.dim] // size
    rows = value.narrow(leaf.dim, item * per_item, per_item)
    return rows.permute(leaf.order).contiguous()


def join(leaf: Leaf, parts: list[Tensor]) -> Tensor:
    """Parts of items to a batch, in the order of memory that the call itself gave."""
    assert leaf.dim is not None
    if len({part.device for part in parts}) > 1:
        parts = [part.cpu() for part in parts]
    whole = torch.cat(parts, leaf.order.index(leaf.dim))
    return whole.permute(sorted(range(whole.ndim), key=leaf.order.__getitem__))


def same(a: Any, b: Any, nan: bool = False) -> bool:
    """Whether two values are the same, but for rounding: half the digits must agree.

    With `nan` what is no number in both is the same as well.
    """
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    if not a.is_floating_point():
        return False
    if nan and torch.equal(a.isnan(), b.isnan()):
        a, b = a.nan_to_num(0.0, torch.inf, -torch.inf), b.nan_to_num(0.0, torch.inf, -torch.inf)
    limit: float = torch.finfo(a.dtype).eps ** 0.5
    return difference([a.double()], [b.double()]) <= limit
