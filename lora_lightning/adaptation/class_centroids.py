"""Answers from class centroids of the target's features; and whether they can be trusted.

Nothing is trained. Legend of shapes: N items, K classes, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lora_lightning.adaptation.guard import Guard
from lora_lightning.adaptation.label_propagation import lame
from lora_lightning.adaptation.neighbours import (
    check_features,
    check_probabilities,
    nearest,
    unit_rows,
)
from lora_lightning.adaptation.target import Predicted
from lora_lightning.adaptation.validators import information, mean_entropy
from lora_lightning.lora.values import check_count, check_number

TEMPERATURE = 0.1  # of the cosines
NEIGHBOURS = 5
# Least gain of information by BatchNorm's statistics of the target, as a part of what the source's
# predictions lack: a smaller gain also comes where nothing helps.
GAIN = 0.12
CERTAIN_GAIN = 0.2  # from which on they help even where single predictions seem worse
# Most that the agreement between a picture's label and that of an augmented view may fall.
UNSTEADY = 0.08
# Least evenness of the classes by LAME. It merges classes that the target lacks into those of their
# neighbours: below, the centroids of the merged classes would split what belongs together.
COMPLETE, COMPLETE_RESTATED = 0.8, 0.75  # on the source's statistics, and on the target's
# Without BatchNorm: from this evenness on the centroids are trusted, or where neighbours agree on
# their labels by so much more (Cohen's kappa), which says that the source mistook whole classes.
COMPLETE_ALONE, COHERENT = 0.85, 0.15
LEAST_ITEMS = 50  # of fewer, a gain cannot be told from chance


@torch.no_grad()
def soft_centroids(
    features: Tensor, probabilities: Tensor, rounds: int = 3, temperature: float = TEMPERATURE
) -> Tensor:
    r"""The head's probabilities times the similarity to the target's class centroids.

    With :math:`q = p` at first, and :math:`z_i` the unit vector along :math:`f_i - \bar f`,

    .. math:: c_k \propto \sum_i q_{ik} z_i, \quad \|c_k\| = 1, \qquad
              q_{ik} \propto p_{ik} \exp(z_i^T c_k / \tau)

    `rounds` times. It assumes that all classes are there, see `complete`: those that the target
    lacks get a centroid as well, which takes items from the others. The centroids are SHOT's, Liang
    et al. 2020, arXiv:2002.08546, here soft and beside the head, whose opinion SHOT leaves out.

    Args:
        features: (N, D), the head's inputs.
        probabilities: (N, K), the head's, rows that sum to one.
        rounds: At least 1.
        temperature: τ, above 0.

    Returns:
        (N, K), rows that sum to one. N = 1 keeps its prediction.

    Raises:
        ConfigError: `rounds` or `temperature` is out of range.
        DataError: features or probabilities are none, or not of the same items.
    """
    check_count("rounds", rounds)
    check_number("temperature", temperature, "(0, inf)")
    p = check_probabilities(probabilities)
    f = check_features(features, len(p)).to(p)
    z = unit_rows(f - f.mean(dim=0))
    log_p = p.clamp_min(1e-10).log()
    q = p
    for _ in range(rounds):
        q = (log_p + z @ unit_rows(q.T @ z).T / temperature).softmax(dim=1)
    return q


def spread(said: Predicted) -> float:
    """Entropy of LAME's labels, which drop the classes that the target lacks, in units of log K.

    Of fewer items than classes log N takes the place of log K.
    """
    k = said.probabilities.shape[1]
    labels = lame(said.features, said.probabilities, NEIGHBOURS).argmax(dim=1)
    shares = torch.bincount(labels, minlength=k).double() / len(labels)
    return float(torch.special.entr(shares).sum()) / math.log(min(k, max(len(labels), 2)))


def complete(said: Predicted) -> bool:
    """Whether the target seems to hold all classes: a `spread` of `COMPLETE` or more."""
    return spread(said) >= COMPLETE


def statistics_gain(source: Predicted, restated: Predicted) -> float:
    """Gain of information by BatchNorm's statistics of the target, of what the source lacks."""
    before = information(source.probabilities)
    return (information(restated.probabilities) - before) / max(1 - before, 1e-6)


def unhelpful(
    source: Predicted, restated: Predicted, steadier: Callable[[], float] = lambda: 0.0
) -> str:
    """Why BatchNorm's statistics of the target do not help; "" where they can be trusted to.

    Args:
        source: Of the target's items, by the source model.
        restated: The same items with statistics re-estimated on them.
        steadier: Says by how much more of the items keep their label in an augmented view than by
            the source model; 0: not known. Asked only where the gain decides nothing.
    """
    gain = statistics_gain(source, restated)
    if gain < GAIN:
        return f"the predictions gain {gain:.2f} of the information that they lack, below {GAIN:g}"
    less = mean_entropy(restated.probabilities) > mean_entropy(source.probabilities)
    if less and gain < CERTAIN_GAIN:
        return "the predictions are less certain, as where classes are missing"
    if gain < CERTAIN_GAIN and (kept := steadier()) < -UNSTEADY:
        return f"{-kept:.0%} more of the items change their label when they are augmented"
    if (even := spread(restated)) < COMPLETE_RESTATED:
        least = f"below {COMPLETE_RESTATED:g}"
        return f"the spread over classes is {even:.2f}, {least}, as where some are missing"
    return ""


def confirmed_centroids(source: Predicted, guard: Guard) -> tuple[Tensor, str]:
    """`soft_centroids` of a model without BatchNorm, and whether they can be trusted.

    They can where there are 50 items, the guard has no alarm, and the source's `spread` is 0.85 or
    more, or neighbours agree on their labels by 0.15 of Cohen's kappa more than on the source's.

    Args:
        source: Of the target's items, by the source model.
        guard: Of these predictions, with the items' neighbours.

    Returns:
        (N, K), and why they cannot be trusted; "" where they can.
    """
    found = soft_centroids(source.features, source.probabilities)
    if (count := len(found)) < LEAST_ITEMS:
        return found, f"{count} items are too few to tell a gain from chance, below {LEAST_ITEMS}"
    if alarms := guard.check(found).alarms:
        return found, f"by class centroids {alarms[0]}"
    rise = guard.cohesion(found) - guard.cohesion(source.probabilities)
    if rise >= COHERENT or (even := spread(source)) >= COMPLETE_ALONE:
        return found, ""
    return found, (
        f"the source's predictions, smoothed over neighbours, have {even:.2f} of an even spread "
        f"over the classes, below {COMPLETE_ALONE:g}, and by class centroids neighbours agree by "
        f"{rise:.2f} more, below {COHERENT:g}"
    )


def trusted_centroids(source: Predicted, restated: Predicted | None) -> tuple[Tensor, str]:
    """`soft_centroids` where they can be trusted, and else the source model's predictions.

    Args:
        source: Of the target's items, by the source model.
        restated: The same with BatchNorm's statistics of the target; None without BatchNorm, where
            `confirmed_centroids` decides.

    Returns:
        (N, K) probabilities, and ``"target statistics"``, ``"source statistics"`` or ``"source"``.
    """
    if restated is None:
        near = nearest(source.features, NEIGHBOURS)[0] if len(source.features) > 1 else None
        found, why = confirmed_centroids(source, Guard(source.probabilities, near))
        return (source.probabilities, "source") if why else (found, "source statistics")
    if not unhelpful(source, restated):
        return soft_centroids(restated.features, restated.probabilities), "target statistics"
    if complete(source):
        return soft_centroids(source.features, source.probabilities), "source statistics"
    return source.probabilities, "source"
