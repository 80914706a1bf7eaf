"""Settings that runs of every kind share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainSettings:
    """One training, as `Classifier` and `Translation` take it.

    Args:
        epochs: Passes over the training items.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        label_smoothing: Part of the target spread over all classes.
        schedule: Of the learning rate: one-cycle, cosine or constant.
    """

    epochs: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    label_smoothing: float = 0.0
    schedule: str = "one-cycle"
