"""`FitGuard`: a callback against underfitting and overfitting on few items."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import check_count, check_number
from lora_lightning.model.compression import set_ranks
from lora_lightning.model.shrinkage import adapter_values, pull_to_source, restore, shrink, undone
from lora_lightning.model.switching import disabled
from lora_lightning.training import checks
from lora_lightning.training.gain_test import SHARES, Look, choose, diagnose
from lora_lightning.training.launch import LaunchedCallback
from lora_lightning.training.lora_callback import LoRACallback
from lora_lightning.training.lower_rank import lower_while_no_worse, ranks_of
from lora_lightning.training.steps import gradient_scale, loss_in
from lora_lightning.training.validation_losses import (
    Loss,
    first_batches,
    held_out_batches,
    losses_of,
    training_items,
)

TINY = 50  # training items; below, a lower rank is tried
PRIOR = 1.0  # training items that L2-SP weighs as much as


class FitGuard(LaunchedCallback):
    """Early stopping on held-out loss; shrinks towards the source; lowers the rank.

        Trainer(callbacks=[LoRACallback(rank=8), FitGuard()]).fit(module, data)

    Before training the source model's held-out loss is measured, and after each epoch the adapted
    model's. Training stops once the held-out loss has not fallen for `patience` epochs;
    the best epoch is restored. Then the guard tries how far to go from the source (see
    `lora_lightning.shrink`) and keeps the share with the lowest held-out loss, if that is
    significantly better than the source's (see `gain_test.choose`), and otherwise the source model,
    with a warning. Where training items are few it then halves the rank for as long as that costs
    nothing, and during training it penalises the distance from the source (L2-SP). `LoRACallback`
    writes the adapter file after that; checkpoints hold the state before it.

    All that is trained must lie within the `LoRACallback`'s backbone, as nothing outside is
    restored; and averages of weights would overwrite the choice.

    With a few dozen items or less a held-out part leaves too little on either side: use
    `lora_lightning.cross_fit`.

    Args:
        held_out: Batches that are not trained on; None: the trainer's validation batches. Of up
            to 256 items in a ``DataLoader`` the loss of each is taken, for the paired test.
        loss: From (LightningModule, batch) to a scalar or one value for each item (B,), lower is
            better; None: what ``training_step`` returns. Given one that needs no labels (the
            predictions' negative nuclear norm, see `lora_lightning.adaptation.validators`),
            the held-out batches may be unlabelled; they are then taken as they come.
        patience: Epochs without a lower held-out loss before training stops.
        shares: How far to go from the source, to choose from.
        l2_sp: α of the penalty, see `lora_lightning.model.shrinkage.pull_to_source`; None: 1/n for
            n training items, 0 where n is not known.
        lower_rank: Whether to try lower ranks at the end; None: with fewer than 50 training items.

    Attributes:
        history_: A `Look` for each epoch, the first of them of the source model.
        verdict_: Text: underfitting, overfitting or neither, and what to do.
        termination_condition_: Why training stopped.
        shrinkage_: The share that was kept: 0 is the source model.
        rank_: The largest rank of a layer at the end.

    Raises:
        ConfigError: not one `LoRACallback` before it, weights that are averaged, something
            trained outside the backbone, nothing held out, or a loss that is none.
    """

    def __init__(
        self,
        held_out: Iterable[Any] | None = None,
        *,
        loss: Loss | None = None,
        patience: int = 3,
        shares: Sequence[float] = SHARES,
        l2_sp: float | None = None,
        lower_rank: bool | None = None,
    ) -> None:
        check_count("patience", patience, unit="epoch")
        if not shares or any(not 0 < a <= 1 for a in shares):
            raise ConfigError(f"shares must lie in (0, 1], got {list(shares)}")
        if l2_sp is not None:
            check_number("l2_sp", l2_sp, "[0, inf)")
        self.held_out, self.loss = held_out, loss
        self.patience, self.shares = patience, tuple(shares)
        self.l2_sp, self.lower_rank = l2_sp, lower_rank
        self.history_: list[Look] = []
        self.verdict_ = self.termination_condition_ = ""
        self.shrinkage_: float | None = None
        self.rank_: int | None = None
        self._adapter: LoRACallback | None = None
        self._batches: Iterable[Any] = ()
        self._source = torch.empty(0, device="cpu")  # its held-out losses
        self._best: dict[str, Tensor] = {}  # the adapter after its best epoch
        self._epoch: list[Tensor] = []  # training losses of this epoch
        self._pull = 0.0
        self._lowered: dict[str, int] = {}  # layer → its rank, where ranks were lowered

    @property
    def keeps_source(self) -> bool:
        """Whether the source model was kept: then `LoRACallback` writes no file."""
        return self.shrinkage_ == 0

    # ---- before training -------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the `LoRACallback` that is watched."""
        super().setup(trainer, pl_module, stage)
        self._adapter = checks.watched(trainer, self, LoRACallback)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse trained tensors outside the backbone."""
        assert self._adapter is not None
        checks.check_all_within(pl_module, self._adapter.backbone, "FitGuard")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the source model, unless the fit is resumed."""
        self._batches = held_out_batches(trainer, self.held_out, self.loss)
        items = training_items(trainer)
        self._pull = PRIOR / items if self.l2_sp is None and items else self.l2_sp or 0.0
        if self.history_ and not checks.is_new(trainer):
            return
        self.termination_condition_, self.shrinkage_, self._lowered = "", None, {}
        with disabled(self._network(pl_module)):
            self._source = self._evaluate(trainer, pl_module)
            training = losses_of(pl_module, first_batches(trainer.train_dataloader), None)
        self.history_ = [Look(0, float(training.mean()), float(self._source.mean()))]

    def _network(self, pl_module: LightningModule) -> nn.Module:
        assert self._adapter is not None
        return checks.find_backbone(pl_module, self._adapter.backbone)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> Tensor:
        """The losses on the held-out batches."""
        found = losses_of(pl_module, self._batches, self.loss)
        # Rank 0's for all processes, which must take the same decisions.
        return trainer.strategy.broadcast(found) if trainer.world_size > 1 else found

    # ---- while training --------------------------------------------------------------------

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Add L2-SP's gradient, after accumulation and averaging, at the scale of the others."""
        if self._pull:
            scale = gradient_scale(trainer, optimizer)
            pull_to_source(self._network(pl_module), self._pull * scale)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the training loss."""
        loss = loss_in(outputs)
        if isinstance(loss, Tensor):
            self._epoch.append(loss.detach())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the held-out batches; keep the best epoch; stop early."""
        losses = self._evaluate(trainer, pl_module)
        training = float(torch.stack(self._epoch).mean()) if self._epoch else math.nan
        self._epoch = []
        held_out = float(losses.mean())
        finite = math.isfinite(held_out)
        look = Look(trainer.current_epoch + 1, training, held_out if finite else math.inf)
        best = min(self.history_[1:], key=attrgetter("held_out"), default=None)
        if best is None or look.held_out < best.held_out:
            best, self._best = look, adapter_values(self._network(pl_module))
        self.history_.append(look)
        if not finite or look.epoch - best.epoch >= self.patience:
            trainer.should_stop = True
            self.termination_condition_ = (
                f"the held-out loss has not fallen for {look.epoch - best.epoch} epochs"
                if finite
                else f"the held-out loss is no number after epoch {look.epoch}"
            )

    # ---- at the end ------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the best epoch and shrink it, before the adapter file is written."""
        if len(self.history_) < 2:
            return
        network = self._network(pl_module)
        restore(network, self._best)
        losses = {}
        for share in self.shares:
            with undone(network):
                shrink(network, share)
                losses[share] = self._evaluate(trainer, pl_module)
        choice = choose(self._source, losses)
        shrink(network, choice.share)
        self.shrinkage_ = choice.share
        tiny = 0 < training_items(trainer) < TINY if self.lower_rank is None else self.lower_rank
        if choice.share and tiny:
            self._lower_rank(trainer, pl_module, float(losses[choice.share].mean()))
        self.rank_ = max(ranks_of(network).values())
        self.verdict_ = diagnose(self.history_)
        self.termination_condition_ = self.termination_condition_ or "all epochs"
        rank_zero_info(f"FitGuard: {self.verdict_}")
        choice.say("FitGuard")

    def _lower_rank(self, trainer: Trainer, pl_module: LightningModule, loss: float) -> None:
        """Halve the rank for as long as the held-out loss is no higher."""
        network, evaluate = self._network(pl_module), partial(self._evaluate, trainer, pl_module)
        self._lowered = lower_while_no_worse(network, loss, evaluate, trainer.optimizers)
        if self._lowered:
            self._best = adapter_values(network)  # a fit resumed from here has these shapes

    # ---- processes that the trainer starts, and resuming -----------------------------------

    def held(self) -> dict[str, Any]:
        """The results, and the ranks where they were lowered."""
        return {**super().held(), "_lowered": self._lowered}

    def take(self, trainer: Trainer, pl_module: LightningModule, held: dict[str, Any]) -> None:
        """Give the adapter the ranks that it got, before its weights come."""
        super().take(trainer, pl_module, held)
        if self._lowered:
            self._adapter = checks.watched(trainer, self, LoRACallback)
            set_ranks(self._network(pl_module), self._adapter.name, self._lowered)

    def state_dict(self) -> dict[str, Any]:
        """The history, and the best epoch's adapter, for a checkpoint."""
        return {
            "history": [asdict(look) for look in self.history_],
            "source": self._source,
            "best": self._best,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.history_ = [Look(**look) for look in state_dict["history"]]
        self._source, self._best = state_dict["source"], state_dict["best"]
