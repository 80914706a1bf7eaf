"""`Cut`: the first block that holds something trained, and what it is given.

A model's forward is arbitrary code and cannot be entered in the middle. In its place the *calls*
of the modules before the block are replaced, which cost all the time: they give NaN of the right
shape, so that whoever uses it is noticed, and the block is given what is stored.
"""

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
from lora_lightning.model.introspection import block_list
from lora_lightning.training.prefix_cache.store import CONSTANTS, Inputs
from lora_lightning.training.prefix_cache.watch import obstacle

Record = list[Tensor]  # what is stored of one item
Layout = list[tuple[nn.Module, Any]]  # calls up to the block, and what they gave on "meta"


class Stop(BaseException):
    """The part of a forward that was wanted is done; no ``except Exception`` may catch it."""


@contextmanager
def intercepted(modules: Iterable[nn.Module], around: Callable[..., Any]) -> Iterator[None]:
    """Within the block each call of these modules' forward goes through `around`."""
    scripted = torch.jit.ScriptModule
    kept = [(m, m.__dict__.get("forward")) for m in modules if not isinstance(m, scripted)]
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


def candidates(root: nn.Module, inputs: Inputs) -> tuple[list[str], str]:
    """Where to cut, innermost block first, and what is there.

    These are the members of lists, failing these the child of `root`, that are running when the
    first module that is trained is called.
    """
    paths = {module: path for path, module in walk(root) if path}
    running: list[str] = []

    def around(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        running.append(paths[module])
        if why := obstacle(module):
            raise Stop(f"{running[-1]} {why}")
        out = forward(*args, **kwargs)
        running.pop()
        return out

    try:
        with torch.no_grad(), intercepted(paths, around):
            root.forward(*inputs.args, **inputs.kwargs)
    except Stop as stop:
        lists = {p for p, m in walk(root) if isinstance(m, (nn.Sequential, nn.ModuleList))}
        blocks = {*block_list(root), *(p for p in running if p.rpartition(".")[0] in lists)}
        return [p for p in reversed(running) if p in blocks] or running[:1], str(stop)
    raise ConfigError(
        f"PrefixCache: this forward of {type(root).__name__} uses nothing that is trained"
    )


@dataclass
class Leaf:
    """A tensor that holds items along `dim`; its dimensions in the `order` of memory."""

    dim: int
    order: list[int]

    def split(self, value: Tensor, size: int) -> list[Tensor]:
        """What belongs to each of `size` items, contiguous; what is repeated, once."""
        for i, step in enumerate(value.stride()):
            value = value.narrow(i, 0, 1) if step == 0 and i != self.dim else value
        return [x.permute(self.order).contiguous() for x in value.detach().chunk(size, self.dim)]

    def join(self, parts: list[Tensor], shape: torch.Size, device: torch.device) -> Tensor:
        """A batch of such parts."""
        if len({part.device for part in parts}) > 1:
            parts = [part.cpu() for part in parts]
        whole = torch.cat(parts, self.order.index(self.dim)).to(device)
        return whole.permute([self.order.index(i) for i in range(whole.ndim)]).expand(shape)


@dataclass
class Run:
    """One forward of the model, noted or served.

    Attributes:
        keep: gets what the block is given, and copies what it wants.
        records: of the items, in place of what comes before the block; empty: it is noted.
        layout: of a forward with as many items of this shape; filled where this one is noted.
        after: modules that were called past the block.
    """

    keep: Callable[[list[Any]], None]
    records: list[Record] = field(default_factory=list)
    layout: Layout = field(default_factory=list)
    after: set[nn.Module] = field(default_factory=set)
    at: int = 0
    inside: bool = False
    entered: bool = False


class Cut:
    """The block at `path`, before which calls are replaced.

    Attributes:
        around: the modules that the block is in.
        before: all other modules that are not called past the block first.
        replaced: those that are not called when a forward is served; None: not known yet.
        leaves: of what the block is given, the tensors that hold items; others are as they come.
    """

    def __init__(self, root: nn.Module, path: str, eval_prefix: bool):
        self.root, self.path, self.eval_prefix = root, path, eval_prefix
        self.block = find(root, path)
        own = {*self.block.modules()}
        self.around: Modules = [(p, m) for p, m in walk(root) if not p or path.startswith(f"{p}.")]
        own.update(m for _, m in self.around)
        self.before: Modules = [(p, m) for p, m in walk(root) if m not in own]
        self.replaced: set[nn.Module] | None = None
        self.leaves: list[Leaf | None] = []
        self._nan: dict[Any, Tensor] = {}

    @contextmanager
    def running(self, run: Run) -> Iterator[None]:
        """Within the block one forward of the model is noted, or served from records."""
        chosen = (m for _, m in self.before) if self.replaced is None else self.replaced
        enter = partial(self._enter, run)  # comes first: other hooks see what the block is given
        handle = self.block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        try:
            with intercepted(chosen, partial(self._call, run)):
                yield
        finally:
            handle.remove()

    def forward(self, inputs: Inputs, run: Run) -> Any:
        """The model's own forward, up to where `run` stops it."""
        out = None
        try:
            with self.running(run):
                out = self.root.forward(*inputs.args, **inputs.kwargs)
        except Stop:
            pass
        if not run.entered:
            raise self.astray()
        return out

    def features(self, inputs: Inputs) -> list[Record]:
        """The record of each item, by a forward that ends at the block."""
        found: list[Any] = []

        def keep(given: list[Any]) -> None:
            found.extend(self.split(given, inputs.size))
            raise Stop

        self.forward(inputs, Run(keep))
        return found

    def split(self, given: list[Any], size: int) -> list[Record]:
        """The record of each of `size` items, of what the block is given."""
        pairs = zip(self.leaves, given, strict=True)
        columns = [place.split(x, size) for place, x in pairs if place is not None]
        return [list(record) for record in zip(*columns, strict=True)]

    def astray(self) -> ConfigError:
        """The error for a forward that goes another way."""
        return ConfigError(
            f"PrefixCache: up to {self.path} the model takes another path than in its first batch "
            "(layers dropped at random, or a path that depends on the data). Switch that off, or "
            "leave PrefixCache out"
        )

    def _call(self, run: Run, module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if run.entered or run.inside:
            run.after.update({module} if run.entered else ())
            return forward(*args, **kwargs)
        if run.records:
            at, run.at = run.at, run.at + 1
            if run.layout[at][0] is not module:
                raise self.astray()
            return tree_map_only(Tensor, self._nothing, run.layout[at][1])
        noted, run.inside = len(run.layout), self.replaced is not None
        training = [m for m in module.modules() if m.training and self.eval_prefix]
        try:
            for m in training:
                m.training = False
            out = forward(*args, **kwargs)
        finally:
            run.inside = False
            for m in training:
                m.training = True
        if all(map(_replaceable, tree_leaves(out))):  # whatever it called itself is a part of it
            run.layout[noted:] = [(module, tree_map_only(Tensor, _meta, out))]
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
            run.layout.append((module, tree_map_only(Tensor, _meta, (args, kwargs))))
        elif run.at != len(run.layout) - 1:
            raise self.astray()
        columns, shapes = zip(*run.records, strict=True), tree_leaves(run.layout[-1][1])
        for i, place in enumerate(self.leaves if run.records else ()):
            if place is not None:
                given[i] = place.join(list(next(columns)), shapes[i].shape, given[i].device)
        run.keep(given)
        return tree_unflatten(given, spec)


def _meta(value: Tensor) -> Tensor:
    return torch.empty_like(value, device="meta")


def _replaceable(value: Any) -> bool:
    return value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, CONSTANTS)
