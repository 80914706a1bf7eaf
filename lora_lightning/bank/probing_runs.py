"""The runs of a model for `probe`, from which the items' layouts are inferred."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lora_lightning.bank.batch import Batch
from lora_lightning.bank.calls import (
    Kind,
    check_lists,
    items_of,
    kind_of,
    lengths_of,
    owned,
    variants,
)
from lora_lightning.bank.probe import Places
from lora_lightning.bank.watch import Watch, run
from lora_lightning.errors import AdapterError
from lora_lightning.lora.module_tree import find
from lora_lightning.model.calling import Call


class Looks:
    """The `Places` of a model, by kind of call; `last` is that of the last call."""

    def __init__(self, dim: int):
        self.last = Places()
        self._dim = dim
        # With the only lengths and masks for which it holds; None: for all.
        self._known: dict[Kind, tuple[list[Any] | None, Places]] = {}

    def arrange(self, batch: Batch, call: Call, n: int, again: bool = False) -> None:
        """Give the batch the places of such calls; probe where they are unknown, or `again`."""
        kind = kind_of(call, n, self._dim)
        lengths, places = self._known.get(kind, (None, Places()))
        if lengths is not None and lengths != lengths_of(call, n, self._dim):
            places = Places()
        self.last = places
        batch.arrange(places)
        new = [path for path in batch.paths if again or path not in places.known]
        if new:
            check_lists(call, n)
            any_lengths = look(batch, call, self._dim, new)
            lengths = None if any_lengths else lengths_of(call, n, self._dim)
            self._known[kind] = lengths, places
            batch.swap()

    def describe(self) -> dict[str, str]:
        """Tensor's path → how the items of a batch get their own, as text."""
        found: dict[str, str] = {}
        for _, places in self._known.values():
            found |= places.describe()
        return found


def look(batch: Batch, call: Call, dim: int, paths: list[str]) -> bool:
    """Infer the layouts of this call's items at the tensors `paths`, into the batch's `places`.

    Returns whether that holds for other lengths and masks than the call's, if it has any.

    Raises:
        AdapterError: the model does not run with one item repeated.
    """
    calls = variants(call, items_of(call, dim), dim)
    runs = _runs(batch, calls, {})
    failed = batch.places.learn(runs, paths)
    if failed:
        batch.places.group(_runs(batch, calls, _around(batch.model, failed)), failed)
    return len(calls) == 4 or len(runs) > 4


def _around(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Every module around these tensors, the model itself included."""
    found = {"": model}
    for path in paths:
        parts = path.split(".")[:-1]
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            found[name] = find(model, name)
    return found


def _runs(
    batch: Batch, calls: list[tuple[Call, int]], around: Mapping[str, nn.Module]
) -> list[Watch]:
    watches = [_run(batch, call, n, around) for call, n in calls[:4]]
    for pair in (calls[4:6], calls[6:]):
        try:
            watches += [_run(batch, call, n, around) for call, n in pair]
        except AdapterError:  # not every model takes these lengths: some require descending ones
            continue
    return watches


def _run(batch: Batch, call: Call, n: int, around: Mapping[str, nn.Module]) -> Watch:
    watch = Watch(n)
    with batch.watched(watch), watch.crossings(around):
        try:
            run(batch.model, owned(call))
        except (RuntimeError, ValueError, LookupError, AssertionError) as error:
            raise AdapterError(
                f"the model does not run with {n} items while the bank looks where items "
                f"lie ({error}). Is an input with {n} entries not one for each item? Pass "
                "example= (or bank.probe) a batch with another number of items"
            ) from error
    return watch
