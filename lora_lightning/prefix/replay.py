"""`Prefix`: the frozen beginning of a model, computed alone, taken apart into items, replayed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lora_lightning.errors import ConfigError
from lora_lightning.prefix.calls import Call, InOrder, Leaf, Stop, intercepted, silenced
from lora_lightning.prefix.inputs import Inputs
from lora_lightning.prefix.items import (
    alike,
    aside,
    first,
    held,
    join,
    locate,
    outline,
    part,
    same,
    varies,
)
from lora_lightning.tree import walk

Outputs = list[list[Any]]  # of each call, the values that it gave
Record = list[Tensor]  # the kept values of one item


@dataclass
class Layout:
    """What batches of one shape have in common: structure, and outputs without their items."""

    specs: list[Any]
    outlines: Outputs


class Prefix:
    """Calls of `root` whose results do not depend on anything that is trained.

    Args:
        root: The model.
        calls: From `lora_lightning.prefix.flow.mark_used`.
    """

    def __init__(self, root: nn.Module, calls: list[Call]):
        self.root, self.calls = root, calls
        self.modules = {
            f"{call.path}.{path}" if path else call.path: module
            for call in calls
            for path, module in walk(call.module)
        }
        above = {path for call in calls for path in _above(call.path)}
        self.ancestors = {path: root.get_submodule(path) for path in sorted(above)}
        self._replaced = {call.module for call in calls}
        self._layouts: dict[bytes, Layout] = {}
        self._nan: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    @property
    def kept(self) -> list[Leaf]:
        """The values that are stored."""
        return [leaf for call in self.calls for leaf in call.leaves if leaf.kept and varies(leaf)]

    # ---- computing -------------------------------------------------------------------------

    def outputs(self, inputs: Inputs, seed: int | None = None) -> Outputs:
        """What each call gives, by a forward that ends with the last of them.

        Random numbers are drawn aside, from `seed` if given, so that the forward that follows
        draws those that it would have drawn.
        """
        found, _ = self._run(inputs, seed)
        return found

    def compute(self, inputs: Inputs, shared: bytes) -> list[Record]:
        """The record of each item; `shared` is the hash of what a batch of this shape shares."""
        outputs, specs = self._run(inputs, None)
        outlines = [
            [outline(leaf, value) for leaf, value in zip(call.leaves, row, strict=True)]
            for call, row in zip(self.calls, outputs, strict=True)
        ]
        self._note(shared, Layout(specs, outlines))
        return self.records(outputs, inputs.size)

    def _run(self, inputs: Inputs, seed: int | None) -> tuple[Outputs, list[Any]]:
        found: Outputs = []
        specs: list[Any] = []

        def handle(call: Call, forward: Any, args: Any, kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            values, spec = tree_flatten(out)
            found.append([held(leaf, v) for leaf, v in zip(call.leaves, values, strict=True)])
            specs.append(spec)
            if len(found) == len(self.calls):
                raise Stop
            return out

        order = InOrder(self.calls, handle)
        args, kwargs = inputs.call()
        with torch.inference_mode(False), torch.no_grad(), aside(inputs, seed):
            try:
                with silenced(self.ancestors.values()), intercepted(self._replaced, order):
                    self.root.forward(*args, **kwargs)
            except Stop:
                return found, specs
        raise order.astray("the forward ended")

    def _note(self, shared: bytes, layout: Layout) -> None:
        known = self._layouts.get(shared)
        if known is None:
            self._layouts[shared] = layout
            return
        for call, now, before in zip(self.calls, layout.outlines, known.outlines, strict=True):
            for leaf, a, b in zip(call.leaves, now, before, strict=True):
                if not alike(leaf, a, b):
                    raise ConfigError(
                        f"PrefixCache: what {call.path} gives differs, in shape or in a value that "
                        "belongs to no item, between batches of one shape, so that it cannot be "
                        "stored by item. Leave PrefixCache out"
                    )

    # ---- items -----------------------------------------------------------------------------

    def records(self, outputs: Outputs, size: int) -> list[Record]:
        """The kept values of each of `size` items, contiguous."""
        values = self.values(outputs)
        return [
            [part(leaf, value, item) for leaf, value in zip(self.kept, values, strict=True)]
            for item in range(size)
        ]

    def values(self, outputs: Outputs) -> list[Tensor]:
        """The kept values among all outputs."""
        return [
            value
            for call, row in zip(self.calls, outputs, strict=True)
            for leaf, value in zip(call.leaves, row, strict=True)
            if leaf.kept and varies(leaf)
        ]

    def joined(self, records: Sequence[Record]) -> list[Tensor]:
        """The kept values of a batch of these items."""
        return [join(leaf, [record[i] for record in records]) for i, leaf in enumerate(self.kept)]

    # ---- replaying -------------------------------------------------------------------------

    @contextmanager
    def replayed(self, records: Sequence[Record], shared: bytes) -> Iterator[InOrder]:
        """Within the block one forward of the model gets the calls' results from `records`."""
        layout = self._layouts[shared]
        values = iter(self.joined(records))
        size = len(records)

        def handle(call: Call, forward: Any, args: Any, kwargs: Any) -> Any:
            at = order.at - 1
            row = [
                self._given(leaf, outline, values, size)
                for leaf, outline in zip(call.leaves, layout.outlines[at], strict=True)
            ]
            return tree_unflatten(row, layout.specs[at])

        order = InOrder(self.calls, handle)
        with intercepted(self._replaced, order):
            yield order

    def _given(self, leaf: Leaf, outline: Any, values: Iterator[Tensor], size: int) -> Any:
        if leaf.dim is None:
            return outline.clone() if isinstance(outline, Tensor) else outline
        if leaf.kept:
            return next(values).to(outline.device)
        sizes = list(outline.shape)
        sizes[leaf.dim] = leaf.per_item * size
        return self._stand_in(torch.Size(sizes), outline.dtype, outline.device)

    def _stand_in(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """NaN of this shape; all of one dtype share memory, as nobody needs their values."""
        numel = shape.numel()
        known = self._nan.get((dtype, device))
        if known is None or known.numel() < numel:
            with torch.inference_mode(False):
                known = torch.full((numel,), torch.nan, dtype=dtype, device=device)
            self._nan[dtype, device] = known
        return known[:numel].view(shape)

    # ---- what each dimension means ---------------------------------------------------------

    def learn(self, inputs: Inputs) -> None:
        """Find where the items are in each value; check that each is on its own.

        Raises:
            ConfigError: results differ from one pass to the next, or an item's depend on others.
        """
        size = inputs.size
        once, again = self.outputs(inputs, seed=1), self.outputs(inputs, seed=2)
        more = self.outputs(inputs.rows([*range(size), size - 1]), seed=1)
        for call, a, b, c in zip(self.calls, once, again, more, strict=True):
            for leaf, x, y, z in zip(call.leaves, a, b, c, strict=True):
                locate(call, leaf, x, z, size)
                if not same(x, y):
                    raise ConfigError(
                        f"PrefixCache: {call.path} gives other features each time for the same "
                        "batch, so that they cannot be stored. Switch off what is random in it"
                    )
                if not same(first(leaf, z, size), x):
                    raise ConfigError(
                        f"PrefixCache: what {call.path} gives for an item depends on the other "
                        "items of its batch (batch statistics, or a batch dimension that is not "
                        "the first), so that it cannot be stored. Leave PrefixCache out"
                    )


def _above(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path
