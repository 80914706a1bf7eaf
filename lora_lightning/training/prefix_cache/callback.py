"""`PrefixCache`: features before the first trained block, computed once and looked up after."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lora_lightning.errors import ConfigError
from lora_lightning.training.checks import find_backbone
from lora_lightning.training.prefix_cache.forward import CachedForward
from lora_lightning.training.prefix_cache.store import Store


class PrefixCache(Callback):
    r"""Compute what comes before the first trained block once per item, not once per epoch.

        Trainer(callbacks=[LoRACallback(blocks=[8, 9, 10, 11]), PrefixCache()])

    With adapters in later blocks only, the features before them are the same in every epoch. They
    are stored the first time that an item comes, found again by a hash of the item itself, and the
    calls of the modules before the first trained block are replaced by them. Order, batches and
    workers may change; items that change (augmentation) are noticed. With P the time of the
    prefix's forward pass and S that of forward and backward through the rest, an epoch becomes at
    most :math:`(P + S) / S` times as fast.

    The forward is cut at the first block that holds something trained. Exactness comes first: on
    the first training batch it is checked that features of an item do not depend on others, that
    nothing is random or moves before the cut, and that the model's output is what it is without
    the cache. In every forward weights, adapters, modes and arguments are compared with those of
    the check: one that differs is computed as if there were no cache, and weights that stay
    different begin a new one.

    Args:
        budget_mb: Room for features, in megabytes of 10⁶ bytes. What no longer fits is computed.
        folder: Where to put a file that is mapped into memory, removed at the end; None: memory.
        backbone: Attribute path of the network in the LightningModule, as `LoRACallback`'s.
        eval_prefix: Compute what comes before the first trained block in eval mode while training:
            no dropout and no moving statistics there. Without it a prefix with either is refused.
            Modules keep their own mode, in which forwards that are left alone are computed.

    Attributes:
        boundary_: the block that the prefix ends before.
        items_: items stored.
        megabytes_: their size.
        hit_rate_: part of all items asked for since the first epoch that were found.
        seconds_before_: of the first epoch, without what was spent on finding and checking the
            cut; NaN before.
        seconds_after_: of later epochs, the median; NaN before.
        speed_up_: their ratio.
        termination_condition_: why it was switched off; "" while it is on.

    Raises:
        ConfigError: on the first training batch, where nothing can be stored or not rightly.
    """

    def __init__(
        self,
        budget_mb: float = 1024,
        folder: str | Path | None = None,
        *,
        backbone: str = "model",
        eval_prefix: bool = False,
    ) -> None:
        if not 0 < budget_mb < float("inf"):
            raise ConfigError(f"budget_mb must be above 0 and finite, got {budget_mb}")
        self.budget_mb, self.backbone, self.eval_prefix = budget_mb, backbone, eval_prefix
        self.folder = None if folder is None else Path(folder)
        self.boundary_ = self.termination_condition_ = ""
        self.items_ = 0
        self.megabytes_ = self.hit_rate_ = 0.0
        self.seconds_before_ = self.seconds_after_ = float("nan")
        self._forward: CachedForward | None = None
        self._start = 0.0
        self._later: list[float] = []  # seconds of each epoch but the first
        self._epochs = 0
        self._first = (0, 0, 0)  # lookups, hits and those in training before the second epoch
        self._told_full = False
        self._why = ""  # of forwards that were left alone

    @property
    def speed_up_(self) -> float:
        """Seconds of the first epoch over seconds of a later one; NaN before there is one."""
        return self.seconds_before_ / self.seconds_after_

    # ---- without Lightning -----------------------------------------------------------------

    def attach(self, model: nn.Module) -> PrefixCache:
        """Begin to serve the forwards of `model`; in a ``with`` block until its end.

        Call `end_epoch` after each pass over the data, so that useless caching is noticed.

        Raises:
            ConfigError: it is attached already, or the model is compiled.
        """
        if self._forward is not None:
            raise ConfigError("this PrefixCache is attached already: detach() it first")
        if hasattr(model, "_orig_mod") or _compiled(model):
            raise ConfigError(
                "PrefixCache replaces calls of modules, and a compiled model makes none: attach it "
                "before torch.compile, and compile blocks behind the first trained layer instead"
            )
        store = Store(round(self.budget_mb * 1e6), self.folder)
        self._forward = CachedForward(model, store, self.eval_prefix)
        self.seconds_before_ = self.seconds_after_ = float("nan")
        self._later, self._epochs, self._told_full = [], 0, False
        self._start, self._first = time.perf_counter(), (0, 0, 0)
        return self

    def detach(self) -> None:
        """Leave the model as it was, and give memory or file back; nothing where not attached."""
        if self._forward is not None:
            self._measure(self._forward)
            self._forward.close()
            self._forward = None

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def end_epoch(self) -> None:
        """Note how long the epoch took; switch off where inputs are others each time."""
        forward = self._forward
        if forward is None:
            return
        seconds, self._start = time.perf_counter() - self._start, time.perf_counter()
        forward.check_weights()
        if _compiled(forward.root):
            forward.tell("the model was compiled in place, so that it calls no modules")
        if forward.prefix is None:
            self._measure(forward)
            return
        self._epochs += 1
        if self._epochs == 1:
            self.seconds_before_ = seconds - forward.seconds
            self._first = forward.lookups, forward.hits, forward.training_hits
        else:
            self._later.append(seconds)
        self._measure(forward)
        self._say_full(forward)
        useless = forward.training_hits == self._first[2] and not forward.renewals
        if self._epochs == 2 and useless and forward.store.used and not forward.off:
            self._switch_off(forward)

    def _measure(self, forward: CachedForward) -> None:
        self.boundary_, self.termination_condition_ = forward.end, forward.off
        self._why = forward.why
        if not forward.off:
            self.items_, self.megabytes_ = len(forward.store.records), forward.store.used / 1e6
        asked, found = forward.lookups - self._first[0], forward.hits - self._first[1]
        self.hit_rate_ = found / asked if asked else 0.0
        if self._later:
            self.seconds_after_ = statistics.median(self._later)

    def _say_full(self, forward: CachedForward) -> None:
        if forward.store.refused and not self._told_full:
            self._told_full = True
            rank_zero_warn(
                f"PrefixCache: budget_mb={self.budget_mb:g} holds {self.items_} items, and there "
                "was no room for others, which are computed each time. Give a larger budget, or a "
                "folder"
            )

    def _switch_off(self, forward: CachedForward) -> None:
        why = self.termination_condition_ = (
            "no item of the second epoch was one of the first: inputs change in every epoch "
            "(random augmentation?), so that storing features is of no use"
        )
        forward.close(why)
        rank_zero_warn(f"PrefixCache is off: {why}. Take the randomness out, or PrefixCache")

    def summary(self) -> str:
        """What was stored and what it brought, in a line."""
        if not self.boundary_:
            return f"nothing stored: {self._why or 'the network was not called in training'}"
        if self.termination_condition_:
            return f"off, {self.termination_condition_}"
        told = (
            f"features before {self.boundary_}, {self.items_} items in {self.megabytes_:.1f} MB, "
            f"hit rate {self.hit_rate_:.1%}"
        )
        if self._later:
            told += (
                f", {self.seconds_before_:.2f} s an epoch before and {self.seconds_after_:.2f} s "
                f"after, {self.speed_up_:.1f} times as fast"
            )
        return told

    # ---- Lightning -------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the network."""
        network = find_backbone(pl_module, self.backbone)
        if network is pl_module and not isinstance(trainer.strategy, SingleDeviceStrategy):
            raise ConfigError(
                "PrefixCache on several devices needs backbone=, the path of the network in the "
                "LightningModule"
            )
        self.detach()
        self.attach(network)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch begins."""
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch is over."""
        self.end_epoch()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what it brought."""
        if self._forward is not None:
            self._measure(self._forward)
            rank_zero_info(f"PrefixCache: {self.summary()}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the network its own calls back."""
        self.detach()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """A fit that failed leaves nothing behind."""
        self.detach()


def _compiled(model: nn.Module) -> bool:
    """Whether ``model.compile()`` was called."""
    return getattr(model, "_compiled_call_impl", None) is not None
