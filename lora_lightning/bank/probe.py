"""Inference of the items' dimension in each tensor, from a few runs of a model.

Four runs of the same batch are compared: as it is, with one item twice, and with the first and the
last item changed. The dimension that grows in the second run holds the items; what changes in the
others shows the order, and whether items interact. So a square input (T = n) is unambiguous. With
lengths or masks among the inputs, four more runs have others of these.

Where a tensor is used in a way that has no product per item (a recurrent layer, a standardised
convolution), or in a computation shared by all items, the nearest module around it whose inputs
and outputs can be split by items is called once for every adapter of the batch, with its items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from lora_lightning.bank.layout import UNSHOWN, Layout, Seen, locate
from lora_lightning.bank.watch import Watch
from lora_lightning.errors import AdapterError

Signature = tuple[int | None, ...]


@dataclass(frozen=True)
class Crossable:
    """Layouts of a module's inputs and outputs, leaf by leaf; ``None``: without items."""

    inputs: tuple[Layout | None, ...]
    outputs: tuple[Layout | None, ...]


@dataclass
class Places:
    """Layouts of a batch's items at each tensor of a model, for calls of one kind."""

    # tensor's path → number of dimensions of the input → its layout
    layouts: dict[str, dict[int, Layout]] = field(default_factory=dict)
    # tensor's path → the module that runs in groups for it
    around: dict[str, str] = field(default_factory=dict)
    # that module → layouts of its inputs and outputs
    crossings: dict[str, dict[Signature, Crossable]] = field(default_factory=dict)
    # tensor's path → why neither is possible
    problems: dict[str, str] = field(default_factory=dict)
    # tensor's path → why the items cannot each have theirs there, in any batch
    firm: dict[str, str] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)  # the paths that need no further probe

    def learn(self, runs: list[Watch], paths: list[str]) -> dict[str, str]:
        """Learn from the runs; tensor's path → why the items cannot each have theirs there."""
        failed = {}
        for path in paths:
            own = self.layouts.setdefault(path, {})
            found = of_uses(runs, path, own)
            if isinstance(found, str) and UNSHOWN not in found:
                self.firm.setdefault(path, found)
            if path in self.firm:
                failed[path] = self.firm[path]
            elif not isinstance(found, str):
                own.update(found)
                self.problems.pop(path, None)
                self.around.pop(path, None)
            elif not own:  # else an earlier batch has shown it
                failed[path] = found
        self.known.update(paths)
        return failed

    def group(self, runs: list[Watch], failed: Mapping[str, str]) -> None:
        """Find a module to run in groups for each tensor in `failed`, from the runs."""
        for path, why in failed.items():
            found = around(path, runs)
            if found is None:
                self.problems[path] = why
                if path not in self.firm:  # the next batch may tell them apart
                    self.known.discard(path)
            else:
                module, crossings = found
                self.around[path] = module
                self.crossings.setdefault(module, {}).update(crossings)
                self.problems.pop(path, None)

    def describe(self) -> dict[str, str]:
        """Tensor's path → how the items of a batch get their own, as text."""
        words = {p: "; ".join(map(str, d.values())) for p, d in self.layouts.items() if d}
        words |= {p: f"in groups, by {m or 'the whole model'}" for p, m in self.around.items()}
        return words | {path: f"not at all: {why}" for path, why in self.problems.items()}


def of_uses(runs: list[Watch], path: str, known: Mapping[int, Layout]) -> dict[int, Layout] | str:
    """Number of dimensions of the input → layout of the items; or a text why there is none.

    `known` are layouts from earlier runs.
    """
    uses = [watch.uses[path] for watch in runs]
    if len({len(u) for u in uses}) > 1:
        return "how often it is used depends on what is in the items"
    found = dict(known)
    for same in zip(*uses, strict=True):
        seen = [use.seen for use in same if use.seen is not None]
        if len(seen) < len(same):
            return str(next(use.problem for use in same if use.seen is None))
        layout = _located(seen, runs[0].n)
        if not isinstance(layout, Layout):
            return layout or "its input is the same for all items"
        if layout.dim and same[0].items_first:
            return f"the items lie in dimension {layout.dim} of what it convolves or normalises"
        dims = len(seen[0].shape)
        agreed = agree(found.get(dims), layout)
        if agreed is None:
            return f"its inputs lie in more than one way: as {found[dims]} and as {layout}"
        found[dims] = agreed
    return found


def _located(seen: Sequence[Seen], n: int) -> Layout | str | None:
    base, more, first, last, *rest = seen
    others = [*zip(rest[::2], rest[1::2], strict=True)]
    return locate(base, more, {0: first, n - 1: last}, n, others)


def agree(one: Layout | None, other: Layout) -> Layout | None:
    """The layout consistent with both; ``None`` where they contradict each other."""
    if one is None or one == other:
        return other
    if one.dim != other.dim or None not in (one.minor, other.minor):
        return None
    return other if one.minor is None else one


def of_calls(runs: list[Watch], path: str) -> dict[Signature, Crossable] | None:
    """Layouts of a module's inputs and outputs, by numbers of dimensions; ``None``: unknown."""
    calls = [watch.calls[path] for watch in runs]
    found: dict[Signature, Crossable] = {}
    if len({len(c) for c in calls}) > 1:
        return None
    for same in zip(*calls, strict=True):
        inputs = _leaves([c.inputs for c in same], runs[0].n)
        outputs = _leaves([c.outputs for c in same], runs[0].n)
        if inputs is None or outputs is None or not any(inputs):
            return None
        tensors = [isinstance(seen, Seen) for seen in same[0].outputs]
        if not any(tensors) or tensors != [layout is not None for layout in outputs]:
            return None
        key = signature(same[0].inputs)
        if found.setdefault(key, Crossable(inputs, outputs)) != Crossable(inputs, outputs):
            return None
    return found


def signature(leaves: list[Any]) -> Signature:
    """The key of a call of a module: the number of dimensions of each leaf."""
    shapes = [getattr(leaf, "shape", None) for leaf in leaves]
    return tuple(None if shape is None else len(shape) for shape in shapes)


def _leaves(same: list[list[Any]], n: int) -> tuple[Layout | None, ...] | None:
    if len({signature(leaves) for leaves in same}) > 1:
        return None
    found: list[Layout | None] = []
    for leaf in zip(*same, strict=True):
        if isinstance(leaf[0], Seen):
            layout = _located(leaf, n)
        else:
            layout = None if _same_for_all(leaf) else "it may have something of each item"
        if isinstance(layout, str):
            return None
        found.append(layout)
    return tuple(found)


def _same_for_all(values: Sequence[Any]) -> bool:
    """Whether these are not tensors but one value that does not depend on items, as an option.

    A number that differs between the runs counts items; an unknown object may hold them.
    """
    first = values[0]
    plain = (str, bytes, bool, int, float, complex, slice, Enum, torch.dtype, torch.device)
    if first is not None and not callable(first) and not isinstance(first, (*plain, torch.Size)):
        return False
    return all(value == first for value in values)


def around(path: str, runs: list[Watch]) -> tuple[str, dict[Signature, Crossable]] | None:
    """The nearest module around every use of a tensor that can be called in groups of items."""
    uses = [use for watch in runs for use in watch.uses[path]]
    module = path.rpartition(".")[0]
    inside = frozenset.intersection(*(use.inside for use in uses)) if uses else frozenset()
    while True:
        if module in inside and (found := of_calls(runs, module)):
            return module, found
        if not module:
            return None
        module = module.rpartition(".")[0]


def explain(problems: Mapping[str, str]) -> AdapterError:
    """The error for tensors that cannot differ between the items of a batch."""
    lines = [f"  {path}: {why}" for path, why in list(problems.items())[:10]]
    more = f"\n  … and {len(problems) - 10} more" if len(problems) > 10 else ""
    return AdapterError(
        "these tensors are the adapters' own, and the items of one batch cannot each have theirs:\n"
        + "\n".join(lines)
        + more
        + "\nRun one adapter at a time (bank[name]), or leave these layers out of the adapters"
    )
