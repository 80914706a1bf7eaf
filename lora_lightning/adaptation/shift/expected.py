"""Expected accuracy on a target without its labels, and an interval that holds 90 % of the time.

The constants were chosen by `benchmarks/shift_prediction_suites.py`, see docs/shift.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_lightning.adaptation import validators as score
from lora_lightning.adaptation.shift.batch_norm_agreement import Opinion

if TYPE_CHECKING:
    from lora_lightning.adaptation.shift.source_statistics import SourceStatistics

GAIN = 0.2  # of information by the target's statistics, from which on agreement alone counts
NORMAL = 1.645  # standard deviations of a normal distribution on both sides that hold 90 %
# Half of the interval beside what counting items makes of it: on the source, and what a complete
# loss adds.
FLOOR, REACH = 0.06, 0.25
ONE_CLASS = 0.9  # part of the answers that name one class, from which on the model may fail


def expected_accuracy(
    source: SourceStatistics, probabilities: Tensor, second: Opinion | None = None
) -> float | None:
    r"""Expected accuracy of the source model's predictions (M, K); None without source labels.

    :math:`acc_s (1 - l)`, where the part l that is lost is told by how sure the model is,

    .. math:: l_c = 1 - 2\,P(c_t > c_s)

    with the confidences of an item of the target and of one of the source, which two equal sets
    make 0: a rank statistic, so that a model's calibration does not matter. With a second opinion
    it is also told by agreement, :math:`l_a = 1 - a_t / a_s`, with :math:`a_t` that on the target
    and :math:`a_s` that on the source (Jiang et al. 2022, arXiv:2106.13799), and

    .. math:: l = l_c + w\,(l_a - l_c), \quad w = \min(1, g / 0.2)

    where g is the gain of information by the target's statistics: it is small where classes are
    missing, which makes these statistics and so the agreement too bad. Both losses are at least 0.
    """
    if source.accuracy is None:
        return None
    return source.accuracy * (1 - _lost(source, probabilities, second))


def expected_interval(
    source: SourceStatistics, probabilities: Tensor, second: Opinion | None = None
) -> tuple[float, float] | None:
    """Least and most of `expected_accuracy`; holds 90 % of the time, see docs/shift.md.

    It is wider with fewer items, with fewer of the source, and the more is lost. Where nearly all
    answers name one class, all of them may be wrong: it begins at 0.
    """
    if source.accuracy is None:
        return None
    lost = _lost(source, probabilities, second)
    expected = source.accuracy * (1 - lost)
    items = 1 / len(probabilities) + 1 / len(source.confidence)
    # An accuracy of 0 or 1 on a few items does not make it certain.
    chance = min(max(expected, 0.1), 0.9)
    counted = NORMAL * math.sqrt(chance * (1 - chance) * items)
    half = math.hypot(counted, FLOOR + REACH * lost)
    answers = probabilities.argmax(dim=1).bincount()
    low = 0.0 if int(answers.max()) >= ONE_CLASS * len(probabilities) else expected - half
    return max(0.0, low), min(1.0, expected + half)


def expected_drop(
    source: SourceStatistics, probabilities: Tensor, second: Opinion | None = None
) -> float:
    """Expected drop of accuracy; without the source's labels, of agreement or of confidence."""
    expected = expected_accuracy(source, probabilities, second)
    if expected is not None and source.accuracy is not None:
        return source.accuracy - expected
    if second is not None and source.agreement is not None:
        return source.agreement - second.agreement(probabilities)
    return float(source.confidence.mean() - probabilities.amax(dim=1).mean())


def expected_of_adapted(
    source: SourceStatistics, probabilities: Tensor, adapted: Tensor, second: Opinion | None = None
) -> float | None:
    """Expected accuracy of an adapted model; the mean of what both models' answers say.

    By agreement with the second opinion alone, or else average thresholded confidence (Garg et al.
    2022, arXiv:2201.04234): without an interval, it was not calibrated.
    """
    if source.accuracy is None:
        return None
    accuracy = source.accuracy

    def of(p: Tensor) -> float:
        if second is None or not source.agreement:
            return score.thresholded_confidence(p.amax(dim=1), source.confidence, accuracy)
        return min(1.0, accuracy * second.agreement(p) / source.agreement)

    return (of(probabilities) + of(adapted)) / 2


def _lost(source: SourceStatistics, probabilities: Tensor, second: Opinion | None) -> float:
    """The part of the source's accuracy that is lost, 0 to 1."""
    by_confidence = max(0.0, 1 - 2 * _surer(probabilities.amax(dim=1), source.confidence))
    if second is None or not source.agreement:
        return by_confidence
    by_agreement = max(0.0, 1 - second.agreement(probabilities) / source.agreement)
    before = score.information(probabilities[second.items])
    gain = (score.information(second.probabilities) - before) / max(1 - before, 1e-6)
    weight = min(1.0, max(0.0, gain / GAIN))
    return by_confidence + weight * (by_agreement - by_confidence)


def _surer(confidence: Tensor, others: Tensor) -> float:
    """The probability that one of `confidence` is above one of `others`; equal ones count half."""
    ranked, own = others.double().sort().values, confidence.double().to(others.device)
    below = torch.searchsorted(ranked, own) + torch.searchsorted(ranked, own, right=True)
    return float(below.double().mean()) / (2 * len(others))
