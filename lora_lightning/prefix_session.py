"""`CachedForward`: a model whose frozen beginning is looked up; no Lightning here."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.prefix_calls import Beginning, first_calls
from lora_lightning.prefix_flow import mark_used
from lora_lightning.prefix_inputs import Inputs, autocast
from lora_lightning.prefix_replay import Prefix, Record, aside, same
from lora_lightning.prefix_store import Store
from lora_lightning.prefix_watch import Watch, modes, noise, recomputes
from lora_lightning.probe import floats, preserved
from lora_lightning.state import merged_layers

_FEW = 2  # items to find the prefix with, where rows can be taken out of a batch
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
        prefix: None before the first forward with gradients.
        end: the module that the prefix ends before.
        lookups, hits: items.
        seconds: spent on finding and checking the prefix.
        off: why nothing is cached any more; "" while it is.
    """

    def __init__(self, root: nn.Module, store: Store, eval_prefix: bool):
        self.root, self.store, self.eval_prefix = root, store, eval_prefix
        self.prefix: Prefix | None = None
        self.end = self.off = ""
        self.lookups = self.hits = 0
        self.seconds = 0.0
        self._watch: Watch | None = None
        self._modes: tuple[bool, ...] = ()
        self._refusals: dict[Hashable, str] = {}  # kind of forward → why not; "": it is served
        self._checked = False
        self._renewals = 0
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
        if self.eval_prefix and self.prefix is not None:
            for module in self.prefix.modules.values():
                module.training = self.root.training
        self.off = self.off or why
        self.store.close()

    def check_weights(self) -> None:
        """Start anew where weights were written to in ways that no version counter shows."""
        if self._watch is not None and self._watch.rewritten():
            self._forget()

    # ---- around a forward ------------------------------------------------------------------

    def _before(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._end_replay()  # of a forward that was interrupted
        if self.off or not _eager():
            return
        inputs = Inputs(args, kwargs)
        if not inputs.usable or not self._ready(inputs):
            return
        assert self.prefix is not None
        shared = inputs.shared()
        records = self._look_up(self.prefix, inputs, shared)
        self._replay = self.prefix.replayed(records, shared)
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
        keys = inputs.keys(shared)
        found = [self.store.get(key) for key in keys]
        missing = [i for i, record in enumerate(found) if record is None]
        self.lookups += inputs.size
        self.hits += inputs.size - len(missing)
        if len(missing) < inputs.size:
            self._renewals = 0
        if missing:
            # Items alone, or the whole batch where another argument may tell their lengths.
            index = missing if inputs.separable else list(range(inputs.size))
            whole = len(index) == inputs.size
            computed = prefix.compute(inputs if whole else inputs.rows(index), shared)
            for i, record in zip(index, computed, strict=True):
                if self.store.get(keys[i]) is None:
                    self.store.put(keys[i], record)
                found[i] = found[i] or record
        records = [record for record in found if record is not None]
        if not missing and not self._checked:
            self._check(prefix, inputs, records)
        return records

    def _check(self, prefix: Prefix, inputs: Inputs, records: list[Record]) -> None:
        """The first batch that is all looked up, most likely in other company than before."""
        start = time.perf_counter()
        now = prefix.values(prefix.outputs(inputs))
        stored = prefix.joined(records)
        if not all(same(a.to(b.device), b) for a, b in zip(stored, now, strict=True)):
            raise ConfigError(
                "PrefixCache: stored features differ from those computed anew for the same items: "
                "they depend on more than the item and the shape of its batch. Leave PrefixCache "
                "out"
            )
        self._checked = True
        self.seconds += time.perf_counter() - start

    # ---- is this forward one that can be served? -------------------------------------------

    def _ready(self, inputs: Inputs) -> bool:
        if self.prefix is None or self._watch is None or self._watch.changed():
            if not torch.is_grad_enabled() or not _trains(self.root):
                return False  # a look with other weights for a while
            if self.prefix is not None:
                self._forget()
            if self.off:
                return False
            self._find(inputs)
        assert self.prefix is not None
        if self.eval_prefix:
            for module in self.prefix.modules.values():
                module.training = False
        kind = inputs.kind(), modes(self.prefix), autocast()
        if kind not in self._refusals:
            self._refusals[kind] = why = self._timed(self._try, inputs)
            if why and torch.is_grad_enabled():
                rank_zero_warn(f"PrefixCache leaves some forwards alone: {why}")
        return not self._refusals[kind]

    def _forget(self) -> None:
        """The weights are others: what is stored is of no use."""
        self.prefix = self._watch = None
        self._refusals.clear()
        self.store.clear()
        self._checked = False
        self._renewals += 1
        if self._renewals > _RENEWALS:
            self.off = "the weights before the first trained layer change all the time"
            rank_zero_warn(f"PrefixCache is off: {self.off}")

    def _find(self, inputs: Inputs) -> None:
        self.prefix, self._watch, self.end, self._modes = self._timed(self._found, inputs)
        kind = inputs.kind(), modes(self.prefix), autocast()
        self._refusals[kind] = why = self._timed(self._try, inputs)
        if why:
            self.prefix = None
            raise ConfigError(f"PrefixCache: {why}")

    def _found(self, inputs: Inputs) -> tuple[Prefix, Watch, str, tuple[bool, ...]]:
        few = _few(inputs)
        beginning = first_calls(self.root, few)
        _refuse_nothing(self.root, beginning)
        prefix = Prefix(self.root, mark_used(self.root, few, beginning.calls))
        if where := recomputes(prefix):
            raise ConfigError(
                f"PrefixCache: {where} is on, which runs the prefix again in the backward pass. "
                "Switch it off: with the cache there are no activations of the prefix to save"
            )
        if self.eval_prefix:
            for module in prefix.modules.values():
                module.training = False
        if why := noise(prefix):
            raise ConfigError(
                f"PrefixCache: {why}, so that features before {beginning.end} differ each time. "
                "PrefixCache(eval_prefix=True) keeps that part in eval mode while training"
            )
        prefix.learn(few)
        return prefix, Watch(prefix, beginning.touched), beginning.end, modes(prefix)

    def _try(self, inputs: Inputs) -> str:
        """Why forwards of this kind, in these modes, cannot be served; "" where they can."""
        assert self.prefix is not None
        prefix, few = self.prefix, _few(inputs)
        if why := noise(prefix):
            return why
        shared = few.shared()
        records = prefix.compute(few, shared)
        real = self._output(few)
        with prefix.replayed(records, shared) as order:
            replayed = self._output(few)
        if not real or order.at < len(order.calls) or not all(map(same, real, replayed)):
            return (
                "with stored features the model's output is not what it is without (a forward "
                "that reaches into its modules, or gives what is no tensor)"
            )
        if modes(prefix) != self._modes:
            now = prefix.joined(records)
            for module, mode in zip([self.root, *prefix.modules.values()], self._modes, strict=True):
                module.training = mode
            then = prefix.values(prefix.outputs(few))
            if not all(map(same, now, then)):
                return "features differ between training and eval mode"
        return ""

    def _output(self, inputs: Inputs) -> list[Tensor]:
        args, kwargs = inputs.call()
        with aside(inputs, seed=0):
            return [x.clone() for x in floats(self.root.forward(*args, **kwargs))]

    def _timed(self, work: Callable[[Inputs], Any], inputs: Inputs) -> Any:
        start = time.perf_counter()
        with preserved(self.root), aside(inputs, None), torch.no_grad():
            try:
                return work(inputs)
            finally:
                torch.clear_autocast_cache()  # casts made here know no gradient
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


def _few(inputs: Inputs) -> Inputs:
    separable = inputs.separable and inputs.size > _FEW
    return inputs.rows(list(range(_FEW))) if separable else inputs


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


def _refuse_nothing(root: nn.Module, beginning: Beginning) -> None:
    """Raises `ConfigError` where there is no prefix worth storing."""
    if not beginning.end:
        raise ConfigError(
            f"PrefixCache: this forward of {type(root).__name__} uses nothing that is trained"
        )
    if all(call.cheap for call in beginning.calls):
        raise ConfigError(
            f"PrefixCache: {beginning.end} is trained, or has a hook, and no layer comes before it: "
            "there is nothing to store. Adapt later blocks only, LoRACallback(blocks=[-2, -1]), "
            "or leave PrefixCache out"
        )
