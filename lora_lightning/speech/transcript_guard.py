"""`SpeechGuard`: checks of a recogniser's self-training without transcripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean as mean

from lora_lightning.adaptation.guard import Verdict
from lora_lightning.adaptation.text_self_training import text_agreement


@dataclass(frozen=True)
class SpeechLimits:
    """Thresholds of the alarms; each compares a round with the source model's transcripts.

    Args:
        least_rate: Least ratio of non-blank frames to the source's: below, transcripts vanish.
        most_rate: Largest ratio: above, transcripts grow without reason.
        agreement: 1 − normalised edit distance to the source's transcripts, at least.
        spelling: How much further from the nearest sentence of the lexicon the transcripts may be
            than the source's, as a normalised edit distance.
    """

    least_rate: float = 0.5
    most_rate: float = 1.5
    agreement: float = 0.4
    spelling: float = 0.02


@dataclass(frozen=True)
class Understood:
    """A recogniser's transcript of a recording, with its label and scores.

    Attributes:
        written: Transcript by greedy decoding.
        label: Pseudo-transcript: the lexicon's nearest sentence, or the greedy one.
        distance: Normalised edit distance between both; under dropout where there is no lexicon.
        rate: Part of non-blank frames.
    """

    written: str
    label: str
    distance: float
    rate: float


class SpeechGuard:
    """Compares a recogniser's transcripts with the source model's.

    Args:
        source: Path → `Understood` by the source model.
        limits: Thresholds of the alarms; None: no alarms.
        spelling: Whether distances are those from a lexicon's sentences.
    """

    def __init__(
        self, source: Mapping[str, Understood], limits: SpeechLimits | None, spelling: bool
    ):
        self.source, self.limits, self.spelling = source, limits, spelling
        self.scores = self._scores(source)

    def check(
        self, now: Mapping[str, Understood], accepted: Mapping[str, Understood] | None = None
    ) -> Verdict:
        """Check a round's transcripts of the same recordings."""
        scores = self._scores(now)
        return Verdict(scores, [] if self.limits is None else list(self._alarms(scores)))

    def _scores(self, now: Mapping[str, Understood]) -> dict[str, float]:
        return {
            "rate": mean(u.rate for u in now.values()),
            "agreement": text_agreement(self.source, now, "written"),
            "spelling": mean(u.distance for u in now.values()),
        }

    def _alarms(self, scores: dict[str, float]) -> Iterator[str]:
        assert self.limits is not None
        limits = self.limits
        ratio = scores["rate"] / max(self.scores["rate"], 1e-9)
        if not limits.least_rate <= ratio <= limits.most_rate:
            yield (
                f"it writes {ratio:.2f} times as many characters a second as the source, outside "
                f"{limits.least_rate:g} to {limits.most_rate:g}"
            )
        if scores["agreement"] < limits.agreement:
            yield (
                f"agreement with the source's transcripts is {scores['agreement']:.2f}, below "
                f"{limits.agreement:g}"
            )
        worst = self.scores["spelling"] + limits.spelling
        if self.spelling and scores["spelling"] > worst:
            yield (f"it spells worse: {scores['spelling']:.2f} from the lexicon, above {worst:.2f}")
