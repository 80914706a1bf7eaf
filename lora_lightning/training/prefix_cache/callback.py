"""`PrefixCache`: features before the first trained block, computed once and looked up after."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import check_number
from lora_lightning.model.verification import verifying
from lora_lightning.model.view import View
from lora_lightning.training.checks import find_backbone
from lora_lightning.training.launch import LaunchedCallback
from lora_lightning.training.prefix_cache.check import Watch, find_cut, obstacle, same
from lora_lightning.training.prefix_cache.cut import Cut, Layout, Run, shapes
from lora_lightning.training.prefix_cache.store import Inputs, Store


class PrefixCache(LaunchedCallback):
    r"""Compute what comes before the first trained block once per item, not once per epoch.

    Features before the first trained block are stored the first time that an item comes, and found
    again by a hash of the item itself. With P the time of the prefix's forward pass and S that of
    forward and backward through the rest, an epoch becomes at most :math:`(P + S) / S` times as
    fast. On the first training batch it is checked that nothing else changes, or a `ConfigError`
    raised; a forward with other weights, adapters or arguments is computed as ever.

    Args:
        budget_mb: Room for features, in megabytes of 10⁶ bytes. What no longer fits is computed.
        folder: Where to put a file, removed at the end; None: memory. A full disk ends the storing.
        backbone: Attribute path of the network in the LightningModule, as `LoRACallback`'s.
        eval_prefix: Compute what comes before the first trained block in eval mode while training:
            no dropout and no moving statistics there. Without it a prefix with either is refused.

    Attributes:
        boundary_: the block that the prefix ends before; "" before the first training batch.
        items_, megabytes_: what is stored.
        hit_rate_: part of the items trained on, since the first epoch, that were served.
        termination_condition_: why it was switched off; "" while it is on.
    """

    def __init__(
        self,
        budget_mb: float = 1024,
        folder: str | Path | None = None,
        *,
        backbone: str = "model",
        eval_prefix: bool = False,
    ) -> None:
        check_number("budget_mb", budget_mb, "(0, inf)")
        self.budget_mb, self.backbone, self.eval_prefix = budget_mb, backbone, eval_prefix
        self.folder = None if folder is None else Path(folder)
        self._root: nn.Module | None = None
        self._store: Any = None
        self._reset()

    def _reset(self) -> None:
        self.boundary_ = self.termination_condition_ = self._why = ""
        self.items_, self.megabytes_, self.hit_rate_ = 0, 0.0, 0.0
        self._cut: Cut | None = None
        self._layouts: dict[Any, Layout] = {}
        self._run: tuple[Run, Any] | None = None
        self._running, self._look, self._mode = ExitStack(), False, True
        self._lookups = self._hits = self._renewals = self._epochs = 0

    def __reduce__(self) -> Any:
        """Copies of the model, and files of it, take nothing along."""
        kept = ("backbone", "eval_prefix", "_known_there")
        return PrefixCache, (self.budget_mb, self.folder), {k: getattr(self, k) for k in kept}

    def attach(self, model: nn.Module) -> PrefixCache:
        """Begin to serve the forwards of `model`; in a ``with`` block until its end.

        Call `end_epoch` after each pass over the data, so that useless caching is noticed.
        """
        hooks = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
        if self._root or any(isinstance(x, PrefixCache) and x._root is model for x in hooks):
            raise ConfigError("the model has a PrefixCache already, or this one a model: detach it")
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            raise ConfigError("a compiled model calls no modules: attach before torch.compile")
        self._reset()
        self._store, self._root = Store(round(self.budget_mb * 1e6), self.folder), model
        self._hook = model.register_forward_pre_hook(self._before, with_kwargs=True)
        self._own = model.__dict__.get("forward")  # a hook would not hear of Ctrl-C
        forward = partial(self._forward, model, self._own)
        # With the signature of the model's own, by which a batch becomes a call.
        model.__dict__["forward"] = update_wrapper(forward, self._own or model.forward)
        return self

    def detach(self) -> None:
        """Leave the model as it was, and give memory or file back; nothing where not attached."""
        if self._root is not None:
            self._running.close()
            self._hook.remove()
            del self._root.__dict__["forward"]
            self._root.__dict__.update({} if self._own is None else {"forward": self._own})
            self._root = self._cut = self._store = None

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def end_epoch(self) -> None:
        """Switch off where inputs are others each time."""
        self._look = True
        self._epochs += bool(self.boundary_)
        if self._epochs == 2 and self._root and not self._hits:
            why = "inputs change in every epoch (random augmentation?), or budget_mb is too small"
            self._switch_off(f"no batch of the second epoch was stored: {why}")
        if self._epochs < 2:
            self._lookups = self._hits = 0

    def _switch_off(self, why: str) -> None:
        self.termination_condition_ = why
        self.detach()
        rank_zero_warn(f"PrefixCache is off: {why}")

    def summary(self) -> str:
        """What was stored and how much of it was found, in a line."""
        if self.termination_condition_:
            return f"off, {self.termination_condition_}"
        if not self.boundary_:
            return f"nothing stored: {self._why or 'the network was not called in training'}"
        told = f"features before {self.boundary_}, {self.items_} items in {self.megabytes_:.1f} MB"
        return f"{told}, hit rate {self.hit_rate_:.1%}"

    def _before(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if root is not self._root or verifying():  # by other weights, and in another precision
            return
        self._running.close()  # of one that was interrupted right here
        self._run = None
        if next(reversed(root._forward_pre_hooks)) != self._hook.id:  # may change the input
            return
        inputs, traced = Inputs(args, kwargs), torch._C._get_tracing_state()
        if not torch.compiler.is_compiling() and not traced and (cut := self._ready(root, inputs)):
            self._run = self._plan(cut, inputs)
            self._running.enter_context(cut.running(self._run[0]))

    def _forward(self, root: nn.Module, own: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward; however it ends, its modules have their own again."""
        forward = own or type(root).forward.__get__(root)
        if root is not self._root or verifying() or torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with self._running:
            output = forward(*args, **kwargs)
        if self._run and self._cut:
            (run, key), self._run = self._run, None
            known = self._layouts.setdefault(key, run.layout)
            if not run.entered or shapes(known) != shapes(run.layout):
                raise self._cut.astray()
        return output

    def _plan(self, cut: Cut, inputs: Inputs) -> tuple[Run, Any]:
        """Served where all items are stored, and a batch like this was seen; else noted."""
        shared, keys = inputs.keys()
        key = shared, inputs.size, tuple(m.training for _, m in (*cut.before, *cut.around))
        stored = key in self._layouts and all(k in self._store for k in keys)
        found = [self._store.get(k) for k in keys] if stored else []
        records = [record for record in found if record is not None]
        hits = inputs.size if len(records) == len(keys) else 0
        if torch.is_grad_enabled():
            self._lookups, self._hits = self._lookups + inputs.size, self._hits + hits
            self.hit_rate_ = self._hits / self._lookups

        def keep(given: list[Any]) -> None:
            room = not self._store.obstacle
            for k, record in zip(keys, cut.split(given, inputs.size), strict=True):
                known = self._store.get(k)
                if known is not None and not same(record, known):
                    raise cut.astray()
                self._store.put(k, record)
            self.items_, self.megabytes_ = len(self._store), self._store.used / 1e6
            if room and self._store.obstacle:
                rank_zero_warn(f"PrefixCache stores no more: {self._store.obstacle}")

        return Run(lambda _: None, records, self._layouts[key]) if hits else Run(keep), key

    def _ready(self, root: nn.Module, inputs: Inputs) -> Cut | None:
        """What serves this forward; None: it is left alone."""
        training, why = torch.is_grad_enabled(), inputs.obstacle
        if training and any(isinstance(x, Tensor) and x.requires_grad for x in inputs.leaves):
            return None
        look = self._look or root.training is not self._mode
        self._look, self._mode = False, root.training
        if not why and (self._cut is None or self._watch.changed(look)):
            if not training or View(root).merged:
                return None  # a look with other weights for a while
            self._renew(root, inputs)
        if not why and self._cut is not None and not (why := obstacle(self._cut)):
            if inputs.kind() == self._kind:
                return self._cut
            why = "arguments, precision, or one item or more, differ from the first batch"
        if why and training and not self._why:
            self._why = why
            rank_zero_warn(f"PrefixCache leaves some forwards alone: {why}")
        return None

    def _renew(self, root: nn.Module, inputs: Inputs) -> None:
        """Find the cut as it is now; what is stored is of no use any more."""
        self._store.clear()
        self._layouts.clear()
        self._renewals += bool(self.boundary_)
        try:
            if self._renewals > 3:
                raise ConfigError("weights, or attributes, before the cut change all the time")
            self._cut = find_cut(root, inputs, self.eval_prefix)
        except ConfigError as error:
            if not self.boundary_:
                raise
            self._switch_off(f"since weights or adapters changed, {error}")
            return
        self.boundary_, self._kind, self._watch = self._cut.path, inputs.kind(), Watch(self._cut)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the network."""
        network = find_backbone(pl_module, self.backbone)
        if network is pl_module and not isinstance(trainer.strategy, SingleDeviceStrategy):
            raise ConfigError("PrefixCache on several devices needs the network's path: backbone=")
        self.detach()
        self.attach(network)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch is over."""
        self.end_epoch()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what it brought."""
        rank_zero_info(f"PrefixCache: {self.summary()}")

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Give the network its own calls back."""
        self.detach()

    on_exception = teardown  # a fit that failed leaves nothing behind
