"""`select`: choose among adapted models without labels, or by a small labelled canary set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from torch import Tensor

from lora_lightning.adaptation.guard import Guard, Limits
from lora_lightning.adaptation.validators import agreement, nuclear_norm
from lora_lightning.errors import ConfigError

SOURCE = "source"
LEAST_CANDIDATES = 3  # that have not collapsed: two have no majority
LEAST_AGREEMENT = 0.5  # of the chosen one with the others, in the mean


@dataclass(frozen=True)
class Candidate:
    """An adapted model, by its predictions of the target.

    Attributes:
        name: For the report of the choice.
        probabilities: (N, K), of the same items in the same order for all candidates.
        canary: Accuracy on a small labelled set; None without one.
    """

    name: str
    probabilities: Tensor
    canary: float | None = None


@dataclass(frozen=True)
class Selection:
    """The chosen candidate, and why.

    Attributes:
        name: The chosen candidate, or ``"source"``.
        scores: Name → value of the criterion for those that were considered.
        rejected: Name → the guard's first alarm.
        criterion: ``"canary"``, ``"agreement"`` or ``"nuclear norm"``.
    """

    name: str
    scores: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    criterion: str = "agreement"


def select(
    candidates: Sequence[Candidate],
    source: Tensor,
    neighbours: Tensor | None = None,
    limits: Limits | None = None,
) -> Selection:
    """The candidate with the highest agreement with the others, collapsed ones left out.

    Candidates that adapted by different objectives or rates err differently; the majority's
    prediction is right more often than the most confident one. (The nuclear norm alone takes the
    candidate that was driven hardest.) Where three or more have not collapsed and the chosen one
    agrees with the others on half of the items, that decides, also against the guard's other
    alarms, which compare with the source model. Where not, those without an alarm are ranked
    by nuclear norm; if there is none, the source stays. The medoid is that of a vote as in Hu et
    al. 2024, "Towards reliable model selection for unsupervised domain adaptation", NeurIPS
    Datasets and Benchmarks, who compare with the ensemble's mean.

    Candidates with a `canary` and without an alarm are ranked by it, ties broken by nuclear norm:
    a canary never outweighs an alarm.

    Args:
        candidates: With predictions of the same items.
        source: (N, K) by the source model.
        neighbours: (N, k) for the guard, see there.
        limits: Of the guard.

    Raises:
        ConfigError: there is no candidate, two have one name, or only some have a canary.
        DataError: predictions that are none.
    """
    _check(candidates)
    limits = limits or Limits(cohesion=0.25)  # they need not have begun at the source's labels
    if candidates[0].canary is None:
        # Only the alarm of a collapse; the other candidates replace the comparison with the source.
        collapse = replace(limits, agreement=0.0, sure_flips=1.0, cohesion=math.inf)
        found = _by_agreement(*_pass(candidates, Guard(source, neighbours, collapse)))
        if found is not None:
            return found
    passed, rejected = _pass(candidates, Guard(source, neighbours, limits))
    norms = {c.name: nuclear_norm(c.probabilities) for c in passed}
    scores = {c.name: norms[c.name] if c.canary is None else c.canary for c in passed}
    criterion = "nuclear norm" if candidates[0].canary is None else "canary"
    best = max(scores, key=lambda name: (scores[name], norms[name]), default=SOURCE)
    return Selection(best, scores, rejected, criterion)


def _check(candidates: Sequence[Candidate]) -> None:
    names = [c.name for c in candidates]
    if not names or len(set(names)) < len(names) or SOURCE in names:
        raise ConfigError(
            f"candidates must have different names, none of them {SOURCE!r}, and there must be one "
            f"at least; got {names}"
        )
    if len({c.canary is None for c in candidates}) > 1:
        raise ConfigError(
            "some candidates have a canary accuracy and some not: measure all of them, or none"
        )


def _pass(candidates: Sequence[Candidate], guard: Guard) -> tuple[list[Candidate], dict[str, str]]:
    verdicts = {c.name: guard.check(c.probabilities) for c in candidates}
    rejected = {name: v.alarms[0] for name, v in verdicts.items() if v.alarms}
    return [c for c in candidates if c.name not in rejected], rejected


def _by_agreement(passed: list[Candidate], rejected: dict[str, str]) -> Selection | None:
    """The medoid; None where too few are left, or agree too little, for a majority."""
    if len(passed) < LEAST_CANDIDATES:
        return None
    scores = {
        c.name: fmean(agreement(c.probabilities, o.probabilities) for o in passed if o is not c)
        for c in passed
    }
    best = max(scores, key=lambda name: scores[name])
    return Selection(best, scores, rejected) if scores[best] >= LEAST_AGREEMENT else None
