"""`CachedForward`: a model whose frozen beginning is looked up; no Lightning here."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lora_lightning.errors import ConfigError
from lora_lightning.training.prefix_cache.finding import (
    Found,
    check_stored,
    find,
    kind_of,
    reason,
    refusal,
    trains,
)
from lora_lightning.training.prefix_cache.hook import Hook, eager, hooked, last
from lora_lightning.training.prefix_cache.inputs import Inputs
from lora_lightning.training.prefix_cache.replay import Prefix, Record
from lora_lightning.training.prefix_cache.store import Store
from lora_lightning.training.prefix_cache.watch import Watch

_RENEWALS = 3  # in a row without a hit; then the weights change all the time
_KINDS = 50  # of arguments; more, and one of them is another in each step


class CachedForward:
    """Replaces the calls of the prefix in each forward of `root`, for as long as it is attached.

    The first forward with gradients finds the prefix and checks it. A forward that cannot be
    served exactly (other weights, modes, arguments) is left alone.

    Args:
        root: The model.
        store: For the features.
        eval_prefix: Compute the prefix in eval mode.

    Attributes:
        found: the prefix; None before the first forward with gradients.
        end: the module that the prefix ends before.
        lookups, hits: items; `training_hits` those of forwards with gradients.
        renewals: how often the weights were others, since the last hit.
        seconds: spent on finding and checking the prefix.
        off: why nothing is cached any more; "" while it is.
        why: the first reason for which a forward in training was left alone; "" for none.
        plain: what `eval_prefix` means for forwards that are left alone.

    Raises:
        ConfigError: the model has such a cache already.
    """

    def __init__(self, root: nn.Module, store: Store, eval_prefix: bool):
        if hooked(root):
            raise ConfigError("this model has a PrefixCache already: use one")
        self.root, self.store, self.eval_prefix = root, store, eval_prefix
        self.found: Found | None = None
        self.end = self.off = self.why = ""
        self.plain = ". They compute the prefix in the model's own mode" if eval_prefix else ""
        self.lookups = self.hits = self.training_hits = 0
        self.seconds = 0.0
        self._refusals: dict[Hashable, str] = {}  # kind of forward → why not; "": it is served
        self._last: Watch | None = None  # that of the latest prefix
        self._barren: list[Any] = []  # what it saw when no prefix was found any more
        self._unsure, self._rewritten = False, False  # whether weights are still what they were
        self._training = root.training
        self._told: set[str] = set()
        self._checked = False
        self._company: dict[bytes, int] = {}  # key → the batch that it was computed in
        self.renewals = 0
        self._replay: Any = None
        self._order: Any = None
        after = root.register_forward_hook(Hook(self._after, root), always_call=True)
        self._handles = [after, self._register()]

    def _register(self) -> Any:
        return self.root.register_forward_pre_hook(Hook(self._before, self.root), with_kwargs=True)

    def close(self, why: str = "detached") -> None:
        """Leave the model as it was, and give the memory back."""
        self._end_replay()
        for handle in self._handles:
            handle.remove()
        self.off = self.off or why
        self.found = None
        self.store.close()

    def check_weights(self) -> None:
        """Before the next forward, see whether weights were written to in ways that nobody counts.

        Through ``.data``, that is; done so when the model's mode changes, too.
        """
        self._unsure = True

    def tell(self, why: str) -> None:
        """Warn once of each reason for which forwards in training are left alone."""
        self.why = self.why or why
        if why not in self._told:
            self._told.add(why)
            rank_zero_warn(f"PrefixCache leaves some forwards alone: {why}{self.plain}")

    # ---- around a forward ------------------------------------------------------------------

    def _before(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._end_replay()  # of a forward that was interrupted
        if self.off or not eager():
            return
        if not last(root, self._handles[-1]):  # the next time it sees what the forward is given
            self._handles.pop().remove()
            self._handles.append(self._register())
            return
        inputs = Inputs(args, kwargs)
        if not inputs.usable:
            if torch.is_grad_enabled() and (why := inputs.obstacle):
                self.tell(why)
            return
        found = self._ready(inputs)
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
        held = shared in prefix.layouts
        stored = [self.store.get(key) if held else None for key in keys]
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
            prefix.layouts.trim(self.store.budget - self.store.used)
            self.store.reserved = prefix.layouts.nbytes
        elif not self._checked and len({self._company[key] for key in keys}) > 1:
            # The first batch of items that were computed in different batches.
            with self._timed():
                check_stored(prefix, inputs, [found[i] for i in range(inputs.size)])
            self._checked = True
            self._company.clear()
        return [found[i] for i in range(inputs.size)]

    # ---- is this forward one that can be served? -------------------------------------------

    def _ready(self, inputs: Inputs) -> Found | None:
        """What serves this forward; None: it is left alone."""
        found = self.found
        if found is None or self._changed(found):
            if not torch.is_grad_enabled() or not trains(self.root):
                return None  # a look with other weights for a while
            if found is not None:
                self._forget()
            found = None if self.off else self._find(inputs)
        return None if found is None or self._refusal(found, inputs) else found

    def _changed(self, found: Found) -> bool:
        if self._unsure or self.root.training is not self._training:
            self._unsure, self._training = False, self.root.training
            self._rewritten = found.watch.rewritten()
        return self._rewritten or found.watch.changed()

    def _refusal(self, found: Found, inputs: Inputs) -> str:
        """Why this forward is left alone although the prefix is what it was."""
        kind = kind_of(found, inputs)
        why = self._refusals.get(kind)
        if why is None and len(self._refusals) < _KINDS:
            with self._timed():
                why = self._refusals[kind] = refusal(found, inputs)
        elif why is None:
            why = "an argument that is no tensor, or a module's mode, is another each time"
        if why and torch.is_grad_enabled():
            self.tell(why)
        return why

    def _find(self, inputs: Inputs) -> Found | None:
        """The prefix as it is now; None where there is none any more, nor a change since."""
        if self._last is not None and self._last.structure() in self._barren:
            return None
        try:
            with self._timed():
                self.found = found = find(self.root, inputs, self.eval_prefix)
        except ConfigError as error:
            if self._last is None:
                raise
            self._barren.append(self._last.structure())
            self.tell(f"since weights, modes or adapters changed, {reason(error)}")
            return None
        self._last, self._barren = found.watch, []
        self._refusals[kind_of(found, inputs)] = ""
        self.end = found.end
        return found

    def _forget(self) -> None:
        """The weights are others: what is stored is of no use."""
        self.found = None
        self._refusals.clear()
        self._rewritten = False
        self.store.clear()
        self._checked = False
        self._company.clear()
        self.renewals += 1
        if self.renewals > _RENEWALS:
            self.off = (
                "the weights before the first trained layer, or attributes of the modules there, "
                "change all the time"
            )
            rank_zero_warn(f"PrefixCache is off: {self.off}{self.plain}")

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start
