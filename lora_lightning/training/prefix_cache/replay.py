"""`Prefix`: the frozen beginning of a model, computed alone, taken apart into items, replayed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lora_lightning.errors import ConfigError
from lora_lightning.lora.module_tree import walk
from lora_lightning.training.prefix_cache.calls import Call, InOrder, Leaf, Stop, intercepted
from lora_lightning.training.prefix_cache.chance import aside, generators
from lora_lightning.training.prefix_cache.inputs import Inputs
from lora_lightning.training.prefix_cache.items import held, join, outline, part, varies
from lora_lightning.training.prefix_cache.layouts import Layout, Layouts
from lora_lightning.training.prefix_cache.observers import silenced

Outputs = list[list[Any]]  # of each call, the values that it gave
Record = list[Tensor]  # the kept values of one item


class Prefix:
    """Calls of `root` whose results do not depend on anything that is trained.

    Args:
        root: The model.
        calls: From `lora_lightning.training.prefix_cache.flow.mark_used`.
        settled: Compute them in eval mode, whatever the model's is.
    """

    def __init__(self, root: nn.Module, calls: list[Call], settled: bool):
        self.root, self.calls, self.settled = root, calls, settled
        self.modules = {
            f"{call.path}.{path}" if path else call.path: module
            for call in calls
            for path, module in walk(call.module)
        }
        above = {path for call in calls for path in _above(call.path)}
        self.ancestors = {path: root.get_submodule(path) for path in sorted(above)}
        self._replaced = {call.module for call in calls}
        self.layouts = Layouts(calls)
        self._nan: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    @property
    def kept(self) -> list[Leaf]:
        """The values that are stored."""
        return [leaf for call in self.calls for leaf in call.leaves if leaf.kept and varies(leaf)]

    # ---- computing -------------------------------------------------------------------------

    def outputs(self, inputs: Inputs) -> Outputs:
        """What each call gives, by a forward that ends with the last of them.

        Random numbers are drawn aside, so that the forward that follows draws those that it would
        have drawn.
        """
        return self._run(inputs, None)[0]

    def trial(self, inputs: Inputs, seed: int) -> Outputs:
        """The same, random numbers drawn from `seed`.

        Raises:
            ConfigError: a call draws any, or gives another number of values than before.
        """
        return self._run(inputs, seed)[0]

    def compute(self, inputs: Inputs, shared: bytes) -> list[Record]:
        """The record of each item; `shared` is the hash of what a batch of this shape shares."""
        outputs, specs = self._run(inputs, None)
        outlines = [
            [outline(call, *pair, inputs.size) for pair in zip(call.leaves, row, strict=True)]
            for call, row in zip(self.calls, outputs, strict=True)
        ]
        self.layouts.note(shared, Layout(specs, outlines))
        return self.records(outputs, inputs.size)

    def _run(self, inputs: Inputs, seed: int | None) -> tuple[Outputs, list[Any]]:
        found: Outputs = []
        specs: list[Any] = []

        def handle(call: Call, forward: Any, args: Any, kwargs: Any) -> Any:
            before = generators(inputs) if seed is not None else None
            with self._quiet(call):
                out = forward(*args, **kwargs)
            if before is not None and generators(inputs) != before:
                raise _draws(call)
            values, spec = tree_flatten(out)
            if len(values) != len(call.leaves):
                raise _other_number(call, len(values))
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

    @contextmanager
    def computed(self) -> Iterator[None]:
        """Within the block one forward of the model makes its calls as they are stored."""

        def handle(call: Call, forward: Any, args: Any, kwargs: Any) -> Any:
            with self._quiet(call):
                return forward(*args, **kwargs)

        with intercepted(self._replaced, InOrder(self.calls, handle)):
            yield

    @contextmanager
    def _quiet(self, call: Call) -> Iterator[None]:
        """Within the block a call is in eval mode, where that is wished for.

        No longer: the same module may be called again behind the prefix.
        """
        training = [m for m in call.module.modules() if m.training] if self.settled else []
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    # ---- items -----------------------------------------------------------------------------

    def records(self, outputs: Outputs, size: int) -> list[Record]:
        """The kept values of each of `size` items, contiguous."""
        values = self.values(outputs)
        return [
            [part(leaf, value, item, size) for leaf, value in zip(self.kept, values, strict=True)]
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
        layout = self.layouts[shared]
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
        if not isinstance(outline, Tensor):
            return outline
        if leaf.kept:
            return outline.clone() if leaf.dim is None else next(values).to(outline.device)
        sizes = list(outline.shape)
        if leaf.dim is not None:
            sizes[leaf.dim] *= size
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


def _above(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _draws(call: Call) -> ConfigError:
    return ConfigError(
        f"PrefixCache: {call.path} draws random numbers (stochastic depth, a random transform), so "
        "that its features differ each time. Switch that off; where it rests in eval mode, "
        "PrefixCache(eval_prefix=True) does so"
    )


def _other_number(call: Call, number: int) -> ConfigError:
    return ConfigError(
        f"PrefixCache: {call.path} gives {number} values here and {len(call.leaves)} in its first "
        "batch, which cannot be stored by item. Give one tensor for all items"
    )
