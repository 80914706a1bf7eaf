"""`Utterance`, one recording on disk, and `AudioBatch`, the input of a task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import DataError
from lora_lightning.runner.tables import Row, either, read_rows

# Accepted names of each column; the first that is present is used.
PATH = ("path", "audio", "file", "audio_filepath", "filename")
TEXT = ("text", "transcript", "transcription", "sentence")
SPEAKER = ("speaker", "speaker_id", "client_id")
DOMAIN = ("domain", "environment")


@dataclass(frozen=True)
class Utterance:
    """One recording with its metadata.

    Attributes:
        path: The audio file.
        text: The transcript; None where unknown.
        speaker: The speaker's name; None where unknown.
        domain: Where or how it was recorded; None where irrelevant.
        target: A class (str) or a number (float), for classification or regression.
        seconds: Its length; NaN until measured.
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
        items: The recording of each row.
    """

    waveforms: Tensor
    lengths: Tensor
    items: list[Utterance] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def texts(self) -> list[str]:
        """The transcripts; "" where unknown."""
        return [item.text or "" for item in self.items]

    def to(self, *args: Any, **kwargs: Any) -> AudioBatch:
        """A batch with its tensors moved, as by `torch.Tensor.to` with a device."""
        moved = self.waveforms.to(*args, **kwargs), self.lengths.to(*args, **kwargs)
        return AudioBatch(*moved, self.items)

    @classmethod
    def of(cls, waveforms: Sequence[Tensor], items: Sequence[Utterance]) -> AudioBatch:
        """Pad recordings (T,) of any lengths to one batch."""
        lengths = torch.tensor([len(w) for w in waveforms], dtype=torch.int64, device="cpu")
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


def read_table(path: Path, root: Path | None = None) -> list[Utterance]:
    """Every row of a manifest.

    A row holds a path (`PATH` has the accepted names of its column) and optionally a text, a
    speaker, a domain, and a `target` or a `label`. A label is a class, a target either that or a
    number. Other columns, such as a duration, are ignored.

    In CSV and TSV an empty cell means unknown, and targets are numbers if all of them are; in TSV,
    quotation marks are part of the text, as Common Voice has them.

    Args:
        path: The manifest; its suffix, `.csv`, `.tsv` or `.jsonl`, determines the format.
        root: Folder that its paths are relative to; by default its own.

    Raises:
        DataError: the encoding, the header or a row is wrong; names the line.
        DataNotFoundError: there is no such file.
    """
    given = read_rows(path, PATH)
    rows = given if path.suffix.lower() == ".jsonl" else _numbered(given)
    found = [_utterance(row, f"{path}, line {n}", root or path.parent) for n, row in rows]
    if not found:
        raise DataError(f"{path} has no rows")
    return found


def _utterance(row: dict[str, Any], where: str, root: Path) -> Utterance:
    path = _first(row, PATH)
    if not isinstance(path, str) or not path or "\0" in path:
        raise DataError(f"{where}: no file: {either(PATH)} must be a path, got {path!r}")
    return Utterance(
        root / path,
        text=_string(row, TEXT, where),
        speaker=_string(row, SPEAKER, where),
        domain=_string(row, DOMAIN, where),
        target=_target(row, where),
        seconds=_seconds(row.get("seconds")),
    )


def _target(row: dict[str, Any], where: str) -> str | float | None:
    """The value of the column `target`, or else the class in `label`."""
    target = row.get("target")
    if target is None:
        return _string(row, ("label",), where)
    if isinstance(target, bool) or not isinstance(target, (str, int, float)):
        raise DataError(f"{where}: 'target' must be a name or a number, got {target!r}")
    return target if isinstance(target, str) else float(target)


def _seconds(value: Any) -> float:
    """A length as `write_manifest` writes it; NaN for anything else."""
    measured = isinstance(value, float) and 0 < value < math.inf
    return value if measured else math.nan


def _first(row: dict[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of these columns that has one."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def _string(row: dict[str, Any], names: Sequence[str], where: str) -> str | None:
    value = _first(row, names)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # the number of a speaker
    raise DataError(f"{where}: {either(names)} must be text, got {value!r}")


def _numbered(rows: Iterable[Row]) -> list[Row]:
    """The rows, with targets as numbers if all of them are."""
    found = list(rows)
    try:
        numbers = {n: float(row["target"]) for n, row in found if "target" in row}
    except ValueError:
        return found
    return [(n, {**row, "target": numbers[n]} if n in numbers else row) for n, row in found]
