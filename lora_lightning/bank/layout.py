"""`Layout`: the dimension of a tensor that holds the items of a batch.

It is not always the first: Swin folds windows into the batch, (n·windows, w², C), a Conformer has
time first, (T, n, C), attention flattens, (T·n, C). `Layout` gives the views in which a product per
item is one batched product.

Shapes: n items; a tensor's dimension of items has k·n entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lightning.errors import AdapterError


@dataclass(frozen=True)
class Layout:
    """Items lie along dimension `dim`, whose entry e belongs to item e // k, or e % n if `minor`.

    `minor` is ``None`` where k was 1 in all runs: then the order is still unknown.
    """

    dim: int
    minor: bool | None = False

    @property
    def place(self) -> int:
        """The items' own dimension in `split`'s result."""
        return self.dim + 1 if self.minor else self.dim

    def fits(self, x: Tensor, n: int) -> bool:
        """Whether `x` can be n items laid out like this."""
        size = x.shape[self.dim]
        return size == n or (size % n == 0 and self.minor is not None)

    def split(self, x: Tensor, n: int) -> Tensor:
        """A view of `x` in which the items have a dimension of their own."""
        k = x.shape[self.dim] // n
        sizes = (k, n) if self.minor else (n, k)
        split: Tensor = x.unflatten(self.dim, sizes)  # type: ignore[no-untyped-call]
        return split

    def join(self, x: Tensor) -> Tensor:
        """Undo `split`."""
        return x.flatten(self.dim, self.dim + 1)

    def items(self, x: Tensor, n: int) -> Tensor:
        """`x` with the items first: (n, …), a view."""
        return self.split(x, n).movedim(self.place, 0)

    def back(self, items: Tensor) -> Tensor:
        """Undo `items`."""
        return self.join(items.movedim(0, self.place))

    def spread(self, values: Tensor, like: Tensor, at: int) -> Tensor:
        """Values (n, …) in the shape in which they broadcast against ``split(like)``.

        `at` is the dimension, counted from the end, where a value's own dimensions begin.
        """
        shape = [1] * (like.dim() + 1)
        shape[self.place] = len(values)
        own = values.shape[1:]
        shape[len(shape) + at : len(shape) + at + len(own)] = own
        return values.view(shape)

    def each(self, values: Tensor, size: int) -> Tensor:
        """Values (n, …) once for each of `size` entries along the items' dimension."""
        k = size // len(values)
        if k == 1:
            return values
        if len(values) == 1:
            return values.expand(size, *values.shape[1:])
        if self.minor:
            return values.repeat(k, *[1] * (values.dim() - 1))
        return values.repeat_interleave(k, 0)

    def select(self, x: Tensor, chosen: Tensor, n: int) -> Tensor:
        """The part of `x` that belongs to the items `chosen`, laid out as `x` is."""
        return self.join(self.split(x, n).index_select(self.place, chosen))

    def gather(self, parts: list[tuple[Tensor, Tensor]], n: int) -> Tensor:
        """Undo `select`: one tensor from (chosen items, their part) for all n items.

        Raises:
            AdapterError: the parts differ in another dimension than that of the items.
        """
        split = [(chosen, self.split(part, len(chosen))) for chosen, part in parts]
        shapes = {s.movedim(self.place, 0).shape[1:] for _, s in split}
        if len(shapes) > 1:
            raise AdapterError(
                "a module that runs once for every adapter of the batch gives results of different "
                f"sizes, {' and '.join(str(tuple(s)) for s in sorted(shapes)[:2])} an item, which "
                "cannot be put together: give such items batches of their own"
            )
        shape = list(split[0][1].shape)
        shape[self.place] = n
        whole = split[0][1].new_empty(shape)
        for chosen, part in split:
            whole.index_copy_(self.place, chosen.to(whole.device), part)
        return self.join(whole)


UNSHOWN = "in an order that does not show"

WHOLE = Layout(0)  # of n = 1: everything belongs to the one item


@dataclass
class Seen:
    """The shape of one tensor in one run, and a fingerprint of each of its dimensions.

    A fingerprint has one number for each entry of the dimension, which changes when anything
    at that entry does. `whole` is that of the whole tensor.
    """

    shape: tuple[int, ...]
    prints: dict[int, Tensor]
    whole: Tensor

    @classmethod
    def of(cls, x: Tensor, n: int) -> Seen:
        """The fingerprints of `x` in a run with n items."""
        with torch.no_grad():
            dims = [d for d, size in enumerate(x.shape) if size and size % n == 0]
            whole = _prints(x.reshape(1, -1), 0)
            return cls(tuple(x.shape), {d: _prints(x, d) for d in dims}, whole)


def _prints(x: Tensor, dim: int) -> Tensor:
    values = torch.view_as_real(x) if x.is_complex() else x
    rows = values.movedim(dim, 0).reshape(values.shape[dim], -1).double()
    rows = torch.nan_to_num(rows, nan=1.5, posinf=2.5, neginf=-2.5)
    steps = torch.arange(rows.shape[1], dtype=rows.dtype, device=rows.device)
    return rows @ (steps + 1).square().cos()


def locate(
    base: Seen,
    more: Seen,
    moved: dict[int, Seen],
    n: int,
    others: Sequence[tuple[Seen, Seen]] = (),
) -> Layout | str | None:
    """The layout of a tensor from four runs; or a text why there is none; ``None``: no items in it.

    Args:
        base: Seen in a run with n items.
        more: In a run with one item more.
        moved: Item → seen in a run in which this item alone has changed.
        n: Number of items.
        others: Seen with other lengths and masks, and then with the first item changed.
    """
    if any(seen.shape != base.shape for seen in moved.values()):
        return f"the shape {base.shape} depends on what is in the items"
    grown = _grown(base.shape, more.shape, n)
    if isinstance(grown, str):
        return grown
    if any(seen.shape != base.shape for pair in others for seen in pair):
        return f"the shape {base.shape} depends on lengths or masks"
    if not grown:
        runs = [more, *moved.values(), *(seen for pair in others for seen in pair)]
        same = all(torch.equal(base.whole, seen.whole) for seen in runs)
        return None if same else f"no dimension of {base.shape} grows with the number of items"
    found = _order(base, moved, grown[0], n)
    if isinstance(found, str):
        return found
    for plain, first in others:
        fitting = _fitting(plain, {0: first}, found.dim, n)
        if not fitting or found.minor not in (None, *fitting):
            return "the order of the items depends on lengths or masks"
    return found


def _grown(one: tuple[int, ...], more: tuple[int, ...], n: int) -> list[int] | str:
    if len(one) != len(more):
        return f"the shape {one} becomes {more} with one item more"
    grown = [d for d, (a, b) in enumerate(zip(one, more, strict=True)) if a != b]
    if len(grown) > 1 or any(one[d] * (n + 1) != more[d] * n for d in grown):
        return f"the shape {one} with {n} items becomes {more} with {n + 1}"
    return grown


def _order(base: Seen, moved: dict[int, Seen], dim: int, n: int) -> Layout | str:
    fitting = _fitting(base, moved, dim, n)
    if not fitting:
        return "another item's values change with an item's: the items of the batch interact"
    if base.shape[dim] == n:
        return Layout(dim, None)
    if len(fitting) == 2:
        return (
            f"dimension {dim} of {base.shape} holds the items, {UNSHOWN} (call bank.probe(batch) "
            "with items that differ)"
        )
    return Layout(dim, fitting[0])


def _fitting(base: Seen, moved: dict[int, Seen], dim: int, n: int) -> list[bool]:
    """The values of `Layout.minor` for which only an item's own entries changed with it."""
    size = base.shape[dim]
    entry = torch.arange(size, device="cpu")
    owners = {False: entry // (size // n), True: entry % n}
    changed = {i: (base.prints[dim] != seen.prints[dim]).cpu() for i, seen in moved.items()}
    return [
        minor
        for minor, owner in owners.items()
        if all(bool((owner[c] == i).all()) for i, c in changed.items())
    ]
