"""`PoseEstimation`: the experiment of pose recipes, where a label is an azimuth.

The error is an angle. Data, methods and report are those of a classification
(`lora_lightning.vision.experiment`); labels and losses differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lora_lightning.adaptation.closed_form import regressed
from lora_lightning.registry import Registry
from lora_lightning.report.metrics import AZIMUTH_ERROR
from lora_lightning.runner import methods as common
from lora_lightning.runner.experiment import Method
from lora_lightning.vision.data.folders import Item
from lora_lightning.vision.data.pose_domains import PoseDomains
from lora_lightning.vision.experiment import Pictures
from lora_lightning.vision.methods import aligned, batchnorm
from lora_lightning.vision.pose_regressor import PoseRegressor, angle, circular_error, direction
from lora_lightning.vision.pose_self_training import TransductivePose


def _regression(name: str, alignment: str) -> Method:
    def answers(source: Tensor, azimuths: Tensor, target: Tensor) -> Tensor:
        return regressed(source, direction(azimuths), target, alignment)

    return aligned(name, answers)


# In the order of the table.
METHODS: Registry[Method] = Registry("method")
common.add(METHODS, "source_only")
METHODS.register("ridge")(_regression("ridge regression", "none"))
METHODS.register("subspace")(_regression("subspace alignment", "subspace"))
METHODS.register("nmf_subspace")(_regression("NMF subspace", "nmf"))
METHODS.register("coral")(_regression("CORAL", "coral"))
METHODS.register("batchnorm")(batchnorm)
common.add(METHODS, "label_free", "lora", "full")


class PoseEstimation(Pictures):
    """Predictions are vectors (cos, sin); labels are azimuths in degrees."""

    metric = AZIMUTH_ERROR
    methods = METHODS
    domains = PoseDomains
    data: PoseDomains

    def outputs(self) -> int:
        """Cosine and sine."""
        return 2

    def task(self, model: nn.Module, stage: Any) -> PoseRegressor:
        """A `PoseRegressor`."""
        return PoseRegressor(model, **stage.arguments())

    def labels(self, items: Sequence[Item]) -> Tensor:
        """The azimuths of images."""
        return self.data.azimuths(items)

    def values(self, answers: Tensor, items: Sequence[Item]) -> Tensor:
        """The circular errors."""
        return circular_error(angle(answers), self.labels(items))

    def label(self, item: Item) -> str:
        """The azimuth in degrees."""
        return f"{float(self.labels([item])):.1f}"

    def said(self, answer: Tensor) -> tuple[str, float]:
        """The azimuth, and the vector's length."""
        return f"{float(angle(answer)):.1f}", round(min(float(answer.norm()), 1.0), 4)

    def transductive(self, model: nn.Module, target: Any, training: Any = None) -> TransductivePose:
        """Self-training by mirror images."""
        settings: Any = self.config.train.label_free
        task = TransductivePose(
            model,
            target,
            training=training,
            tolerance=settings.tolerance,
            preference=settings.preference,
            batch_norm=settings.batch_norm,
            batch_size=settings.batch_size,
            **settings.arguments(),
        )
        task.setting = "train.label_free.preference=0"
        return task

    def tell(self, task: TransductivePose) -> None:
        """See `tell_course`."""
        before, after = task.source_.plain, task.answers_.plain
        self.tell_course(task, before, after, [None] * len(after))
