"""`TranslationGuard`: checks of a translator's self-training without references."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean

from lora_lightning.adaptation.guard import NAN, Verdict
from lora_lightning.adaptation.text_self_training import text_agreement
from lora_lightning.text.translation import Translated


@dataclass(frozen=True)
class TranslationLimits:
    """Thresholds of the alarms; each compares a round with the source model's translations.

    Args:
        least_length: Least ratio of words to the source's: below, translations vanish.
        most_length: Largest ratio: above, translations grow without reason.
        agreement: 1 − normalised edit distance to the source's translations, at least.
        known: How much smaller than the source's the part of the words that belong to the target
            language may be.
        confidence: Least mean probability of a piece of the source model's own translations for
            anything to be trained. At 1 nothing is: on the mean of what was measured it lost, and
            where the source was surest (0.95) as well.
    """

    least_length: float = 0.5
    most_length: float = 1.25
    agreement: float = 0.4
    known: float = 0.0
    confidence: float = 1.0


class TranslationGuard:
    """Compares a translator's translations with the source model's.

    Args:
        source: Sentence → the source model's translation.
        limits: Thresholds of the alarms; None: no alarms.
        words: Of the target language; None: unknown, and not checked.
    """

    def __init__(
        self,
        source: Mapping[str, Translated],
        limits: TranslationLimits | None,
        words: Collection[str] | None = None,
    ):
        self.source, self.limits = source, limits
        self.words = None if words is None else frozenset(words)
        self.scores = self._scores(source)

    def check(
        self, now: Mapping[str, Translated], accepted: Mapping[str, Translated] | None = None
    ) -> Verdict:
        """Check a round's translations of the same sentences."""
        if not all(math.isfinite(t.log_probability) for t in now.values()):
            return Verdict({}, [NAN.format("translations")])
        scores = self._scores(now)
        return Verdict(scores, [] if self.limits is None else list(self._alarms(scores)))

    def refusal(self) -> str:
        """Why nothing is to be trained; "" where there is no reason."""
        found = math.exp(fmean(t.log_probability for t in self.source.values()))
        if self.limits is None or found >= self.limits.confidence:
            return ""
        return (
            "nothing is trained: by its own translations a translator has lost more often than "
            f"gained; their pieces have a mean probability of {found:.2f} here, below "
            f"{self.limits.confidence:g}. Translated sentences are needed"
        )

    def _scores(self, now: Mapping[str, Translated]) -> dict[str, float]:
        written = [word for t in now.values() for word in t.text.split()]
        scores = {
            "length": len(written) / max(sum(len(s.split()) for s in now), 1),
            "agreement": text_agreement(self.source, now, "text"),
        }
        if self.words is not None:
            right = sum(word in self.words for word in written)
            scores["known"] = right / max(len(written), 1)
        return scores

    def _alarms(self, scores: dict[str, float]) -> Iterator[str]:
        assert self.limits is not None
        limits = self.limits
        ratio = scores["length"] / max(self.scores["length"], 1e-9)
        if not limits.least_length <= ratio <= limits.most_length:
            yield (
                f"it writes {ratio:.2f} times as many words as the source, outside "
                f"{limits.least_length:g} to {limits.most_length:g}"
            )
        if scores["agreement"] < limits.agreement:
            yield (
                f"agreement with the source's translations is {scores['agreement']:.2f}, below "
                f"{limits.agreement:g}"
            )
        least = self.scores.get("known", 0.0) - limits.known
        if scores.get("known", 1.0) < least:
            yield f"{scores['known']:.0%} of the words it writes are known, below {least:.0%}"
