"""The results of a run: rows, predictions, transcripts (see also `report.summary`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

HELD_OUT = "held-out"


@dataclass
class Row:
    """One measurement: a method on a domain with a seed.

    `value` is a fraction, not percent; an angle is in degrees (`UNITS`).
    """

    method: str
    domain: str
    seed: int
    metric: str
    value: float
    trainable_parameters: int
    seconds: float
    file_bytes: int | None = None
    items: int | None = None  # labelled target items that the method was given
    tested: int | None = None  # held-out items behind `value`, where they were counted


class _Item:
    source: str
    adapted: str

    @property
    def changed(self) -> bool:
        """Whether adaptation changed what is predicted."""
        return self.source != self.adapted


@dataclass
class Transcript(_Item):
    """One recording or sentence of a target, before (`source`) and after (`adapted`) adaptation.

    Attributes:
        item: the recording's file, or the sentence that is translated.
        audio: a file to listen to.
        split: ``"held-out"``; ``"target"``: used in the adaptation, without its transcript.
        confidence: 1 − normalised edit distance between the hypothesis and the lexicon's nearest
            sentence, or the hypothesis under dropout; of a translation, the geometric mean of its
            pieces' probabilities; None where it was not computed.
        round: in which of an adaptation without labels it got the text it has; 0: it has the
            source's; None: there were no rounds.
    """

    item: str
    domain: str
    reference: str
    source: str
    adapted: str
    seed: int
    audio: str | None = None
    split: str = HELD_OUT
    confidence: float | None = None
    round: int | None = None


@dataclass
class Prediction(_Item):
    """One target item before (`source`) and after (`adapted`) adaptation.

    Attributes:
        item: relative to the root of the data.
        label: its class; for an angle the number in degrees, as `source` and `adapted` are.
        split: ``"held-out"``; ``"target"``: used in the adaptation, without its label.
        method: which adapted it, where that is not the run's best.
        round: in which of an adaptation without labels it got the label it has; 0: it has the
            source's; None: there were no rounds.
    """

    item: str
    domain: str
    label: str
    source: str
    source_confidence: float
    adapted: str
    adapted_confidence: float
    seed: int
    split: str = HELD_OUT
    method: str = ""
    round: int | None = None


@dataclass
class Run:
    """The results of a run, from which its report is made.

    Attributes:
        metric: the metric shown; rows of other metrics go to the files only.
        spectra: layer → singular values of its delta.
        rounds: seed → the rounds of an adaptation without labels, see
            `lora_lightning.adaptation.rounds.Round`.
        shifts: seed → target domain → how far it is, as `Shift.as_dict`
            gives it.
        config: the resolved configuration; `data.source` names the source domain where no
            domain is called "source".
        versions: name → version, hardware included.
        skipped: (path, reason) of each input that was left out.
        command: the command that repeats the run; made from the name where empty.
        verdict: the sentence at the top of the page; made from the rows where empty.
        texts: the kind of `transcripts`, and the name of their file.
        scores: (method, domain, seed) → (items, sums), what each held-out item adds to the sums
            that the metric is made of, see `report.evidence`; for the intervals.
        losses: (training, case, seed) → (step, loss) of it.
        read_audio: gives the samples (T,) of a transcript's audio file at a sampling rate in Hz;
            raises DataError where it cannot. None: recordings are not played.
    """

    name: str
    title: str
    metric: str
    rows: list[Row]
    predictions: list[Prediction]
    classes: list[str]
    spectra: dict[str, list[float]]
    config: dict[str, Any]
    data_root: Path
    versions: dict[str, str]
    skipped: list[tuple[str, str]]
    notes: list[str]
    command: str = ""
    transcripts: list[Transcript] = field(default_factory=list)
    rounds: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    texts: str = "transcripts"
    shifts: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    verdict: str = ""
    read_audio: Callable[[str, int], Tensor] | None = None
    scores: dict[tuple[str, str, int], Any] = field(default_factory=dict)
    losses: dict[tuple[str, str, int], list[tuple[int, float]]] = field(default_factory=dict)

    def heard(self) -> list[Transcript]:
        """The first seed's held-out recordings, or sentences."""
        found = [t for t in self.transcripts if t.split == HELD_OUT]
        return [t for t in found if t.seed == found[0].seed]
