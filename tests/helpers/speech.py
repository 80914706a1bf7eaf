"""Recordings, alphabets and tiny recognisers for the tests of speech."""

from __future__ import annotations

import soundfile
import torch
from torch import nn
from torchaudio.models import wav2vec2_model

from lora_lightning.speech.data.utterances import AudioBatch, Utterance
from lora_lightning.speech.tasks.labels import Labels
from lora_lightning.speech.tasks.recognisers import ConformerCTC
from tests.helpers.audio_zoo import _LARGE, _WAV2VEC2

AB = Labels(["-", " ", "a", "b"])
TINY = {"n_mels": 20, "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24, "kernel_size": 7,
        "channels": 4}  # fmt: skip


def sounds(*seconds: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(int(16000 * s), generator=generator) / 10 for s in seconds]


def written(folder, waveforms, rate: int = 16000, **facts) -> list[Utterance]:
    """Waveforms as files; `facts` are functions from the index to a field of `Utterance`."""
    found = []
    for i, waveform in enumerate(waveforms):
        soundfile.write(folder / f"{i}.wav", waveform.clamp(-1, 1).numpy(), rate)
        known = {name: fact(i) for name, fact in facts.items()}
        found.append(Utterance(folder / f"{i}.wav", **known))
    return found


def batch_of(waveforms, texts) -> AudioBatch:
    return AudioBatch.of(waveforms, [Utterance(f"{i}.wav", t) for i, t in enumerate(texts)])


def conformer() -> ConformerCTC:
    torch.manual_seed(0)
    return ConformerCTC(**TINY, dropout=0.0)


def wav2vec2(**more) -> nn.Module:
    """With layer norm, 29 classes and no dropout."""
    torch.manual_seed(0)
    sizes = {k: 0.0 if "drop" in k else v for k, v in _WAV2VEC2.items()}
    return wav2vec2_model(**{**sizes, **_LARGE, "aux_num_out": 29, **more})
