"""Finding the cut on a batch, and checking that forwards with stored features are the same."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lora_lightning.errors import ConfigError
from lora_lightning.model.probing import difference, floats, preserved
from lora_lightning.training.prefix_cache.cut import (
    Cut,
    Layout,
    Leaf,
    Record,
    Run,
    Stop,
    candidates,
)
from lora_lightning.training.prefix_cache.store import Inputs
from lora_lightning.training.prefix_cache.watch import Watch, aside, noise, silenced


class Prefix:
    """What comes before a cut, checked on a batch; see `check`.

    Attributes:
        watch: tells when it is another.
        layouts: of batches, by the hash of what their items share and how many they are.
        first: the records of the batch.
    """

    def __init__(self, cut: Cut, inputs: Inputs):
        self.cut = cut
        self.layouts: dict[tuple[bytes, int], Layout] = {}
        self._modes: list[bool] = []
        self.first = self.check(inputs)
        self.watch = Watch([m for _, m in cut.before], [m for _, m in cut.around])

    def kind(self, inputs: Inputs) -> Hashable:
        """What is checked once: arguments of one structure, in one set of modes."""
        return inputs.kind(), *(m.training for m in self._moded())

    def _moded(self) -> list[nn.Module]:
        own = [] if self.cut.eval_prefix else self.cut.before
        return [module for _, module in (*self.cut.around, *own)]

    def note(self, inputs: Inputs, layout: Layout) -> None:
        """Hold the layout of a batch, or compare it with that of an earlier one.

        Raises:
            ConfigError: they differ.
        """
        known = self.layouts.setdefault((inputs.shared(), inputs.size), layout)
        if known is not layout and _signature(known) != _signature(layout):
            raise ConfigError(
                f"PrefixCache: what comes before {self.cut.path} differs, in shape or in a value "
                "of no item, between batches of one shape. Leave PrefixCache out"
            )

    def check(self, inputs: Inputs) -> list[Record]:
        """The records of a batch, if forwards with and without them are the same.

        Raises:
            ConfigError: they are not, or features are random or depend on other items.
        """
        cut, size = self.cut, inputs.size
        with _trials(cut.root), silenced([*cut.root.modules()]), torch.no_grad():
            # Where a second argument tells lengths, the order of items and the longest stay.
            index = [size - 1, 0] if inputs.separable and size > 2 else [0, *range(size)]
            batch, some = inputs.rows(range(size)), inputs.rows(index)
            real = _Trial(cut, batch)
            if batch.keys(b"") != inputs.keys(b""):
                raise ConfigError("PrefixCache: the model writes into its input: take a copy")
            if cut.replaced is None:
                after = {m for module in real.run.after for m in module.modules()}
                cut.before = [(p, m) for p, m in cut.before if m not in after]
            if why := noise([] if cut.eval_prefix else cut.before, cut.around):
                raise ConfigError(f"PrefixCache: {why}")
            with torch.enable_grad():
                other = _Trial(cut, some, seed=1, stop=True)
            _learn(cut, real, other)
            records = _records(cut, real, other, index)
            layout = [(m, x) for m, x in real.run.layout if m in {*(cut.replaced or ()), cut.block}]
            _compare(real, _Trial(cut, batch, records=records, layout=layout))
            self._compare_modes(batch, records)
        self.note(inputs, layout)
        return records

    def _compare_modes(self, batch: Inputs, records: list[Record]) -> None:
        now = [m.training for m in self._moded()]
        self._modes = self._modes or now
        if now != self._modes:
            for module, training in zip(self._moded(), self._modes, strict=True):
                module.training = training
            if not same(records, self.cut.features(batch)):
                raise ConfigError("PrefixCache: features differ between training and eval mode")


def find_prefix(root: nn.Module, inputs: Inputs, eval_prefix: bool) -> Prefix:
    """The prefix of `root`, from a batch of its inputs."""
    with _trials(root):
        paths, why = candidates(root, inputs.rows(range(inputs.size)))
    problem = ConfigError(f"PrefixCache: {why}")
    for path in paths:
        try:
            return Prefix(Cut(root, path, eval_prefix), inputs)
        except ConfigError as error:
            problem = error
    raise problem


class _Trial:
    """A forward for a look: what the block is given, the outputs, where generators stand then."""

    def __init__(self, cut: Cut, inputs: Inputs, seed: int = 0, stop: bool = False, **options: Any):
        self.size = inputs.size
        self.given: list[Any] = []

        def keep(given: list[Any]) -> None:
            self.given += tree_map_only(Tensor, torch.clone, given)
            if stop:
                raise Stop

        torch.manual_seed(seed)
        random.seed(seed)
        self.run = Run(keep, **options)
        self.out = [x.clone() for x in floats(cut.forward(inputs, self.run))]
        self.drawn = torch.get_rng_state().tolist(), random.getstate()


@contextmanager
def _trials(root: nn.Module) -> Iterator[None]:
    """Modes, buffers and random numbers are afterwards what they were; errors are `ConfigError`."""
    with torch.inference_mode(False), preserved(root), aside():
        try:
            yield
        except (ConfigError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            raise ConfigError(
                f"PrefixCache: a trial forward of {type(root).__name__}, with other items or with "
                f"stored features, ended in {type(error).__name__}: {error}"
            ) from error
        finally:
            torch.clear_autocast_cache()  # casts made here know no gradient


def _learn(cut: Cut, one: _Trial, other: _Trial) -> None:
    """Which modules are replaced: those that give items and nothing else."""
    if [m for m, _ in one.run.layout] != [m for m, _ in other.run.layout]:
        raise cut.astray()
    alone: set[nn.Module] = set()
    mixed: set[nn.Module] = set()
    for (module, a), (_, b) in zip(one.run.layout, other.run.layout, strict=True):
        pairs = list(zip(tree_leaves(a), tree_leaves(b), strict=True))
        leaves = [_leaf(x, y, one.size, other.size) for x, y in pairs]
        whole = leaves.count(None) == sum(not isinstance(x, Tensor) for x, _ in pairs)
        (alone if whole else mixed).add(module)
    if cut.replaced is None:
        cut.replaced, cut.leaves = alone - mixed - {cut.block}, leaves
    if any(isinstance(x, Tensor) and x.requires_grad for x in other.given):
        raise ConfigError(
            f"PrefixCache: something that is trained has a say in what {cut.path} is given (a "
            "table of positions, say). Freeze it, or leave PrefixCache out"
        )
    if not any(p.ndim > 1 for m in cut.replaced for p in m.parameters()) or not any(cut.leaves):
        raise ConfigError(
            f"PrefixCache: no layer comes before {cut.path}, the first block that is trained or "
            "looked at: there is nothing to store. Adapt later blocks only, as "
            "LoRACallback(blocks=[-2, -1]) does, or leave PrefixCache out"
        )
    if leaves != cut.leaves:
        raise ConfigError(
            f"PrefixCache: with these arguments {cut.path} is given something else than before"
        )


def _leaf(value: Any, other: Any, size: int, other_size: int) -> Leaf | None:
    """Where the items are in a value, from batches of two sizes; None: it has none."""
    if not isinstance(value, Tensor) or value.ndim != other.ndim:
        return None
    growing = [i for i in range(value.ndim) if value.shape[i] != other.shape[i]]
    if len(growing) != 1 or value.shape[growing[0]] * other_size != other.shape[growing[0]] * size:
        return None
    steps: tuple[int, ...] = value.stride()
    return Leaf(growing[0], sorted(range(value.ndim), key=lambda i: (-steps[i], i)))


def _records(cut: Cut, one: _Trial, other: _Trial, index: list[int]) -> list[Record]:
    """The records of a batch, if each item's are the same in other company."""
    records = cut.split(one.given, one.size)
    alone = [[x] for x, leaf in zip(one.given, cut.leaves, strict=True) if leaf is None]
    also = [[x] for x, leaf in zip(other.given, cut.leaves, strict=True) if leaf is None]
    expected, found = [records[i] for i in index], cut.split(other.given, other.size)
    if not same([*expected, *alone], [*found, *also]):
        raise ConfigError(
            f"PrefixCache: what {cut.path} is given for an item is random, or depends on the other "
            "items (batch statistics, or a batch dimension that is not the first). Leave "
            "PrefixCache out"
        )
    return records


def _compare(real: _Trial, served: _Trial) -> None:
    """Is all that the block is given, and all that the model gives, the same?"""
    if real.drawn != served.drawn:
        raise ConfigError(
            "PrefixCache: modules before the first trained block draw random numbers. Switch off "
            "what is random there, or leave PrefixCache out"
        )
    if not real.out or not same([real.given, real.out], [served.given, served.out]):
        raise ConfigError(
            "PrefixCache: with stored features the model's output is not what it is without: what "
            "comes before the first trained block is used past it as well (skip connections, "
            "feature pyramids, a tensor left in an attribute). Leave PrefixCache out"
        )


def same(a: list[Record], b: list[Record]) -> bool:
    """Whether values are the same, but for rounding: half the digits must agree."""
    return all(len(x) == len(y) and all(map(_alike, x, y)) for x, y in zip(a, b, strict=True))


def _alike(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return True
    b = b.to(a.device)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    if not a.is_floating_point() or not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = a.nan_to_num(0.0, torch.inf, -torch.inf), b.nan_to_num(0.0, torch.inf, -torch.inf)
    limit: float = torch.finfo(a.dtype).eps ** 0.5
    return bool(difference([a.double()], [b.double()]) <= limit)


def _signature(layout: Layout) -> str:
    return repr(
        [(id(m), tree_map_only(Tensor, lambda x: (x.shape, x.dtype), v)) for m, v in layout]
    )
