"""`SpeechGuard`: checks of a recogniser's self-training without transcripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean as mean

from lora_lightning.adaptation.guard import Verdict
from lora_lightning.adaptation.text_self_training import text_agreement
from lora_lightning.speech.tasks.lexicon import Lexicon


@dataclass(frozen=True)
class SpeechLimits:
    """Thresholds of the alarms; each compares a round with the source model's transcripts.

    Args:
        least_rate: Least ratio of non-blank frames to the source's: below, transcripts vanish.
        most_rate: Largest ratio: above, transcripts grow without reason.
        agreement: 1 − normalised edit distance to the source's transcripts, at least, both as they
            will be decoded: with the lexicon where there is one.
        spelling: How much more the lexicon may cost than it costs the source, in nats a frame, see
            `LexiconSearch.compared`.
        words: How much further from the lexicon's the frequencies of words may be than the
            source's, see `Lexicon.divergence`; for lexicons made of sentences.
    """

    least_rate: float = 0.5
    most_rate: float = 1.5
    agreement: float = 0.4
    spelling: float = 0.02
    words: float = 0.035


@dataclass(frozen=True)
class Understood:
    """A recogniser's transcript of a recording, with its label and scores."""

    written: str  # transcript by greedy decoding
    label: str  # Pseudo-transcript: the lexicon's most likely sentence, or the greedy one
    # What the lexicon costs, in nats a frame; where there is none, normalised edit distance under
    # dropout
    distance: float
    rate: float  # part of non-blank frames


class SpeechGuard:
    """Compares a recogniser's transcripts with the source model's.

    Args:
        source: Path → `Understood` by the source model.
        limits: Thresholds of the alarms; None: no alarms.
        lexicon: By which recordings are decoded; None: greedily.
        setting: What a user sets to adapt all the same, in their interface; ends each alarm.
    """

    def __init__(
        self,
        source: Mapping[str, Understood],
        limits: SpeechLimits | None,
        lexicon: Lexicon | None,
        setting: str = "limits=None",
    ):
        self.source, self.limits, self.lexicon, self.setting = source, limits, lexicon, setting
        self.scores = self._scores(source)

    def check(
        self, now: Mapping[str, Understood], accepted: Mapping[str, Understood] | None = None
    ) -> Verdict:
        """Check a round's transcripts of the same recordings."""
        scores = self._scores(now)
        alarms = () if self.limits is None else self._alarms(scores)
        return Verdict(
            scores, [f"{alarm} ({self.setting} adapts all the same)" for alarm in alarms]
        )

    def _scores(self, now: Mapping[str, Understood]) -> dict[str, float]:
        scores = {
            "rate": mean(u.rate for u in now.values()),
            "agreement": text_agreement(self.source, now, "label"),
            "spelling": mean(u.distance for u in now.values()),
        }
        if self.lexicon is not None:
            words = self.lexicon.divergence(u.label for u in now.values())
            scores |= {} if words is None else {"words": words}
        return scores

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
        if self.lexicon is None:
            return
        if scores["spelling"] > worst:
            yield (
                f"the lexicon's sentences fit worse: {scores['spelling']:.2f} nats a frame below "
                f"the sound alone, above {worst:.2f}"
            )
        if "words" in scores and scores["words"] > (most := self.scores["words"] + limits.words):
            yield (
                f"words are used less as in the lexicon: {scores['words']:.2f} nats a word from "
                f"it, above {most:.2f}"
            )
