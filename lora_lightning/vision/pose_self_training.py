r"""`TransductivePose`: unsupervised adaptation of a pose regressor, by mirror images.

Where objects are as likely as their mirror images, a mirrored image shows the negated
angle. So there are two predictions of every unlabelled image: their difference is a lower bound of
the error, and their mean may be nearer to the truth.

The mean of two predictions is better only where their errors are independent; a network that has
never seen a rear makes the same mistake twice. And a network that learns that mean agrees better,
too, where its predictions draw together, which no comparison of both predictions can tell from
progress. What they do tell is a preference for a side: only that is unlearnt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lora_lightning.adaptation.guard import Verdict
from lora_lightning.adaptation.resumable_loader import ResumableLoader
from lora_lightning.adaptation.rounds import Check, Rounds
from lora_lightning.adaptation.self_training import Course
from lora_lightning.adaptation.target import Target
from lora_lightning.adaptation.task_rounds import TaskInRounds, TaskRounds
from lora_lightning.adaptation.transductive_rounds import statistics_of
from lora_lightning.adaptation.transductive_task import check_settings
from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import check_number
from lora_lightning.vision.pose_guard import PoseLimits, Twice, judge, seen_twice
from lora_lightning.vision.pose_regressor import mirrored

JUDGED = 4  # every fourth image is not trained on, but used by the guard


class TransductivePose(Course, TaskInRounds):
    r"""Adapt a pose regressor `model` to images without labels.

        task = TransductivePose(model, pictures)
        Trainer(max_epochs=4, callbacks=[LoRACallback(trainable=[])]).fit(task)

    With v(x) the network's vector, M the mirror image and R the negation of an angle, an image's
    pseudo-label is :math:`t = (v(x) + R\,v(Mx)) / 2`, of when training begins; where both
    predictions differ by more than `tolerance`, it has none. The loss of a batch is the mean of
    :math:`\|v(x) - t\|^2`, with half of the images mirrored, and R t for them.

    After each epoch a round ends: on every fourth image, which is not trained on, the two
    predictions must agree better than when training began, and they must neither collapse nor
    change too much. The last round decides, when the learning rate has fallen: its state is kept,
    or else the one at the start of training. With ``schedule="constant"`` each round may be kept
    and relabels the images, and the first alarm ends the training.

    Args:
        model: The network, from images (B, 3, H, W) to (B, 2), (cos, sin).
        target: The images, see `lora_lightning.adaptation.target.Target`.
        training: The same images for training, for example augmented; None: `target`.
        tolerance: In degrees, above 0, at most 180.
        preference: Least part of the mean squared difference of both predictions that is common to
            all images, a preference for a side, for training to begin; 0: always.
        batch_norm: ``"target"`` re-estimates BatchNorm's statistics on the target before training,
            ``"source"`` keeps them; ``"auto"`` re-estimates them where the guard accepts it.
        limits: Of the guard.
        batch_size: Images in a batch.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's; not applied to biases, norms and other vectors.
        schedule: ``"one-cycle"`` (warm-up, then cosine to near 0), ``"cosine"``, ``"constant"``.

    Attributes:
        history_: the rounds, the source first.
        accepted_: index of the round whose state is kept; 0: the source.
        source_: `Twice` by the source model, of each image.
        answers_: by the accepted state.
        termination_condition_: why it ended.

    Raises:
        ConfigError: a value is out of range, or items of another kind than expected.
        DataError: the target is empty.
    """

    setting = "preference=0"  # what trains all the same, in the words of the user's interface

    def __init__(
        self,
        model: nn.Module,
        target: Any,
        *,
        training: Any = None,
        tolerance: float = 60.0,
        preference: float = 0.25,
        batch_norm: str = "auto",
        limits: PoseLimits = PoseLimits(),  # noqa: B008 - frozen
        batch_size: int = 32,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.01,
        schedule: str = "one-cycle",
    ):
        super().__init__(learning_rate, weight_decay, schedule)
        check_number("tolerance", tolerance, "(0, 180]", unit="degrees")
        check_number("preference", preference, "[0, 1]")
        check_settings(batch_norm, batch_size)
        self.model = model.to(memory_format=torch.channels_last).train()
        self.target = Target(target)
        if not isinstance(self.target[0][0], Tensor):
            raise ConfigError("the target's items must be images as tensors, or begin with one")
        self.training_items = Target(target if training is None else training)
        self.tolerance, self.preference = tolerance, preference
        self.batch_norm, self.batch_size = batch_norm, batch_size
        self._course = _Course(self.target, limits)
        self.rounds_ = self._course.rounds_

    @property
    def source_(self) -> Twice:
        """By the source model, of each image."""
        return self.rounds_.source  # type: ignore[no-any-return]

    @property
    def answers_(self) -> Twice:
        """By the accepted state, for the pseudo-labels."""
        return self.rounds_.answers_  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) → vectors (B, 2)."""
        found: Tensor = self.model(x.contiguous(memory_format=torch.channels_last))
        return found

    def train_dataloader(self) -> DataLoader[Any]:
        """The training images with their indices, shuffled."""
        learnt = [i for i in range(len(self.target)) if i % JUDGED or len(self.target) < JUDGED]
        drop = len(learnt) > 1 and len(learnt) % self.batch_size == 1  # BatchNorm needs two
        return ResumableLoader(
            position=self._course.position,
            dataset=Subset(self.training_items, learnt),
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=drop,
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, indices = batch
        labels = self.answers_.of(indices.cpu())
        wanted = labels.mean.to(x)
        chosen = torch.rand(len(x), device=x.device) < 0.5
        x = torch.where(chosen[:, None, None, None], x.flip(-1), x)
        wanted = torch.where(chosen[:, None], mirrored(wanted), wanted)
        known = (labels.apart <= self.tolerance).to(x)
        loss: Tensor = ((self(x) - wanted).square().sum(dim=1) * known).mean()
        self.log("train_loss", loss, batch_size=len(x))
        return loss


class _Rounds(Rounds[Twice]):
    """Rounds by the predictions of images and of their mirror images."""

    def packed(self, answers: Twice) -> Any:
        return vars(answers)

    def unpacked(self, state: Any) -> Twice:
        return Twice(**state)


class _Course(TaskRounds):
    """The rounds of a `TransductivePose`, which is the module in training."""

    def __init__(self, target: Target, limits: PoseLimits):
        super().__init__(_Rounds(self._check_of))
        self.target, self.limits = target, limits

    def _check_of(self, source: Twice) -> Check:
        on = torch.arange(0, len(source), JUDGED, device="cpu")

        def check(now: Twice, _: Twice | None) -> Verdict:
            best: Twice = self.rounds_.answers_  # of the state that is kept so far
            return judge(source.of(on), best.of(on), now.of(on), self.limits)

        return check

    def look(self, module: Any) -> Twice:
        return seen_twice(module.model, self.target, 2 * module.batch_size, module.device)

    def start(self, module: Any, source: Twice) -> None:
        super().start(module, source)
        if module.batch_norm != "source" and statistics_of(module, self.target):
            self._judge_statistics(module, source)
        if (found := self.rounds_.answers_.preference) < module.preference:
            self.rounds_.termination_condition_ = (
                "answers to mirror images differ without a preference for a side that could be "
                f"unlearnt ({found:.1%} of the difference, below {module.preference:.0%}): "
                f"nothing is trained. {module.setting} trains all the same"
            )

    def _judge_statistics(self, module: Any, source: Twice) -> None:
        now = self.look(module)
        found = judge(source, source, now, self.limits)  # by all images: none is trained on yet
        asks = module.batch_norm == "auto"
        self.judge(module, now, found if asks else Verdict(found.scores))
        self.rounds_.restore(module.model)
