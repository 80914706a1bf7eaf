"""The arguments of one call of a model, item by item: what a stored feature is found by.

An item's key is a hash of its own bytes in every argument, and of all that the items of a batch
share: shapes (so the length to which a recording was padded), precision, autocast, and arguments
that are no batch. So the order and company of items may change from epoch to epoch, and an item
that was augmented is another item.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

_FEW = 2  # items are enough to check a model with
_CONSTANTS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


class Inputs:
    """Positional and keyword arguments of one call.

    Attributes:
        size: B, the items: the first dimension of the first tensor. A tensor whose first
            dimension is B too holds a row for each item, any other tensor is shared.
        batched: which leaves hold a row for each item.
        listed: Whether a list of B numbers or strings is among them: one for each item?
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.leaves, self.spec = tree_flatten((args, kwargs))
        first = next((x for x in self.leaves if isinstance(x, Tensor) and x.ndim), None)
        self.size = 0 if first is None else len(first)
        self.batched = [i for i, x in enumerate(self.leaves) if self._is_batched(x)]
        self.listed = any(_listed(x, self.size) for x in (*args, *kwargs.values()))

    def _is_batched(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == self.size

    @property
    def usable(self) -> bool:
        """Whether every argument can be hashed, and none wants a gradient."""
        return self.size > 0 and not self.listed and all(map(_usable, self.leaves))

    @property
    def obstacle(self) -> str:
        """Why arguments are not usable; "" where they are, or where one wants a gradient."""
        if self.listed:
            return (
                f"an argument is a list of {self.size} values for {self.size} items, whose parts "
                "may belong to one item each; give a tensor"
            )
        for leaf in self.leaves:
            if not isinstance(leaf, (Tensor, *_CONSTANTS)):
                return f"an argument holds a {type(leaf).__name__}, of which no hash can be taken"
            if isinstance(leaf, Tensor) and leaf.layout is not torch.strided:
                return f"an argument is a tensor of layout {leaf.layout}"
        return "" if self.size else "no argument is a tensor with a row for each item"

    @property
    def separable(self) -> bool:
        """Whether rows can be taken out: not where a second argument may tell their lengths."""
        return len(self.batched) == 1

    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs)."""
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        return args, kwargs

    def kind(self) -> Hashable:
        """What the path through a model may depend on: structure and constants, no sizes."""
        return str(self.spec), tuple(
            (x.dtype, x.ndim, i in self.batched) if isinstance(x, Tensor) else (type(x), x)
            for i, x in enumerate(self.leaves)
        )

    def places(self) -> dict[Hashable, bool]:
        """Whether a tensor at this place among the arguments holds a row for each item."""
        spec = str(self.spec)
        return {
            (spec, i): i in self.batched
            for i, x in enumerate(self.leaves)
            if isinstance(x, Tensor) and x.ndim
        }

    def rows(self, index: list[int]) -> Inputs:
        """These items alone, in this order; an index may come twice."""
        leaves = list(self.leaves)
        for i in self.batched:
            leaves[i] = leaves[i][index]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return Inputs(args, kwargs)

    def few(self) -> Inputs:
        """A copy of two items, where rows can be taken out."""
        some = self.rows(list(range(_FEW))) if self.separable and self.size > _FEW else self
        leaves = [x.detach().clone() if isinstance(x, Tensor) else x for x in some.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return Inputs(args, kwargs)

    def reversed(self) -> Inputs:
        """Another batch of the same shapes: the largest argument back to front."""
        i = max(self.batched, key=lambda i: self.leaves[i].numel())
        leaves = list(self.leaves)
        leaves[i] = leaves[i].flip(tuple(range(leaves[i].ndim)))
        args, kwargs = tree_unflatten(leaves, self.spec)
        return Inputs(args, kwargs)

    def shared(self) -> bytes:
        """A hash of what all items of the batch have in common."""
        found = hashlib.sha1(repr((self.spec, autocast())).encode(), usedforsecurity=False)
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor):
                shape = tuple(leaf.shape[1:]) if i in self.batched else tuple(leaf.shape)
                found.update(repr((shape, leaf.dtype, str(leaf.device))).encode())
                if i not in self.batched:
                    found.update(_bytes(leaf[None])[0])
            else:
                found.update(repr(leaf).encode())
        return found.digest()

    def keys(self, shared: bytes) -> list[bytes]:
        """A key for each item."""
        found = [hashlib.sha1(shared, usedforsecurity=False) for _ in range(self.size)]
        for i in self.batched:
            for key, row in zip(found, _bytes(self.leaves[i]), strict=True):
                key.update(row)
        return [key.digest() for key in found]


def _usable(leaf: Any) -> bool:
    if not isinstance(leaf, Tensor):
        return isinstance(leaf, _CONSTANTS)
    wants_gradient = leaf.requires_grad and torch.is_grad_enabled()
    return leaf.layout is torch.strided and leaf.numel() > 0 and not wants_gradient


def _listed(value: Any, size: int) -> bool:
    """Whether a list of `size` numbers or strings is somewhere in an argument."""
    if isinstance(value, dict):
        return any(_listed(x, size) for x in value.values())
    if not isinstance(value, (list, tuple)):
        return False
    plain = all(isinstance(x, (int, float, str)) for x in value)
    return len(value) == size if plain else any(_listed(x, size) for x in value)


def _bytes(tensor: Tensor) -> Any:
    """(B, bytes of a row) as a NumPy array."""
    rows = tensor.detach().cpu().reshape(len(tensor), -1).contiguous()
    return rows.resolve_conj().resolve_neg().view(torch.uint8).numpy()


def autocast() -> tuple[Any, ...]:
    """The precision of autocast on each kind of device; None where it is off."""
    kinds = ("cpu", "cuda")
    return tuple(
        torch.get_autocast_dtype(k) if torch.is_autocast_enabled(k) else None for k in kinds
    )
