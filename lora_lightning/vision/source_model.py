"""The network that a recipe starts from: to be trained on the source, or trained already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lora_lightning.errors import ConfigError
from lora_lightning.vision.backbones import create_backbone
from lora_lightning.vision.settings import Config


def backbone(config: Config, outputs: int | None, notices: list[str] | None = None) -> nn.Module:
    """The backbone of the settings; outputs None: as many as its checkpoint has."""
    m = config.model
    return create_backbone(
        m.name, outputs, m.checkpoint, m.pretrained, m.imagenet, notices,
        prefix=m.prefix, size=config.data.size,
    )  # fmt: skip


def source_model(
    config: Config, outputs: int, classes: Sequence[str]
) -> tuple[nn.Module, list[str]]:
    """The source model before its training, and what was left out of its checkpoint.

    Args:
        config: The settings; ``train.source.epochs=0``: the checkpoint is the source as it is.
        outputs: That the data ask for.
        classes: Of the data, for messages.

    Raises:
        ConfigError: a checkpoint that is the source has another number of outputs.
    """
    notices: list[str] = []
    if config.train.source.epochs:
        return backbone(config, outputs, notices), notices
    model: Any = backbone(config, None, notices)
    if model.num_classes != outputs:
        raise ConfigError(
            f"{config.model.checkpoint} has {model.num_classes} outputs, and the data ask for "
            f"{outputs} ({', '.join(classes)[:200]}): with train.source.epochs=0 its classifier is "
            "used as it is, its classes sorted by name"
        )
    return model, notices
