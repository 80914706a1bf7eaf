"""`CachedForward`: a model whose frozen beginning is looked up; no Lightning here."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lora_lightning.errors import ConfigError
from lora_lightning.prefix.finding import Found, few, find, refusal, settle
from lora_lightning.prefix.inputs import Inputs, autocast
from lora_lightning.prefix.items import same
from lora_lightning.prefix.replay import Prefix, Record
from lora_lightning.prefix.store import Store
from lora_lightning.prefix.watch import modes
from lora_lightning.state import merged_layers

_RENEWALS = 3  # in a row without a hit; then the weights change all the time


class CachedForward:
    """Replaces the calls of the prefix in each forward of `root`, for as long as it is attached.

    The first forward with gradients finds the prefix and checks it. A forward that cannot be
    served exactly (other weights, modes, arguments) is left alone.

    Args:
        root: The model.
        store: For the features.
        eval_prefix: Keep the prefix in eval mode.

    Attributes:
        found: the prefix; None before the first forward with gradients.
        end: the module that the prefix ends before.
        lookups, hits: items; `training_hits` those of forwards with gradients.
        renewals: how often the weights were others, since the last hit.
        seconds: spent on finding and checking the prefix.
        off: why nothing is cached any more; "" while it is.

    Raises:
        ConfigError: the model has such a cache already.
    """

    def __init__(self, root: nn.Module, store: Store, eval_prefix: bool):
        if any(
            isinstance(h, Hook) and h.call is not None for h in root._forward_pre_hooks.values()
        ):
            raise ConfigError("this model has a PrefixCache already: use one")
        self.root, self.store, self.eval_prefix = root, store, eval_prefix
        self.found: Found | None = None
        self.end = self.off = ""
        self.lookups = self.hits = self.training_hits = 0
        self.seconds = 0.0
        self._refusals: dict[Hashable, str] = {}  # kind of forward → why not; "": it is served
        self._checked = False
        self._company: dict[bytes, int] = {}  # key → the batch that it was computed in
        self.renewals = 0
        self._replay: Any = None
        self._order: Any = None
        self._handles = [
            root.register_forward_pre_hook(Hook(self._before, root), with_kwargs=True),
            root.register_forward_hook(Hook(self._after, root), always_call=True),
        ]

    def close(self, why: str = "detached") -> None:
        """Leave the model as it was, and give the memory back."""
        self._end_replay()
        for handle in self._handles:
            handle.remove()
        if self.eval_prefix and self.found is not None:
            for module in self.found.prefix.modules.values():
                module.training = self.root.training
        self.off = self.off or why
        self.store.close()

    def check_weights(self) -> None:
        """Start anew where weights were written to in ways that no version counter shows."""
        if self.found is not None and self.found.watch.rewritten():
            self._forget()

    # ---- around a forward ------------------------------------------------------------------

    def _before(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._end_replay()  # of a forward that was interrupted
        if self.off or not _eager():
            return
        inputs = Inputs(args, kwargs)
        found = self._ready(inputs) if inputs.usable else None
        if found is None:
            return
        shared = inputs.shared()
        records = self._look_up(found.prefix, inputs, shared)
        self._replay = found.prefix.replayed(records, shared)
        self._order = self._replay.__enter__()

    def _after(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        order = self._order
        self._end_replay()
        # Without an output another error is on its way.
        if order is not None and output is not None and order.at < len(order.calls):
            raise order.astray("the forward ended")

    def _end_replay(self) -> None:
        replay, self._replay, self._order = self._replay, None, None
        if replay is not None:
            replay.__exit__(None, None, None)

    def _look_up(self, prefix: Prefix, inputs: Inputs, shared: bytes) -> list[Record]:
        """The record of each item, computed where it is not stored."""
        keys = inputs.keys(shared)
        stored = [self.store.get(key) for key in keys]
        found = {i: record for i, record in enumerate(stored) if record is not None}
        missing = [i for i in range(inputs.size) if i not in found]
        self.lookups += inputs.size
        self.hits += len(found)
        self.training_hits += len(found) if torch.is_grad_enabled() else 0
        if found:
            self.renewals = 0
        if missing:
            # Items alone, or the whole batch where another argument may tell their lengths.
            index = missing if inputs.separable else list(range(inputs.size))
            part = inputs if len(index) == inputs.size else inputs.rows(index)
            for i, record in zip(index, prefix.compute(part, shared), strict=True):
                if keys[i] not in self.store:
                    self.store.put(keys[i], record)
                found.setdefault(i, record)
                if not self._checked:
                    self._company[keys[i]] = self.lookups
        elif not self._checked and len({self._company[key] for key in keys}) > 1:
            self._check(prefix, inputs, found)
        return [found[i] for i in range(inputs.size)]

    def _check(self, prefix: Prefix, inputs: Inputs, found: dict[int, Record]) -> None:
        """The first batch of items that were computed in different batches."""
        batch = few(inputs)
        with self._timed():
            now = prefix.values(prefix.outputs(batch))
        stored = prefix.joined([found[i] for i in range(batch.size)])
        if not all(same(a.to(b.device), b) for a, b in zip(stored, now, strict=True)):
            raise ConfigError(
                "PrefixCache: stored features differ from those computed anew for the same items: "
                "they depend on more than the item and the shape of its batch. Leave PrefixCache "
                "out"
            )
        self._checked = True
        self._company.clear()

    # ---- is this forward one that can be served? -------------------------------------------

    def _ready(self, inputs: Inputs) -> Found | None:
        """What serves this forward; None: it is left alone."""
        found = self.found
        if found is None or found.watch.changed():
            if not torch.is_grad_enabled() or not _trains(self.root):
                return None  # a look with other weights for a while
            if found is not None:
                self._forget()
            if self.off:
                return None
            found = self._find(inputs)
        settle(found.prefix, self.eval_prefix)
        kind = _kind(found, inputs)
        if kind not in self._refusals:
            with self._timed():
                self._refusals[kind] = why = refusal(found, inputs)
            if why and torch.is_grad_enabled():
                rank_zero_warn(f"PrefixCache leaves some forwards alone: {why}")
        return None if self._refusals[kind] else found

    def _find(self, inputs: Inputs) -> Found:
        with self._timed():
            self.found = find(self.root, inputs, self.eval_prefix)
        self._refusals[_kind(self.found, inputs)] = ""
        self.end = self.found.end
        return self.found

    def _forget(self) -> None:
        """The weights are others: what is stored is of no use."""
        self.found = None
        self._refusals.clear()
        self.store.clear()
        self._checked = False
        self._company.clear()
        self.renewals += 1
        if self.renewals > _RENEWALS:
            self.off = "the weights before the first trained layer change all the time"
            rank_zero_warn(f"PrefixCache is off: {self.off}")

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


class Hook:
    """A hook of one model, which copies of the model, and files of it, do not take along."""

    def __init__(self, call: Callable[..., Any] | None, root: nn.Module | None):
        self.call, self.root = call, root

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """Whatever the hook does, on its own model."""
        if self.call is not None and module is self.root:
            return self.call(module, *args)
        return None

    def __deepcopy__(self, memo: Any) -> Hook:
        return Hook(None, None)

    def __reduce__(self) -> Any:
        return Hook, (None, None)


def _kind(found: Found, inputs: Inputs) -> Hashable:
    return inputs.kind(), modes(found.prefix), autocast()


def _trains(root: nn.Module) -> bool:
    return any(p.requires_grad for p in root.parameters()) and not merged_layers(root)


def _eager() -> bool:
    """Whether nobody is watching, tracing or transforming this forward."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
    )
