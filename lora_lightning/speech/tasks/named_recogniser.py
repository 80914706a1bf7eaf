"""`named_recogniser`: load a recogniser by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lora_lightning.errors import ConfigError
from lora_lightning.speech.tasks.labels import Labels
from lora_lightning.speech.tasks.recognisers import load_recogniser


@dataclass
class NamedRecogniser:
    """A recogniser with its labels and sample rate.

    Attributes:
        name: As given.
        model: From waveforms and lengths to logits and frames.
        labels: The symbols of its classes.
        sample_rate: Of its input, in Hz.
    """

    name: str
    model: nn.Module
    labels: Labels
    sample_rate: int


def named_recogniser(name: str, checkpoint: Path | str | None = None) -> NamedRecogniser:
    """The recogniser of a name.

    Args:
        name: ``"spoken"``, the small one in this package; a file that `save_recogniser`
            wrote, such as a recipe's ``source.safetensors``; or a bundle of
            ``torchaudio.pipelines`` for CTC recognition, such as ``WAV2VEC2_ASR_BASE_960H``.
        checkpoint: A local state dict for a bundle, in place of torchaudio's download.

    Raises:
        ConfigError: there is no such recogniser, or it does not fit.
    """
    if name == "spoken" or Path(name).suffix or Path(name).exists():
        if checkpoint is not None:
            raise ConfigError("a checkpoint is for a torchaudio bundle; give one or the other")
        model = load_recogniser("package" if name == "spoken" else name)
        return NamedRecogniser(name, model, model.labels, model.sample_rate)
    from lora_lightning.speech.tasks.audio_models import load_audio_model

    found = load_audio_model(name, checkpoint)
    if found.labels is None:
        raise ConfigError(
            f"{name} does not write text; give a bundle for CTC recognition, such as "
            "WAV2VEC2_ASR_BASE_960H"
        )
    labels = Labels(found.labels, separator="|" if "|" in found.labels else " ")
    return NamedRecogniser(name, found.model.eval(), labels, found.sample_rate)
