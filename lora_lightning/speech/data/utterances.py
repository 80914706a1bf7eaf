"""`Utterance`, one recording on disk, and `AudioBatch`, what a task is handed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import DataError


@dataclass(frozen=True)
class Utterance:
    """One recording, with whatever is known of it.

    Attributes:
        path: The audio file.
        text: What is said; None where it is not known.
        speaker: Who speaks; None where it is not known.
        domain: Where or how it was recorded; None where that does not matter.
        target: A class (str) or a number (float), for classification or regression.
        seconds: How long it is; NaN until it was looked at.
    """

    path: Path
    text: str | None = None
    speaker: str | None = None
    domain: str | None = None
    target: str | float | None = None
    seconds: float = float("nan")


@dataclass
class AudioBatch:
    """Recordings padded to one length.

    Lightning moves it to the device by `to`.

    Attributes:
        waveforms: (B, T) float32 in [-1, 1], mono; zero after each one's length.
        lengths: (B,) int64, in samples.
        items: What each row is.
    """

    waveforms: Tensor
    lengths: Tensor
    items: list[Utterance] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def texts(self) -> list[str]:
        """What is said in each; "" where that is not known."""
        return [item.text or "" for item in self.items]

    def to(self, *args: Any, **kwargs: Any) -> AudioBatch:
        """A batch with its tensors moved, as by `torch.Tensor.to` with a device."""
        moved = self.waveforms.to(*args, **kwargs), self.lengths.to(*args, **kwargs)
        return AudioBatch(*moved, self.items)

    @classmethod
    def of(cls, waveforms: Sequence[Tensor], items: Sequence[Utterance]) -> AudioBatch:
        """Pad recordings (T,) of any lengths to one batch."""
        lengths = torch.tensor([len(w) for w in waveforms], dtype=torch.int64)
        padded = torch.nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True)
        return cls(padded, lengths, list(items))


def by_speaker(utterances: Sequence[Utterance]) -> dict[str, list[Utterance]]:
    """The recordings of each speaker.

    Raises:
        DataError: a recording has no speaker.
    """
    found: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        if utterance.speaker is None:
            raise DataError(
                f"{utterance.path} has no speaker: give the manifest a column speaker, or put the "
                "files in a folder for each speaker"
            )
        found.setdefault(utterance.speaker, []).append(utterance)
    return found
