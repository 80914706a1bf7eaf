"""What a service answers to pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_lightning.deploy.answers import Items
from lora_lightning.deploy.intake import PictureIntake
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.model.adapter_file.data_config import data_config
from lora_lightning.vision.data.pictures import Preparation
from lora_lightning.vision.named_classifier import NamedClassifier


class ClassifierAnswers:
    """Of a classifier of pictures.

    Args:
        base: The classifier.
    """

    def __init__(self, base: NamedClassifier):
        self.base, self.model = base, base.model

    def intake(self, most_seconds: float) -> PictureIntake:
        """Of pictures."""
        return PictureIntake(self.base.prepared, len(self.base.classes))

    def told(self, data: Mapping[str, Any]) -> Sequence[str]:
        """The names of the classes."""
        names: Sequence[str] = data.get("class_names", self.base.classes)
        if len(names) != len(self.base.classes):
            raise ConfigError(
                f"it has {len(names)} classes, and the model that is served has "
                f"{len(self.base.classes)}: give --num-classes, or serve it from another folder"
            )
        own, given = self.base.prepared, Preparation.of({**data_config(self.model), **data})
        if _spelt(own) != _spelt(given):
            raise ConfigError(
                f"it takes pictures prepared as {_spelt(given)}, and the model that is served "
                f"{_spelt(own)}: give --size {given.size}, or serve it from another folder"
            )
        return self.base.classes if names == self.base.classes else names  # kept once

    def groups(self, items: Items) -> list[list[int]]:
        """All together."""
        return [list(range(len(items)))]

    def outputs(self, items: Items) -> list[Tensor]:
        """Probabilities (K,)."""
        return list(self.base.probabilities(torch.from_numpy(np.stack(items))))

    def said(self, output: Tensor, told: Sequence[str], top: int) -> dict[str, Any]:
        """The likeliest classes."""
        if not output.isfinite().all():
            raise DataError("the model's output is not finite")
        likely = zip(*(x.tolist() for x in output.topk(top)), strict=True)
        return {"classes": [{"class": told[i], "probability": p} for p, i in likely]}


def _spelt(prepared: Preparation) -> str:
    """A preparation as a text; lists and tuples are alike."""
    mean, std = (", ".join(f"{x:.4g}" for x in values) for values in (prepared.mean, prepared.std))
    return (
        f"{prepared.size} pixels, {prepared.interpolation}, {prepared.crop:g} of the side, mean "
        f"{mean}, std {std}"
    )
