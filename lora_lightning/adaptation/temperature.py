"""One temperature that makes a model as sure as it is right, with labels or without."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_lightning.errors import ConfigError, DataError

COLDEST, HOTTEST = 1e-2, 1e2


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    r"""The T that makes the labels likeliest, :math:`\arg\min_T CE(z / T, y)`.

    Guo et al. 2017, "On calibration of modern neural networks", arXiv:1706.04599; for a small
    labelled (canary) set. By SciPy's bounded search over log T.

    Args:
        logits: (N, K).
        labels: (N,) int64.

    Returns:
        T, in [0.01, 100].

    Raises:
        ConfigError: not one label for each item.
        DataError: the logits are none.
    """
    from scipy.optimize import minimize_scalar

    z = _checked(logits)
    if labels.shape != z.shape[:1]:
        raise ConfigError(f"expected one label for each of {len(z)} items, got {labels.shape}")

    def loss(log_t: float) -> float:
        return float(torch.nn.functional.cross_entropy(z / math.exp(log_t), labels.cpu()))

    found = minimize_scalar(loss, bounds=(math.log(COLDEST), math.log(HOTTEST)), method="bounded")
    return math.exp(float(found.x))


def matched_temperature(logits: Tensor, accuracy: float) -> float:
    r"""The T at which the mean confidence is an accuracy: :math:`\frac1N\sum_i \max_k p_{ik} = a`.

    Without labels the accuracy is an estimate, such as `validators.expected_accuracy`. The mean
    confidence falls with T, so that there is one such T; beyond what [0.01, 100] reaches, its end.

    Args:
        logits: (N, K).
        accuracy: a, in [0, 1].

    Raises:
        ConfigError: the accuracy is none.
        DataError: the logits are none.
    """
    from scipy.optimize import brentq

    z = _checked(logits)
    if not 0 <= accuracy <= 1:
        raise ConfigError(f"accuracy must lie in [0, 1], got {accuracy}")

    def excess(log_t: float) -> float:
        return float((z / math.exp(log_t)).softmax(dim=1).amax(dim=1).mean()) - accuracy

    low, high = math.log(COLDEST), math.log(HOTTEST)
    if excess(low) <= 0:
        return COLDEST
    if excess(high) >= 0:
        return HOTTEST
    return math.exp(float(brentq(excess, low, high)))


def _checked(logits: Tensor) -> Tensor:
    if logits.ndim != 2 or logits.shape[1] < 2 or not len(logits):
        raise DataError(f"expected logits (items, classes), got the shape {tuple(logits.shape)}")
    if not bool(torch.isfinite(logits).all()):
        raise DataError("the logits hold NaN or infinity: look at those items, or at the weights")
    return logits.detach().double().cpu()
