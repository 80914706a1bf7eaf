"""Where the items are in what each call gives, and whether each item is on its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_lightning.errors import ConfigError
from lora_lightning.training.prefix_cache.calls import Call, Leaf
from lora_lightning.training.prefix_cache.inputs import Inputs
from lora_lightning.training.prefix_cache.items import same, sort
from lora_lightning.training.prefix_cache.replay import Prefix


def learn(prefix: Prefix, inputs: Inputs, known: bool) -> None:
    """Find where the items are in each value, or check that they are where they were (`known`).

    Raises:
        ConfigError: results are random, or an item's depend on others or on its place.
    """
    size = inputs.size
    index, key = list(range(size)), inputs.keys(inputs.shared())
    once = prefix.trial(inputs, seed=1)
    if inputs.keys(inputs.shared()) != key:
        raise ConfigError(
            f"PrefixCache: {type(prefix.root).__name__} writes into its input before "
            f"{prefix.calls[-1].path} is over, and the cache needs it as it was. Write into a copy"
        )
    again = prefix.trial(inputs, seed=2)
    more = prefix.trial(inputs.rows([*index, size - 1]), seed=1)
    # Where other arguments tell lengths, these may have to fall: the order of items stays.
    turn, back = (
        (index[::-1], index[::-1]) if inputs.separable else ([0, *index], [*range(1, size + 1)])
    )
    turned = prefix.trial(inputs.rows(turn), seed=1)
    for call, *rows in zip(prefix.calls, once, again, more, turned, strict=True):
        for leaf, x, y, z, t in zip(call.leaves, *rows, strict=True):
            _place(call, leaf, x, z, size, known)
            if not leaf.kept:
                continue  # only its shape is ever used
            if not same(x, y, nan=True):
                raise ConfigError(
                    f"PrefixCache: {call.path} gives other features each time for the same "
                    "batch, so that they cannot be stored. Switch off what is random in it"
                )
            one, other = _items(leaf, z, index, x), _items(leaf, t, back, x)
            if not same(one, x, nan=True) or not same(other, x, nan=True):
                raise ConfigError(
                    f"PrefixCache: what {call.path} gives for an item depends on the other "
                    "items of its batch (batch statistics, or a batch dimension that is not "
                    "the first), so that it cannot be stored. Leave PrefixCache out"
                )


def _place(call: Call, leaf: Leaf, one: Any, more: Any, size: int, known: bool) -> None:
    dim = _growing(call, one, more, size)
    if known and (dim, sort(one)) != (leaf.dim, leaf.sort):
        raise ConfigError(
            f"PrefixCache: with these arguments {call.path} gives something else than with those "
            "of the first batch"
        )
    leaf.dim = dim
    if isinstance(one, Tensor):
        strides = one.stride()
        leaf.order = tuple(sorted(range(one.ndim), key=lambda i: (-strides[i], i)))


def _growing(call: Call, one: Any, more: Any, size: int) -> int | None:
    """Which dimension of a value grows with the batch, from batches of `size` and one more."""
    if not isinstance(one, Tensor) or not isinstance(more, Tensor):
        if not _equal(one, more):
            raise ConfigError(
                f"PrefixCache: {call.path} gives {type(one).__name__} beside tensors, which "
                "changes with the size of the batch, or cannot be compared, so that it cannot be "
                "stored by item. Give tensors, in tuples, lists or dicts"
            )
        return None
    shapes = tuple(one.shape), tuple(more.shape)
    growing = [i for i, (a, b) in enumerate(zip(*shapes)) if a != b]  # noqa: B905
    if not growing and one.ndim == more.ndim:
        return None
    per_item, rest = divmod(shapes[0][growing[0]], size) if growing else (0, 1)
    whole = one.ndim == more.ndim and len(growing) == 1 and not rest
    if not whole or shapes[1][growing[0]] != per_item * (size + 1):
        raise ConfigError(
            f"PrefixCache: {call.path} gives a tensor of shape {shapes[0]} for {size} items "
            f"and {shapes[1]} for {size + 1}: there is no telling which part is whose"
        )
    return growing[0]


def _equal(one: Any, more: Any) -> bool:
    """Whether two values that are no tensors are equal; False where there is no telling."""
    try:
        return type(one) is type(more) and bool(one == more)
    except Exception:  # an object that holds tensors
        return False


def _items(leaf: Leaf, value: Any, index: list[int], like: Any) -> Any:
    """These items of a value, of which `like` has as many."""
    if leaf.dim is None:
        return value
    per_item = like.shape[leaf.dim] // len(index)
    rows = value.unflatten(leaf.dim, (-1, per_item))
    return rows[(slice(None),) * leaf.dim + (index,)].flatten(leaf.dim, leaf.dim + 1)
