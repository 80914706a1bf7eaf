"""`Guard`: checks of adaptation without labels, after each round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_lightning.adaptation import validators as score
from lora_lightning.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Thresholds of the alarms; each compares a round with the source model on the same items.

    Args:
        marginal_entropy: Least part of the source's entropy of the mean prediction: below, the
            classes collapse.
        class_share: A class may be predicted at most so many times as often as by the source
            (or as by chance, where the source hardly predicts it).
        agreement: Least part of the items that keep the source's label; or four fifths of the
            source's mean confidence, where that is more: its expected accuracy, if it is
            somewhat overconfident.
        steadiness: Least part of the items that keep the label of the round before: a learning
            rate that is too high changes many.
        sure_flips: Largest part of the source's most confident items (the upper half) that may
            change their label.
        cohesion: How much less than by the source's labels neighbours may agree, see `cohesion`.
    """

    marginal_entropy: float = 0.5
    class_share: float = 3.0
    agreement: float = 0.4
    steadiness: float = 0.85
    sure_flips: float = 0.5
    cohesion: float = 0.25

    def __post_init__(self) -> None:
        for name in ("marginal_entropy", "agreement", "steadiness", "sure_flips"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.class_share < 1:
            raise ConfigError(f"class_share must be at least 1, got {self.class_share}")


@dataclass(frozen=True)
class Verdict:
    """The guard's result for a round.

    Attributes:
        scores: Name → value of each score.
        alarms: Messages of what is wrong; empty where nothing is.
    """

    scores: dict[str, float]
    alarms: list[str] = field(default_factory=list)

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
        self.confidence = float(self.source.amax(dim=1).mean())
        self.neighbours, self.limits = neighbours, limits or Limits()
        self.evenness = score.marginal_entropy(self.source)
        self.cohesion = self._cohesion(self.labels)

    def check(self, probabilities: Tensor, before: Tensor | None = None) -> Verdict:
        """Check a round's predictions of the same items, (N, K).

        Args:
            probabilities: Of the round.
            before: Of the round before; None: it is the first.
        """
        if not bool(torch.isfinite(probabilities).all()):
            return Verdict({}, ["the predictions are NaN: the learning rate is too high"])
        now = score.check_probabilities(probabilities)
        labels = now.argmax(dim=1)
        found = {
            "nuclear_norm": score.nuclear_norm(now),
            "information": score.information(now),
            "agreement": score.agreement(now, self.source),
            "marginal_entropy": score.marginal_entropy(now),
            "class_share": self._share(labels),
            "sure_flips": self._flips(labels),
            "cohesion": self._cohesion(labels),
        }
        if before is not None:
            found["steadiness"] = score.agreement(now, before)
        return Verdict(found, list(self._alarms(found)))

    def _alarms(self, found: dict[str, float]) -> Iterator[str]:
        limits = self.limits
        least = limits.marginal_entropy * self.evenness
        if found["marginal_entropy"] < least:
            yield (
                f"the predictions collapse: their mean has an entropy of "
                f"{found['marginal_entropy']:.2f} nats, below {least:.2f}"
            )
        if found["class_share"] > limits.class_share:
            yield (
                f"a class is predicted {found['class_share']:.1f} times as often as before, above "
                f"{limits.class_share:g}"
            )
        least = limits.agreement and max(limits.agreement, 0.8 * self.confidence)
        if found["agreement"] < least:
            kept = f"{found['agreement']:.0%} of the items keep the source's label"
            yield f"{kept}, below {least:.0%}"
        if found.get("steadiness", 1.0) < limits.steadiness:
            kept = f"{found['steadiness']:.0%} of the items keep the label of the round before"
            yield f"{kept}, below {limits.steadiness:.0%}: the learning rate is too high"
        if found["sure_flips"] > limits.sure_flips:
            yield (
                f"{found['sure_flips']:.0%} of the items that the source was surest of change "
                f"their label, above {limits.sure_flips:.0%}"
            )
        least = self.cohesion - limits.cohesion
        if found["cohesion"] < least:
            yield (
                f"neighbours agree less than by the source's labels: {found['cohesion']:.2f}, "
                f"below {least:.2f}"
            )

    def _share(self, labels: Tensor) -> float:
        """How many times as often the most favoured class is predicted as by the source."""
        now, before = (
            torch.bincount(x, minlength=self.classes).double() for x in (labels, self.labels)
        )
        # For a class that the source hardly predicts, any count would be a large multiple.
        return float((now / before.clamp_min(len(labels) / self.classes)).max())

    def _flips(self, labels: Tensor) -> float:
        sure = self.source.amax(dim=1)
        upper = sure >= sure.median()
        return float((labels[upper] != self.labels[upper]).double().mean())

    def _cohesion(self, labels: Tensor) -> float:
        if self.neighbours is None:
            return 0.0
        return score.cohesion(labels, self.neighbours, self.classes)
