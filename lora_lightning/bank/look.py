"""Running a model four times, or eight, to find where a batch's items lie (see `probe`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from lora_lightning.bank.batch import Batch
from lora_lightning.bank.watch import Call, Watch, four_calls, items_of, run
from lora_lightning.errors import AdapterError


def look(batch: Batch, call: Call, dim: int, paths: list[str]) -> None:
    """Enter in the batch's `places` where the tensors `paths` meet the items of this call.

    Raises:
        AdapterError: the model does not run with one item repeated.
    """
    failed = batch.places.learn(_runs(batch, call, dim, {}), paths)
    if failed:
        batch.places.group(_runs(batch, call, dim, _around(batch.model, failed)), failed)


def _around(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Every module around these tensors, the model itself included."""
    found = {"": model}
    for path in paths:
        parts = path.split(".")[:-1]
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            found[name] = model.get_submodule(name)
    return found


def _runs(batch: Batch, call: Call, dim: int, around: Mapping[str, nn.Module]) -> list[Watch]:
    watches, n = [], items_of(call, dim)
    for each, items in four_calls(call, n, dim):
        watch = Watch(items)
        with batch.watched(watch), watch.crossings(around):
            try:
                run(batch.model, each)
            except (RuntimeError, ValueError, IndexError, AssertionError) as error:
                raise AdapterError(
                    f"the model does not run with {items} items while the bank looks where items "
                    f"lie ({error}). Is an input with {n} entries not one for each item? Pass "
                    "example= (or bank.probe) a batch with another number of items"
                ) from error
        watches.append(watch)
    return watches
