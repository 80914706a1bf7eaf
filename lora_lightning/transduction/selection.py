"""`select`: choose among adapted models without labels, or by a small labelled canary set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lora_lightning.errors import ConfigError
from lora_lightning.transduction.guard import Guard, Limits
from lora_lightning.transduction.validators import nuclear_norm

SOURCE = "source"


@dataclass(frozen=True)
class Candidate:
    """A way to adapt, by what it says of the target.

    Attributes:
        name: What the choice is reported as.
        probabilities: (N, K), of the same items in the same order for all candidates.
        canary: Accuracy on a small labelled set; None without one.
    """

    name: str
    probabilities: Tensor
    canary: float | None = None


@dataclass(frozen=True)
class Selection:
    """What was chosen, and why.

    Attributes:
        name: The chosen candidate, or ``"source"``.
        scores: Name → nuclear norm (or canary accuracy) of those that were considered.
        rejected: Name → the guard's first alarm.
        criterion: ``"canary"`` or ``"nuclear norm"``.
    """

    name: str
    scores: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    criterion: str = "nuclear norm"


def select(
    candidates: Sequence[Candidate],
    source: Tensor,
    neighbours: Tensor | None = None,
    limits: Limits | None = None,
) -> Selection:
    """The candidate with the highest nuclear norm of those that set off no alarm of the guard.

    The nuclear norm alone picks a collapsed model now and then: alarms come first. What remains
    where none passes is the source. Candidates with a `canary` are ranked by it, the nuclear norm
    deciding between equals; but no canary redeems a candidate that sets off an alarm.

    Args:
        candidates: With predictions of the same items.
        source: (N, K) by the source model.
        neighbours: (N, k) for the guard, see there.
        limits: Of the guard.

    Raises:
        ConfigError: there is no candidate, two have one name, or only some have a canary.
        DataError: predictions that are none.
    """
    names = [c.name for c in candidates]
    if not names or len(set(names)) < len(names) or SOURCE in names:
        raise ConfigError(
            f"candidates must have different names, none of them {SOURCE!r}, and there must be one "
            f"at least; got {names}"
        )
    with_canary = [c.canary is not None for c in candidates]
    if any(with_canary) and not all(with_canary):
        raise ConfigError(
            "some candidates have a canary accuracy and some not: measure all of them, or none"
        )
    guard = Guard(source, neighbours, limits)
    verdicts = {c.name: guard.check(c.probabilities) for c in candidates}
    rejected = {name: v.alarms[0] for name, v in verdicts.items() if v.alarms}
    passed = [c for c in candidates if c.name not in rejected]
    norms = {c.name: nuclear_norm(c.probabilities) for c in passed}
    scores = {c.name: norms[c.name] if c.canary is None else c.canary for c in passed}
    criterion = "canary" if all(with_canary) else "nuclear norm"
    best = max(scores, key=lambda name: (scores[name], norms[name]), default=SOURCE)
    return Selection(best, scores, rejected, criterion)
