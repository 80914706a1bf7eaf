"""`Guard`: checks of adaptation without labels, after each round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_lightning.adaptation import validators as score
from lora_lightning.lora.values import check_number, finite

NAN = "the {} are NaN: the learning rate is too high"


@dataclass(frozen=True)
class Limits:
    """Thresholds of the alarms; each compares a round with the source model on the same items.

    Args:
        marginal_entropy: Least part of the source's entropy of the mean prediction: below, the
            classes collapse.
        class_share: A class may be predicted at most so many times as often as by the source
            (or as by chance, where the source hardly predicts it).
        agreement: Least part of the items that keep the source's label, as a part of the source's
            mean confidence, which stands for its accuracy on them: a perfect model agrees with a
            source that is right on a third of the items on that third.
        steadiness: Least part of the items that keep the label of the last accepted round, once
            there is one: a learning rate that is too high changes many. Not asked for where it
            falls, and the last round decides.
        sure_flips: Largest part of the source's most confident items (the upper half) that may
            change their label, of those that are right by its mean confidence in them.
        cohesion: How much less than at the start of training neighbours may agree on their labels,
            see `cohesion`; neighbours by the source's features.
        rise: How much more they must agree where nothing but the training speaks for it: of a
            `TransductiveTask` that was not given BatchNorm's statistics of the target.
    """

    marginal_entropy: float = 0.5
    class_share: float = 3.0
    agreement: float = 0.6
    steadiness: float = 0.85
    sure_flips: float = 0.5
    cohesion: float = 0.01
    rise: float = 0.05

    def __post_init__(self) -> None:
        for name in ("marginal_entropy", "agreement", "steadiness", "sure_flips"):
            check_number(name, getattr(self, name), "[0, 1]")
        check_number("class_share", self.class_share, "[1, inf)")


@dataclass(frozen=True)
class Verdict:
    """The guard's result for a round.

    Attributes:
        scores: Name → value of each score.
        alarms: Messages of what is wrong; empty where nothing is.
        final: Whether further training cannot mend it.
    """

    scores: dict[str, float]
    alarms: list[str] = field(default_factory=list)
    final: bool = False

    @property
    def accepted(self) -> bool:
        """Whether the round may be kept."""
        return not self.alarms


class Guard:
    """Compares the model's predictions of the target with the source model's.

    Args:
        source: (N, K) probabilities by the source model.
        neighbours: (N, k) each item's nearest by the source model's features; None: unknown.
        limits: Thresholds of the alarms.

    Raises:
        DataError: predictions that are none.
    """

    def __init__(
        self, source: Tensor, neighbours: Tensor | None = None, limits: Limits | None = None
    ):
        self.source = score.check_probabilities(source, "the source's predictions")
        self.labels = self.source.argmax(dim=1)
        self.classes = self.source.shape[1]
        sure = self.source.amax(dim=1)
        self.upper = sure >= sure.median()
        self.confidence, self.surest = float(sure.mean()), float(sure[self.upper].mean())
        self.neighbours, self.limits = neighbours, limits or Limits()
        self.evenness = score.marginal_entropy(self.source)
        self.least_cohesion = self.cohesion(self.source) - self.limits.cohesion

    def begin_at(
        self, probabilities: Tensor, rises: bool = False, untrained: Tensor | None = None
    ) -> None:
        """Compare the cohesion with that of these predictions, from which training starts.

        Args:
            probabilities: (N, K) at the start of training.
            rises: Whether it has to be larger than theirs, by `Limits.rise`.
            untrained: (N, K) answers that took no training, whose cohesion it has to match.
        """
        change = self.limits.rise if rises else -self.limits.cohesion
        least = self.cohesion(probabilities) + change
        if untrained is not None:
            least = max(least, self.cohesion(untrained))
        self.least_cohesion = min(least, 1 - 1e-6)  # 1: of all labels

    def cohesion(self, probabilities: Tensor) -> float:
        """How much neighbours agree on the labels of these predictions (N, K), see `cohesion`."""
        if self.neighbours is None:
            return 0.0
        return score.cohesion(probabilities.cpu().argmax(dim=1), self.neighbours, self.classes)

    def check(self, probabilities: Tensor, accepted: Tensor | None = None) -> Verdict:
        """Check a round's predictions of the same items, (N, K)."""
        if not finite(probabilities):
            return Verdict({}, [NAN.format("predictions")], final=True)
        now = score.check_probabilities(probabilities)
        labels = now.argmax(dim=1)
        found = {
            "nuclear_norm": score.nuclear_norm(now),
            "information": score.information(now),
            "agreement": score.agreement(now, self.source),
            "marginal_entropy": score.marginal_entropy(now),
            "class_share": self._share(labels),
            "sure_flips": float((labels != self.labels)[self.upper].double().mean()),
            "cohesion": self.cohesion(now),
        }
        if accepted is not None:
            found["steadiness"] = score.agreement(now, accepted)
        collapsed = found["marginal_entropy"] < self._least_entropy
        return Verdict(found, list(self._alarms(found)), final=collapsed)

    @property
    def _least_entropy(self) -> float:
        return self.limits.marginal_entropy * self.evenness

    def _alarms(self, found: dict[str, float]) -> Iterator[str]:
        limits = self.limits
        if found["marginal_entropy"] < self._least_entropy:
            yield (
                f"the predictions collapse: their mean has an entropy of "
                f"{found['marginal_entropy']:.2f} nats, below {self._least_entropy:.2f}"
            )
        if found["class_share"] > limits.class_share:
            yield (
                f"a class is predicted {found['class_share']:.1f} times as often as before, above "
                f"{limits.class_share:g}"
            )
        least = limits.agreement * self.confidence
        if found["agreement"] < least:
            kept = f"{found['agreement']:.0%} of the items keep the source's label"
            yield f"{kept}, below {least:.0%}"
        if found.get("steadiness", 1.0) < limits.steadiness:
            kept = f"{found['steadiness']:.0%} of the items keep the label of the round before"
            yield f"{kept}, below {limits.steadiness:.0%}: the learning rate is too high"
        most = 1 - (1 - limits.sure_flips) * self.surest
        if found["sure_flips"] > most:
            yield (
                f"{found['sure_flips']:.0%} of the items that the source was surest of change "
                f"their label, above {most:.0%}"
            )
        if found["cohesion"] < self.least_cohesion:
            yield (
                f"neighbours agree too little on their labels: {found['cohesion']:.2f}, below "
                f"{self.least_cohesion:.2f}"
            )

    def _share(self, labels: Tensor) -> float:
        """How many times as often the most favoured class is predicted as by the source."""
        now, before = (
            torch.bincount(x, minlength=self.classes).double() for x in (labels, self.labels)
        )
        # For a class that the source hardly predicts, any count would be a large multiple.
        return float((now / before.clamp_min(len(labels) / self.classes)).max())
