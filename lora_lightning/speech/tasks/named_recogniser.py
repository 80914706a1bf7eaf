"""`named_recogniser`: load a recogniser by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.model.adapter_file.format import read
from lora_lightning.model.adapter_file.hub import fetched
from lora_lightning.model.adapter_file.load import load_adapter
from lora_lightning.speech.tasks.labels import Labels
from lora_lightning.speech.tasks.recognisers import load_recogniser

SPOKEN = "spoken"  # the small recogniser in this package


@dataclass
class NamedRecogniser:
    """A recogniser with its labels and sample rate."""

    name: str  # as given
    model: nn.Module  # from waveforms and lengths to logits and frames
    labels: Labels  # the symbols of its classes
    sample_rate: int  # of its input, in Hz

    free = (0, 1)  # dimensions of the input of any size: recordings, and their length

    @property
    def classes(self) -> tuple[str, ...]:
        """The symbols, by class."""
        return self.labels.symbols

    def example(self) -> Tensor:
        """Two recordings of a second, of noise."""
        return torch.randn(2, self.sample_rate) / 10

    def tell(self, data: Mapping[str, Any]) -> None:
        """Take the labels and the sample rate that a file's header says, over the own ones.

        The model knows them then, so that files of its adapters say them.

        Raises:
            ConfigError: these are not as many labels as the model has classes.
        """
        if "labels" in data:
            told = Labels(**data["labels"])
            told.must_fit(len(self.labels), self.name)
            self.labels = told
        self.sample_rate = data.get("sample_rate", self.sample_rate)
        self.labels.describe(self.model, self.sample_rate)


def names_recogniser(name: str) -> bool:
    """Whether `named_recogniser` is to load this, and not timm, whose names are no such."""
    return name == SPOKEN or name.isupper() or Path(name).is_file()  # bundles are in upper case


def named_recogniser(
    name: str, checkpoint: Path | str | None = None, adapter: Path | str | None = None
) -> NamedRecogniser:
    """The recogniser of a name, with an adapter on it.

    Args:
        name: ``"spoken"``, the small one in this package; a file that `save_recogniser`
            wrote, such as a recipe's ``source.safetensors``; or a bundle of
            ``torchaudio.pipelines`` for CTC recognition, such as ``WAV2VEC2_ASR_BASE_960H``.
        checkpoint: A local state dict for a bundle, in place of torchaudio's download.
        adapter: An adapter file, which is loaded.

    Raises:
        ConfigError: there is no such recogniser, or it does not fit.
    """
    found = _base(name, checkpoint)
    if adapter is not None:
        adapter = fetched(adapter)
        data = read(adapter)[0].get("data", {})
        load_adapter(found.model, adapter)
        found.tell(data)
    return found


def _base(name: str, checkpoint: Path | str | None) -> NamedRecogniser:
    if name == SPOKEN or Path(name).suffix or Path(name).exists():
        if checkpoint is not None:
            raise ConfigError("a checkpoint is for a torchaudio bundle; give one or the other")
        model = load_recogniser("package" if name == SPOKEN else name)
        return NamedRecogniser(name, model, model.labels, model.sample_rate)
    from lora_lightning.speech.tasks.audio_models import load_audio_model

    found = load_audio_model(name, checkpoint)
    if found.labels is None:
        raise ConfigError(
            f"{name} does not write text; give a bundle for CTC recognition, such as "
            "WAV2VEC2_ASR_BASE_960H"
        )
    labels = Labels(found.labels, separator="|" if "|" in found.labels else " ")
    named = NamedRecogniser(name, found.model.eval(), labels, found.sample_rate)
    named.tell(found.data)
    return named
