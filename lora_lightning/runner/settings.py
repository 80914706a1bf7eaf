"""Settings that runs of every kind share; every field is a key of recipe.yaml."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from lora_lightning.lora.config import LoRAConfig


@dataclass
class Optimisation:
    """How a training steps.

    Args:
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.01

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for a task."""
        names = ("learning_rate", "weight_decay", "schedule", "label_smoothing")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}


@dataclass
class Scheduled(Optimisation):
    """How a training steps, with a schedule.

    Args:
        schedule: Of the learning rate: one-cycle, cosine or constant.
    """

    schedule: str = "one-cycle"


@dataclass
class EpochTraining(Scheduled):
    """One training.

    Args:
        epochs: Passes over the training items.
        least_steps: Optimizer steps at least: a small set gets more passes; 0: `epochs` alone.
    """

    epochs: int = 4
    least_steps: int = 0

    def passes(self, batches: int) -> int:
        """The epochs of so many batches each, or more for the least number of steps; 0 stays 0."""
        if not self.epochs:
            return 0
        return max(self.epochs, math.ceil(self.least_steps / max(batches, 1)))


@dataclass
class TrainSettings(EpochTraining):
    """One training, as `Classifier` and `Translation` take it.

    Args:
        label_smoothing: Part of the target spread over all classes.
    """

    label_smoothing: float = 0.0


@dataclass
class TrainStages:
    """The trainings with labels.

    Args:
        source: Of the source model, on the source domain.
        lora: Of the adapter, on labelled items of the target.
        full: Of all weights, on the same items.
    """

    source: TrainSettings = field(default_factory=TrainSettings)
    lora: TrainSettings = field(default_factory=TrainSettings)
    full: TrainSettings = field(default_factory=TrainSettings)


@dataclass
class RunConfig:
    """A whole run.

    Args:
        kind: Which code runs the recipe.
        name: Name of the run.
        title: Title of table and report.
        out: Folder for all results.
        seeds: One run for each; they decide on what is drawn, order and factors.
        methods: What is compared, in the order of the table.
        accelerator: cpu, gpu, mps or auto, as Lightning has it.
        devices: Devices that a training uses; measuring uses one.
        logger: What each training logs with, into logs/ in `out`: csv, tensorboard, wandb or
            mlflow; null: nothing.
        quick: What ``--quick`` sets, key=value each: a first, rougher table.
        lora: The adapter, a `LoRAConfig`.
    """

    kind: str = ""
    name: str = ""
    title: str = ""
    out: str = "runs"
    seeds: list[int] = field(default_factory=lambda: [0])
    methods: list[str] = field(default_factory=list)
    accelerator: str = "auto"
    devices: int = 1
    logger: str | None = None
    quick: list[str] = field(default_factory=list)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
