"""`TransductiveTask`: adapt a classifier to unlabelled items, by a loss that needs no labels."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_lightning.adaptation.guard import Limits
from lora_lightning.adaptation.loss import Loss, Objective
from lora_lightning.adaptation.rounds import Round, Rounds, say
from lora_lightning.adaptation.target import Canary, Predicted, Target, seen_by
from lora_lightning.adaptation.validators import information
from lora_lightning.errors import ConfigError
from lora_lightning.model.batch_norm import reestimated
from lora_lightning.model.introspection import classifier_modules
from lora_lightning.training.optimised_module import Optimised

BATCH_NORM = ("auto", "source", "target")
# Of the information that the source's predictions lack, as much as BatchNorm's statistics of the
# target must bring: less they also bring where classes are missing, or where nothing helps.
GAIN = 0.18
SOURCE_ITEMS = 8  # that the source's statistics count for beside the target's items


class TransductiveTask(Optimised):
    r"""Adapt `model` to the items of `target` without their labels, and leave it no worse.

        task = TransductiveTask(model, target)
        Trainer(max_epochs=4, callbacks=[LoRACallback(trainable=[])]).fit(task)
        task.probabilities_  # of each item of the target

    The loss of a batch is
    :math:`\frac1B\sum_i H(p_i) + d\,KL(\bar p \| \pi) + w\,CE(p_i, \hat y_i)`: sure of each item,
    spread over the classes as the prior π, and true to the pseudo-labels ŷ by the nearest class
    centroid, taken anew in each epoch (SHOT, Liang et al. 2020, arXiv:2002.08546). Train the
    factors only: the head that the source model learnt is what its features are measured by.

    After each epoch a round ends: the `Guard` compares the predictions of all items with the
    source model's. At the first alarm training stops, and the last accepted state comes back; if
    there is none, the source model.

    Args:
        model: The network, from inputs (B, …) to logits (B, K); `LoRACallback` finds it as
            ``model``.
        target: The items, see `lora_lightning.adaptation.target.Target`. Labels that come with
            them are not looked at.
        objective: ``"information-maximisation"``, ``"neighbour-consistency"`` (NRC's, with the
            spread over the classes), ``"minimum-class-confusion"``, ``"entropy"`` (TENT's, which
            collapses easily), or a function from logits to a loss.
        training: The same items as they are to be trained on, where those differ (by random
            crops, say); None: `target`.
        augment: Applied to each input in training, not where the target is labelled.
        pseudo_label_weight: w; 0: no pseudo-labels.
        diversity: d; 0 where the target lacks classes, or holds things of no class.
        source_weight: v of :math:`v\,KL(p^s_i \| p_i)`, which holds to the source's predictions.
        pull: λ of :math:`\lambda\sum_l\|s_l B_l A_l\|_F^2`, which holds to the source's weights.
        canary: A few labelled items of the target, (input, class): a round that does worse on them
            than the source model sets off an alarm. They are not trained on.
        prior: π, the share of each class in the target; None: uniform.
        batch_norm: ``"target"`` takes BatchNorm's statistics anew from the target before
            training, ``"source"`` leaves them. ``"auto"`` takes them where the predictions gain
            information by it and the guard accepts them; where not, the target is near the
            source, or so strange that its own predictions teach nothing: the source model stays.
            While training they stay as they are. Without BatchNorm all three are the same.
        limits: Of the guard; None: no guard.
        plot: A PNG of the rounds, written at the end; None: none.
        batch_size: Items in a batch.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's; not applied to biases, norms and other vectors.
        schedule: ``"one-cycle"`` (warm-up, then cosine to near 0), ``"cosine"``, ``"constant"``.

    Attributes:
        rounds_: the course of it, a `Rounds`.

    Raises:
        ConfigError: a value is out of range, or items of another kind than expected.
        DataError: the target is empty, or the model gives NaN for some of it.
    """

    def __init__(
        self,
        model: nn.Module,
        target: Any,
        objective: str | Objective = "information-maximisation",
        *,
        training: Any = None,
        augment: Callable[[Any], Any] | None = None,
        pseudo_label_weight: float = 0.3,
        diversity: float = 1.0,
        source_weight: float = 0.0,
        pull: float = 0.0,
        canary: Any = None,
        prior: Tensor | None = None,
        batch_norm: str = "auto",
        limits: Limits | None = Limits(),  # noqa: B008 - frozen
        plot: Path | str | None = None,
        batch_size: int = 32,
        learning_rate: float = 4e-3,
        weight_decay: float = 0.01,
        schedule: str = "one-cycle",
    ):
        super().__init__(learning_rate, weight_decay, schedule)
        self.loss = Loss(objective, prior, diversity, pseudo_label_weight, source_weight, pull)
        if batch_norm not in BATCH_NORM:
            raise ConfigError(
                f"batch_norm must be one of {', '.join(BATCH_NORM)}; got {batch_norm!r}"
            )
        if batch_size < 2:
            raise ConfigError(f"batch_size must be at least 2, got {batch_size}")
        # In training mode, as a Trainer expects it; it is looked at in eval mode.
        self.model = model.train()
        self.target = Target(target)
        self.training_items = Target(target if training is None else training, augment)
        if len(self.target) != len(self.training_items):
            raise ConfigError(
                f"target and training must be the same items in the same order, got "
                f"{len(self.target)} and {len(self.training_items)}"
            )
        self.plot = plot
        self.canary = None if canary is None else Canary(canary, batch_size)
        self.batch_norm, self.limits, self.batch_size = batch_norm, limits, batch_size
        self.rounds_: Rounds | None = None
        self._now: Predicted | None = None  # by the model as it is, from round to round
        self._resumed: dict[str, Any] | None = None

    @property
    def probabilities_(self) -> Tensor:
        """(N, K) of the target's items, in its order, by the accepted state."""
        return self._course.probabilities_

    @property
    def _course(self) -> Rounds:
        if self.rounds_ is None:
            raise ConfigError("nothing was adapted yet: Trainer.fit(task) first")
        return self.rounds_

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (B, …) → logits (B, K)."""
        logits: Tensor = self.model(x)
        return logits

    # ---- Lightning -------------------------------------------------------------------------

    def train_dataloader(self) -> Any:
        """The target's items with their indices, shuffled."""
        return self.training_items.loader(self.batch_size, shuffle=True)

    def on_fit_start(self) -> None:
        """Look at the target with the source model; choose BatchNorm's statistics."""
        if any(
            p.requires_grad
            for name in classifier_modules(self.model)
            for p in self.model.get_submodule(name).parameters()
        ):
            warnings.warn(
                "the classifier is trained too: without labels it forgets what it knew. Give "
                "LoRACallback trainable=[], and exclude_modules with the classifier's name where "
                'target_modules="all"',
                stacklevel=2,
            )
        before = self._now = self._predicted()
        look = None if self.canary is None else self._canary
        self.rounds_ = Rounds(self.model, before, self.limits, look)
        self.loss.begin(before, self.batch_size)
        self.loss.begin_round(before)  # what starts an adapter by the loss's gradient asks for it
        if self._resumed is not None:
            self.rounds_.load_state_dict(self._resumed)
        else:
            self._choose_statistics(before)

    def on_train_start(self) -> None:
        """There must be something to learn from."""
        if len(self.target) < 2:
            self._course.termination_condition_ = (
                "the target has one item: nothing can be learnt from it, the source model stays"
            )
        if self._course.termination_condition_:
            say(self, self._course.termination_condition_)
            self.trainer.should_stop = True

    def on_train_epoch_start(self) -> None:
        """Pseudo-labels for the round, by the model as it is."""
        self.loss.begin_round(self._now or self._predicted())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, indices = batch
        loss = self.loss(self(x), indices.cpu(), self.model)
        self.log("train_loss", loss, batch_size=len(x))
        return loss

    def on_train_epoch_end(self) -> None:
        """The round is over: the guard decides."""
        self.trainer.should_stop |= bool(self._end_round(self._predicted).alarms)

    def on_train_end(self) -> None:
        """The best accepted state comes back, before any file is written of it."""
        self._course.finish(self.model)
        if self.plot is not None and self.trainer.is_global_zero:
            self._course.draw(self.plot)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The rounds so far go with it."""
        if self.rounds_ is not None:
            checkpoint["transduction"] = self.rounds_.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A resumed fit goes on with its rounds."""
        self._resumed = checkpoint.get("transduction")

    # ---- what it does ----------------------------------------------------------------------

    def _canary(self) -> float:
        assert self.canary is not None
        return self.canary.accuracy(self, self.model)

    def _predicted(self) -> Predicted:
        return seen_by(self, self.model, self.target, self.batch_size)

    def _choose_statistics(self, before: Predicted) -> None:
        if self.batch_norm == "source":
            return
        # Mixed: in batches of one class, as folders give them, the features vary too little.
        loader = self.target.loader(2 * self.batch_size, shuffle=True)
        inputs = (x.to(self.device) for x, _ in loader)
        if not reestimated(self.model, self, inputs, SOURCE_ITEMS):
            return
        if self.batch_norm == "target":
            self._end_round(self._predicted)
            return
        now = self._predicted()
        start = information(before.probabilities)
        gain = (information(now.probabilities) - start) / max(1 - start, 1e-6)
        alarms = self._course.guard.check(now.probabilities).alarms if self.limits else []
        if gain >= GAIN and not alarms:
            self._end_round(lambda: now)
            return
        self._course.restore(self.model)
        why = alarms[0] if alarms else f"they bring {gain:.2f} of what is lacking, below {GAIN:g}"
        self._course.termination_condition_ = (
            f"BatchNorm's statistics of the target do not help ({why}): the source model stays; "
            'batch_norm="source" or "target" trains all the same'
        )

    def _end_round(self, see: Callable[[], Predicted]) -> Round:
        found, self._now = self._course.end_round(self.model, see, self.loss.labels)
        found.tell(self, len(self.target))
        return found
