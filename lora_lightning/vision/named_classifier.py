"""`named_classifier`: a timm classifier by name, with its classes and how its pictures are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.model.adapter_file.data_config import data_config
from lora_lightning.model.adapter_file.format import read
from lora_lightning.model.adapter_file.hub import fetched
from lora_lightning.model.adapter_file.load import load_adapter
from lora_lightning.model.introspection import classifier_modules
from lora_lightning.registry import unknown
from lora_lightning.runner.tables import read_text
from lora_lightning.vision.backbones import PACKAGED, create_backbone
from lora_lightning.vision.data.folders import Item
from lora_lightning.vision.data.pictures import Preparation


@dataclass
class NamedClassifier:
    """A classifier with the names of its classes."""

    name: str  # as given
    model: nn.Module  # from pictures to logits
    classes: list[str]  # Names, by index
    prepared: Preparation  # how its pictures are prepared
    named: bool  # whether anything said the names; else they are "0", "1", …
    notices: Sequence[str] = ()  # what was left out of its checkpoint

    free = (0,)  # dimensions of the input of any size: pictures

    def describe(self) -> None:
        """Tell the model, so that files of its adapters say it."""
        self.prepared.describe(self.model, self.classes if self.named else ())

    def example(self) -> Tensor:
        """Two pictures of noise, as the network takes them."""
        return torch.randn(2, 3, self.prepared.size, self.prepared.size)

    @torch.inference_mode()
    def probabilities(self, pictures: Tensor) -> Tensor:
        """(B, K) of stored pictures (B, 3, side, side), in eval mode."""
        device = next(self.model.parameters()).device
        inputs = self.prepared.transforms(flip=False)[1](pictures).to(device)
        found: Tensor = self.model.eval()(inputs).float().softmax(dim=1).cpu()
        return found

    def check_labels(self, items: Sequence[Item], what: str) -> None:
        """Take the folders' names for the classes', where those are unknown and as many.

        Raises:
            DataError: a label is no class of the model.
        """
        labels = sorted({item.class_name for item in items})
        if not self.named and len(labels) == len(self.classes):
            self.classes, self.named = labels, True
            self.describe()
        for label in labels:
            if label not in self.classes:
                hint = "" if self.named else "; give their names, in order, by --classes FILE"
                raise DataError(f"{what}: {unknown('class', label, self.classes)[:400]}{hint}")


def named_classifier(
    name: str,
    checkpoint: Path | str | None = None,
    *,
    prefix: str | None = None,
    classes: Path | str | None = None,
    size: int | None = None,
    adapter: Path | str | None = None,
    num_classes: int | None = None,
) -> NamedClassifier:
    """A timm classifier with local weights, or timm's own; with an adapter on it.

    Args:
        name: In timm; a hub's, such as ``hf-hub:user/name``; or ``local-dir:folder``.
        checkpoint: See `create_backbone`; None: timm's own weights.
        prefix: See `create_backbone`.
        classes: A file with the name of a class in each line, in the order of the head.
        size: Side of the pictures; None: as the adapter, the checkpoint or timm say.
        adapter: An adapter file, which is loaded.
        num_classes: Size of the head; None: the adapter's own, or the checkpoint's.

    Raises:
        ConfigError: there is no such model, or the files do not fit it.
    """
    told: dict[str, Any] = {}
    if adapter is not None:
        adapter = fetched(adapter)
        head, side, told = told_by(name, adapter)
        num_classes, size = num_classes or head, size or side
    notices: list[str] = []
    pretrained = checkpoint is None and name.partition(".")[0] != PACKAGED
    model = create_backbone(
        name, num_classes, checkpoint, pretrained, "package", notices, prefix=prefix, size=size
    )
    if adapter is not None:
        load_adapter(model, adapter)
    prepared = described(model, told, size)
    found = NamedClassifier(name, model.eval(), [], prepared, True, notices)
    found.classes = _names(classes, model)
    if not found.classes:
        found.classes = [str(i) for i in range(_outputs(model))]
        found.named = False
    found.describe()
    return found


def _head_of(name: str, tensors: dict[str, Tensor]) -> int | None:
    """The number of classes of the head in an adapter file; None where it holds none."""
    if not any(key.endswith(".weight") for key in tensors):
        return None
    heads = classifier_modules(create_backbone(name, 2))
    sizes = [tensors[f"{h}.weight"].shape[0] for h in heads if f"{h}.weight" in tensors]
    return sizes[0] if sizes else None


def _outputs(model: Any) -> int:
    return int(model.num_classes)


def _names(file: Path | str | None, model: nn.Module) -> list[str]:
    if file is None:
        return list(data_config(model).get("class_names", []))
    names = [line.strip() for line in read_text(Path(file)).splitlines() if line.strip()]
    if len(names) != _outputs(model):
        raise ConfigError(
            f"{file} names {len(names)} classes, and the model has {_outputs(model)}: give a line "
            "for each, in the order of its head"
        )
    if len(set(names)) < len(names):
        raise ConfigError(f"{file} names a class twice; each line must be another name")
    return names


def described(model: nn.Module, told: Mapping[str, Any], size: int | None = None) -> Preparation:
    """How a model's pictures are prepared; the model says it and the names of its classes then."""
    known = {**data_config(model), **told}
    prepared = Preparation.of(known, size)
    prepared.describe(model, known.get("class_names", ()))
    return prepared


def told_by(name: str, adapter: Path) -> tuple[int | None, int | None, dict[str, Any]]:
    """What an adapter file says: number of classes, side of the pictures, its header's data."""
    header, tensors = read(adapter)
    data = header.get("data", {})
    return _head_of(name, tensors), data.get("input_size", [None])[-1], data
