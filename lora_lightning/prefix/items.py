"""One value of a call: where its items are, taken apart, put together, compared.

A value holds B·k along one dimension, k for each of B items of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import ConfigError
from lora_lightning.prefix.calls import Call, Leaf
from lora_lightning.prefix.inputs import Inputs
from lora_lightning.probe import difference


def varies(leaf: Leaf) -> bool:
    """Whether a value has items; else all batches of one shape share it."""
    return leaf.dim is not None


def held(leaf: Leaf, value: Any) -> Any:
    """What is held of a value while a forward goes on: of one that is not kept, its shape."""
    if not isinstance(value, Tensor):
        return value
    # A copy of what is kept: what comes next may write into it. Of the rest, no more than a shape.
    return value.clone() if leaf.kept or leaf.dim is None else outline(leaf, value)


def outline(leaf: Leaf, value: Any) -> Any:
    """A value without its items: shape, precision and device in no memory."""
    return value if leaf.dim is None else value.new_empty(()).expand(value.shape)


def alike(leaf: Leaf, one: Any, other: Any) -> bool:
    """Whether outlines from two batches agree."""
    if leaf.dim is None:
        return same(one, other)
    shapes = [(*x.shape[: leaf.dim], *x.shape[leaf.dim + 1 :]) for x in (one, other)]
    return shapes[0] == shapes[1] and one.dtype == other.dtype


def part(leaf: Leaf, value: Tensor, item: int) -> Tensor:
    """What belongs to one item, contiguous in the order of memory that the value has."""
    assert leaf.dim is not None
    rows = value.narrow(leaf.dim, item * leaf.per_item, leaf.per_item)
    return rows.permute(leaf.order).contiguous()


def join(leaf: Leaf, parts: list[Tensor]) -> Tensor:
    """Parts of items to a batch, in the order of memory that the call itself gave."""
    assert leaf.dim is not None
    if len({part.device for part in parts}) > 1:
        parts = [part.cpu() for part in parts]
    whole = torch.cat(parts, leaf.order.index(leaf.dim))
    return whole.permute(sorted(range(whole.ndim), key=leaf.order.__getitem__))


def locate(call: Call, leaf: Leaf, one: Any, more: Any, size: int) -> None:
    """Which dimension of a value grows with the batch, from batches of `size` and one more."""
    if not isinstance(one, Tensor):
        if type(one) is not type(more) or one != more:
            raise ConfigError(
                f"PrefixCache: {call.path} gives {type(one).__name__} beside tensors, which "
                "changes with the size of the batch and cannot be stored by item"
            )
        return
    growing = [i for i, (a, b) in enumerate(zip(one.shape, more.shape, strict=True)) if a != b]
    if not growing:
        return
    dim = growing[0]
    per_item, rest = divmod(one.shape[dim], size)
    if len(growing) > 1 or rest or more.shape[dim] != per_item * (size + 1):
        raise ConfigError(
            f"PrefixCache: {call.path} gives a tensor of shape {tuple(one.shape)} for {size} items "
            f"and {tuple(more.shape)} for {size + 1}: there is no telling which part is whose"
        )
    leaf.dim, leaf.per_item = dim, per_item
    strides = one.stride()
    leaf.order = tuple(sorted(range(one.ndim), key=lambda i: (-strides[i], i)))


def first(leaf: Leaf, value: Any, size: int) -> Any:
    """What belongs to the first `size` items."""
    return value if leaf.dim is None else value.narrow(leaf.dim, 0, size * leaf.per_item)


def same(a: Any, b: Any) -> bool:
    """Whether two values are the same, but for rounding: half the digits must agree."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    if not a.is_floating_point():
        return False
    limit: float = torch.finfo(a.dtype).eps ** 0.5
    return difference([a.double()], [b.double()]) <= limit


@contextmanager
def aside(inputs: Inputs, seed: int | None) -> Iterator[None]:
    """Random numbers drawn within the block leave the generators as they are."""
    devices = {x.device for x in inputs.leaves if isinstance(x, Tensor) and x.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        if seed is not None:
            torch.manual_seed(seed)
        yield
