"""`Prefix`: the frozen beginning of a model, computed alone, taken apart into items, replayed.

Suffixes: B items of a batch; a value of a call has B·k along one dimension, k for each item.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lora_lightning.errors import ConfigError
from lora_lightning.prefix_calls import Call, InOrder, Leaf, Stop, intercepted
from lora_lightning.prefix_inputs import Inputs
from lora_lightning.probe import difference
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
        calls: From `lora_lightning.prefix_flow.mark_used`.
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
        self._layouts: dict[bytes, Layout] = {}
        self._nan: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    @property
    def kept(self) -> list[Leaf]:
        """The values that are stored."""
        return [leaf for call in self.calls for leaf in call.leaves if leaf.kept and _varies(leaf)]

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
            [_outline(leaf, value) for leaf, value in zip(call.leaves, row, strict=True)]
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
            found.append([_held(leaf, v) for leaf, v in zip(call.leaves, values, strict=True)])
            specs.append(spec)
            if len(found) == len(self.calls):
                raise Stop
            return out

        order = InOrder(self.calls, handle)
        args, kwargs = inputs.call()
        with torch.inference_mode(False), torch.no_grad(), aside(inputs, seed):
            try:
                with intercepted({c.module for c in self.calls}, order):
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
                if leaf.dim is None and not same(a, b):
                    raise ConfigError(
                        f"PrefixCache: {call.path} gives a value that belongs to no item and yet "
                        "changes from batch to batch: nothing can be stored by item. Leave "
                        "PrefixCache out"
                    )

    # ---- items -----------------------------------------------------------------------------

    def records(self, outputs: Outputs, size: int) -> list[Record]:
        """The kept values of each of `size` items, contiguous."""
        values = self.values(outputs)
        return [
            [_part(leaf, value, item) for leaf, value in zip(self.kept, values, strict=True)]
            for item in range(size)
        ]

    def values(self, outputs: Outputs) -> list[Tensor]:
        """The kept values among all outputs."""
        return [
            value
            for call, row in zip(self.calls, outputs, strict=True)
            for leaf, value in zip(call.leaves, row, strict=True)
            if leaf.kept and _varies(leaf)
        ]

    def joined(self, records: Sequence[Record]) -> list[Tensor]:
        """The kept values of a batch of these items."""
        return [
            _join(leaf, [record[i] for record in records]) for i, leaf in enumerate(self.kept)
        ]

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
        with intercepted({c.module for c in self.calls}, order):
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
        more = self.outputs(inputs.rows([*range(size), 0]), seed=1)
        for call, a, b, c in zip(self.calls, once, again, more, strict=True):
            for leaf, x, y, z in zip(call.leaves, a, b, c, strict=True):
                _locate(call, leaf, x, z, size)
                if not same(x, y):
                    raise ConfigError(
                        f"PrefixCache: {call.path} gives other features each time for the same "
                        "batch, so that they cannot be stored. Switch off what is random in it"
                    )
                if not same(_first(leaf, z, size), x):
                    raise ConfigError(
                        f"PrefixCache: what {call.path} gives for an item depends on the other "
                        "items of its batch (batch statistics, or a batch dimension that is not "
                        "the first), so that it cannot be stored. Leave PrefixCache out"
                    )


def _above(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _varies(leaf: Leaf) -> bool:
    return leaf.dim is not None


def _held(leaf: Leaf, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    # A copy of what is kept: what comes next may write into it. Of the rest, no more than a shape.
    return value.clone() if leaf.kept or leaf.dim is None else _outline(leaf, value)


def _outline(leaf: Leaf, value: Any) -> Any:
    return value if leaf.dim is None else value.new_empty(()).expand(value.shape)


def _part(leaf: Leaf, value: Tensor, item: int) -> Tensor:
    assert leaf.dim is not None
    rows = value.narrow(leaf.dim, item * leaf.per_item, leaf.per_item)
    return rows.permute(leaf.order).contiguous()


def _join(leaf: Leaf, parts: list[Tensor]) -> Tensor:
    """Parts of items to a batch, in the order of memory that the call itself gave."""
    assert leaf.dim is not None
    if len({part.device for part in parts}) > 1:
        parts = [part.cpu() for part in parts]
    whole = torch.cat(parts, leaf.order.index(leaf.dim))
    return whole.permute(sorted(range(whole.ndim), key=leaf.order.__getitem__))


def _locate(call: Call, leaf: Leaf, one: Any, more: Any, size: int) -> None:
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
    leaf.order = tuple(sorted(range(one.ndim), key=lambda i: (-one.stride(i), i)))


def _first(leaf: Leaf, value: Any, size: int) -> Any:
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
    return difference([a.double()], [b.double()]) <= float(torch.finfo(a.dtype).eps) ** 0.5


@contextmanager
def aside(inputs: Inputs, seed: int | None) -> Iterator[None]:
    """Random numbers drawn within the block leave the generators as they are."""
    devices = {x.device for x in inputs.leaves if isinstance(x, Tensor) and x.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        if seed is not None:
            torch.manual_seed(seed)
        yield
