"""`Cut`: modules before the first trained block give NaN, and the block gets what is stored."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from lora_lightning.errors import ConfigError
from lora_lightning.lora.module_tree import Modules, find, walk
from lora_lightning.training.prefix_cache.store import CONSTANTS

Record = list[Tensor]  # what is stored of one item
Layout = list[tuple[nn.Module, Any, Any]]  # calls up to the block: shapes in, out on "meta"


class Stop(BaseException):
    """The part of a forward that was wanted is done; no ``except Exception`` may catch it."""


@contextmanager
def intercepted(modules: Iterable[nn.Module], around: Callable[..., Any]) -> Iterator[None]:
    """Within the block each call of these modules' forward goes through `around`."""
    kept = [(m, m.__dict__.get("forward")) for m in modules]
    if "torch._dynamo" in sys.modules:  # a compiled module would trace what is none of its code
        around = torch.compiler.disable(around)  # type: ignore[no-untyped-call]
    for module, _ in kept:
        module.__dict__["forward"] = partial(around, module, module.forward)
    try:
        yield
    finally:
        for module, own in kept:
            del module.__dict__["forward"]
            module.__dict__.update({} if own is None else {"forward": own})


@dataclass
class Run:
    """One forward of the model, served where there are records, else noted."""

    keep: Callable[[list[Any]], None]  # gets what the block is given, and copies what it wants
    records: list[Record] = field(default_factory=list)  # of the items
    layout: Layout = field(default_factory=list)  # of a forward like this one
    early: set[nn.Module] = field(default_factory=set)  # called before the block
    late: set[nn.Module] = field(default_factory=set)  # called behind it
    at: int = 0
    entered: bool = False


class Cut:
    """The block at `path`, before which calls are replaced."""

    def __init__(self, root: nn.Module, path: str, eval_prefix: bool):
        self.root, self.path, self.eval_prefix = root, path, eval_prefix
        self.block = find(root, path)
        self.around: Modules = [(p, m) for p, m in walk(root) if not p or path.startswith(f"{p}.")]
        own = {*self.block.modules(), *(m for _, m in self.around)}
        self.before: Modules = [(p, m) for p, m in walk(root) if m not in own]  # narrowed later
        self.dims: list[int | None] = []  # the items' in each input; None: taken as it comes
        self._nan: dict[torch.dtype, Tensor] = {}

    @contextmanager
    def running(self, run: Run) -> Iterator[None]:
        """Within the block one forward of the model is noted, or served from records."""
        enter = partial(self._enter, run)  # comes first: other hooks see what the block is given
        handle = self.block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        try:
            with intercepted([m for _, m in self.before], partial(self._call, run)):
                yield
        finally:
            handle.remove()

    def split(self, given: list[Any], size: int) -> list[Record]:
        """The record of each of `size` items, of what the block is given."""
        pairs = zip(given, self.dims, strict=True)
        columns = [x.detach().chunk(size, dim) for x, dim in pairs if dim is not None]
        return list(map(list, zip(*columns, strict=True)))

    def astray(self) -> ConfigError:
        """The error for a forward that goes another way."""
        return ConfigError(
            f"PrefixCache: up to {self.path} the model takes another path than in its first batch, "
            "or gives other shapes or values. Leave PrefixCache out"
        )

    def _call(self, run: Run, module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        (run.late if run.entered else run.early).add(module)
        sizes = shapes(args, kwargs)
        given_more = run.records and run.layout[run.at][:2] != (module, sizes)  # than features
        if run.entered or given_more:
            return forward(*args, **kwargs)
        if run.records:
            run.at += 1
            return tree_map_only(Tensor, self._nothing, run.layout[run.at - 1][2])
        noted, training = len(run.layout), [m for m in module.modules() if m.training]
        try:
            for m in training:
                m.training = not self.eval_prefix
            out = forward(*args, **kwargs)
        finally:
            for m in training:
                m.training = True
        if all(map(_replaceable, tree_leaves(out))):  # whatever it called itself is a part of it
            run.layout[noted:] = [(module, sizes, _meta(out))]
        return out

    def _nothing(self, like: Tensor) -> Tensor:
        """NaN of this shape; all of one precision share memory, as nobody needs their values."""
        known = self._nan.get(like.dtype)
        if known is None or known.numel() < like.numel():
            device = next(self.block.parameters()).device
            with torch.inference_mode(False):
                known = torch.full((like.numel(),), torch.nan, dtype=like.dtype, device=device)
            self._nan[like.dtype] = known
        return known[: like.numel()].view(like.shape)

    def _enter(self, run: Run, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if run.entered:
            return None
        run.entered = True
        given, spec = tree_flatten((args, kwargs))
        if not run.records:
            run.layout.append((module, shapes(given), _meta((args, kwargs))))
        elif run.at != len(run.layout) - 1 or shapes(given) != run.layout[-1][1]:
            raise self.astray()
        columns, likes = zip(*run.records, strict=True), tree_leaves(run.layout[-1][2])
        for i, dim in enumerate(self.dims if run.records else ()):
            if dim is not None:  # in memory as it was, so that results are equal bit for bit
                whole = torch.empty_like(likes[i], device=given[i].device)
                given[i] = whole.copy_(torch.cat(next(columns), dim))
        run.keep(given)
        return tree_unflatten(given, spec)


def _meta(value: Any) -> Any:
    return tree_map_only(Tensor, lambda x: torch.empty_like(x, device="meta"), value)


def _replaceable(value: Any) -> bool:
    return value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, CONSTANTS)


def shapes(*values: Any) -> list[Any]:
    """What calls, and layouts of batches of one shape, must share."""
    kept = Tensor, nn.Module, *CONSTANTS
    return [getattr(x, "shape", x) for x in tree_leaves(values) if isinstance(x, kept)]
