"""`CachedForward`: a model whose frozen beginning is looked up; no Lightning here."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lora_lightning.errors import ConfigError
from lora_lightning.model.view import View
from lora_lightning.training.prefix_cache.check import Prefix, find_prefix, same
from lora_lightning.training.prefix_cache.cut import Record, Run
from lora_lightning.training.prefix_cache.store import Inputs, Store
from lora_lightning.training.prefix_cache.watch import aside

_RENEWALS = 3  # in a row without a hit; then the weights change all the time
_KINDS = 50  # of arguments; more, and one of them is another in each step


class _Hook:
    """A hook of one model, which copies of the model, and files of it, do not take along."""

    def __init__(self, call: Callable[..., Any] | None = None, root: nn.Module | None = None):
        self.call, self.root = call, root

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        return self.call(module, *args) if self.call and module is self.root else None

    def __reduce__(self) -> Any:
        return _Hook, ()


class CachedForward:
    """Serves what comes before the cut in each forward of `root`, for as long as it is attached.

    The first forward with gradients finds the cut and checks it. A forward that cannot be served
    exactly (other weights, modes, arguments) is left alone.

    Attributes:
        prefix: None before the first forward with gradients.
        end: the block that it ends before.
        lookups, hits: items; `training_hits` those of forwards with gradients.
        renewals: how often the weights were others, since the last hit.
        seconds: spent on checks.
        off: why nothing is cached any more; "" while it is.
        why: the first reason for which a forward in training was left alone; "" for none.

    Raises:
        ConfigError: the model has such a cache already.
    """

    def __init__(self, root: nn.Module, store: Store, eval_prefix: bool):
        if any(isinstance(h, _Hook) and h.call for h in root._forward_pre_hooks.values()):
            raise ConfigError("this model has a PrefixCache already: use one")
        self.root, self.store, self.eval_prefix = root, store, eval_prefix
        self.prefix: Prefix | None = None
        self.end = self.off = self.why = ""
        self.lookups = self.hits = self.training_hits = self.renewals = 0
        self.seconds = 0.0
        self._refusals: dict[Hashable, str] = {}  # kind of forward → why not; "": it is served
        self._look = self._waits = False  # at weights; for the end of the epoch
        self._training = root.training
        self._told: set[str] = set()
        self._batch_of: dict[bytes, int] = {}  # key → the batch that it was computed in
        self._compared = False
        self._run: tuple[Any, Run, Inputs] | None = None
        after = root.register_forward_hook(_Hook(self._after, root), always_call=True)
        self._handles = [after, self._register()]

    def _register(self) -> Any:
        hook = _Hook(self._before, self.root)
        return self.root.register_forward_pre_hook(hook, with_kwargs=True)

    def close(self, why: str = "detached") -> None:
        """Leave the model as it was, and give the memory back."""
        self._end()
        for handle in self._handles:
            handle.remove()
        self.off, self.prefix = self.off or why, None
        self.store.close()

    def check_weights(self) -> None:
        """Before the next forward, see whether weights were written to through ``.data``."""
        self._look, self._waits = True, False

    def tell(self, why: str) -> None:
        """Warn once of each reason for which forwards in training are left alone."""
        self.why = self.why or why
        if why not in self._told and torch.is_grad_enabled():
            self._told.add(why)
            rank_zero_warn(f"PrefixCache leaves some forwards alone: {why}")

    # ---- around a forward ------------------------------------------------------------------

    def _before(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._end()  # of a forward that was interrupted
        if self.off or not _eager():
            return
        if next(reversed(root._forward_pre_hooks)) != self._handles[-1].id:
            self._handles.pop().remove()  # a later hook may change the input: be the last again
            self._handles.append(self._register())
            return
        inputs = Inputs(args, kwargs)
        wanted = any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs.leaves)
        prefix = None if wanted and torch.is_grad_enabled() else self._ready(inputs)
        if prefix is not None:
            run = self._serve(prefix, inputs)
            self._run = prefix.cut.running(run), run, inputs
            self._run[0].__enter__()

    def _after(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        last, prefix = self._run, self.prefix
        self._end()
        if last is None or prefix is None or output is None:  # then another error is on its way
            return
        if not last[1].entered:
            raise prefix.cut.astray()
        prefix.note(last[2], last[1].layout)

    def _end(self) -> None:
        last, self._run = self._run, None
        if last is not None:
            last[0].__exit__(None, None, None)

    def _serve(self, prefix: Prefix, inputs: Inputs) -> Run:
        """A forward with the record of each item; noted where some are still to come."""
        size, shared = inputs.size, inputs.shared()
        keys, layout = inputs.keys(shared), prefix.layouts.get((shared, size))
        known = [self.store.records.get(key) for key in keys]
        missing = [i for i, record in enumerate(known) if record is None]
        hits = sum(self._batch_of.get(key, self.lookups) != self.lookups for key in keys)
        self.lookups += size
        self.hits += hits
        self.training_hits += hits * torch.is_grad_enabled()
        self.renewals *= not hits
        mixed = not missing and len({self._batch_of[key] for key in keys}) > 1
        first, self._compared = mixed and not self._compared, self._compared or mixed
        if first or layout is None or len(missing) == size or (missing and not inputs.separable):
            return Run(partial(self._keep, prefix, keys))
        if missing:
            with torch.inference_mode(False), torch.no_grad(), aside():
                some = prefix.cut.features(inputs.rows(missing))
            self._put([keys[i] for i in missing], some, self.lookups - 1)
            known = [record or some[missing.index(i)] for i, record in enumerate(known)]
        return Run(lambda given: None, [record for record in known if record], layout)

    def _keep(self, prefix: Prefix, keys: list[bytes], given: list[Any]) -> None:
        self._put(keys, prefix.cut.split(given, len(keys)), self.lookups - 1)

    def _put(self, keys: list[bytes], records: list[Record], batch: int) -> None:
        """Store what is new, and compare what is not."""
        for key, record in zip(keys, records, strict=True):
            known = self.store.records.get(key)
            if known is None and self.store.put(key, record):
                self._batch_of[key] = batch
            elif known is not None and not same([record], [known]):
                raise ConfigError(
                    "PrefixCache: stored features of an item differ from those computed now: they "
                    "depend on more than it and the shape of its batch. Leave PrefixCache out"
                )

    # ---- is this forward one that can be served? -------------------------------------------

    def _ready(self, inputs: Inputs) -> Prefix | None:
        """What serves this forward; None: it is left alone."""
        if why := inputs.obstacle:
            self.tell(why)
            return None
        if self.prefix is None or self._changed(self.prefix):
            trains = any(p.requires_grad for p in self.root.parameters())
            if not torch.is_grad_enabled() or self._waits or not trains or View(self.root).merged:
                return None  # a look with other weights for a while
            self._renew(inputs)
        if (prefix := self.prefix) is None:
            return None
        kind = prefix.kind(inputs)
        if kind not in self._refusals:
            self._refusals[kind] = "an argument that is no tensor, or a mode, is another each time"
            if len(self._refusals) <= _KINDS:
                self._refusals[kind] = self._timed(lambda: prefix.check(inputs))
        if why := self._refusals[kind]:
            self.tell(why)
        return None if why else prefix

    def _changed(self, prefix: Prefix) -> bool:
        look = self._look or self.root.training is not self._training
        self._look, self._training = False, self.root.training
        return prefix.watch.changed(look)

    def _timed(self, check: Callable[[], Any]) -> str:
        """Why a check failed; "" where it did not."""
        start = time.perf_counter()
        try:
            check()
        except ConfigError as error:
            return str(error).removeprefix("PrefixCache: ")
        finally:
            self.seconds += time.perf_counter() - start
        return ""

    def _renew(self, inputs: Inputs) -> None:
        """Find the prefix as it is now; what is stored is of no use any more."""
        self.prefix, self._compared = None, False
        self._refusals.clear()
        self._batch_of.clear()
        self.store.clear()
        self.renewals += bool(self.end)
        if self.renewals > _RENEWALS:
            self.off = "weights, or attributes, before the first trained block change all the time"
            rank_zero_warn(f"PrefixCache is off: {self.off}")
            return

        def find() -> None:
            self.prefix = find_prefix(self.root, inputs, self.eval_prefix)

        why = self._timed(find)
        if why and not self.end:
            raise ConfigError(f"PrefixCache: {why}")
        if self.prefix is None:
            self._waits = True
            self.tell(f"since weights, modes or adapters changed, {why}")
            return
        self.end = self.prefix.cut.path
        self._refusals[self.prefix.kind(inputs)] = ""
        self._put(inputs.keys(inputs.shared()), self.prefix.first, self.lookups)
        self.prefix.first = []


def _eager() -> bool:
    """Whether nobody is watching, tracing or transforming this forward."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
    )
