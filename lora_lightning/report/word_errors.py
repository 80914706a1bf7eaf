"""Word errors of a hypothesis against its reference (by jiwer), and a recording's audio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_lightning.errors import DataError
from lora_lightning.report.results import Run, Transcript

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE_RATE = 16_000  # Hz; enough for speech, and what a page can carry


@dataclass(frozen=True)
class Piece:
    """A sequence of words with the same kind of error, or none."""

    kind: str  # ``"equal"``, ``"substitute"``, ``"insert"`` or ``"delete"``
    said: str  # the words of the reference; "" for an insertion
    heard: str  # the words of the hypothesis; "" for a deletion


def compare(reference: str, hypothesis: str) -> list[Piece]:
    """The hypothesis in pieces, with the fewest errors that explain it."""
    said, heard = reference.split(), hypothesis.split()
    if not said:
        return [Piece("insert", "", hypothesis)] if heard else []
    import jiwer

    chunks = jiwer.process_words(" ".join(said), " ".join(heard)).alignments[0]
    return [
        Piece(
            chunk.type,
            " ".join(said[chunk.ref_start_idx : chunk.ref_end_idx]),
            " ".join(heard[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in chunks
    ]


def errors(reference: str, hypothesis: str) -> int:
    """Number of words that are substituted, inserted or deleted."""
    wrong = (p for p in compare(reference, hypothesis) if p.kind != "equal")
    return sum(max(len(p.said.split()), len(p.heard.split())) for p in wrong)


def sound(transcript: Transcript, run: Run) -> Tensor | None:
    """The recording, (T,) at `SAMPLE_RATE` in one channel; None where it cannot be read.

    A report is the end of a long run: a file deleted since must not make it fail.
    """
    if transcript.audio is None or run.read_audio is None:
        return None
    try:
        return run.read_audio(transcript.audio, SAMPLE_RATE)
    except DataError:
        return None


def telling(transcripts: Sequence[Transcript], most: int) -> list[Transcript]:
    """The recordings with the most corrected words, of each domain in turn; the worst one last.

    Sentences without audio all count.
    """
    audible = [t for t in transcripts if t.audio] or list(transcripts)
    gains = {id(t): errors(t.reference, t.source) - errors(t.reference, t.adapted) for t in audible}
    queues: dict[str, list[Transcript]] = {}
    for t in sorted(audible, key=lambda t: -gains[id(t)]):
        queues.setdefault(t.domain, []).append(t)
    turns = max(map(len, queues.values()), default=0)
    ordered = [q[i] for i in range(turns) for q in queues.values() if i < len(q)]
    chosen = ordered[: most - 1]
    left = [t for t in audible if t not in chosen]
    # The worst one is shown as well.
    worst = min(left, key=lambda t: (gains[id(t)], -errors(t.reference, t.adapted)), default=None)
    return [*chosen, worst] if worst is not None else chosen
