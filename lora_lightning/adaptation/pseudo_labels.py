"""Pseudo-labels of unlabelled items: labels, weights, and reasons for leaving items out.

Legend of shapes: N items, K classes, D features. All functions take detached tensors of any
device, give results on that device, and are deterministic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lightning.adaptation.neighbours import check_features, check_probabilities, unit_rows
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.lora.values import check_count, check_number


@dataclass
class PseudoLabels:
    """Pseudo-labels of N unlabelled items.

    Attributes:
        labels: (N,) int64, also of the items left out.
        weights: (N,) in [0, 1]; 0: left out.
        reasons: Why each item was left out; "" where it was not.

    Raises:
        DataError: they are not of the same items, or weights leave [0, 1].
    """

    labels: Tensor
    weights: Tensor
    reasons: list[str]

    def __post_init__(self) -> None:
        sizes = tuple(self.labels.shape), tuple(self.weights.shape), (len(self.reasons),)
        if len(set(sizes)) != 1:
            raise DataError(
                "labels, weights and reasons must be one of each per item, got the shapes "
                f"{sizes[0]}, {sizes[1]} and {sizes[2]}"
            )
        if not bool(((self.weights >= 0) & (self.weights <= 1)).all()):
            raise DataError("weights must be from 0 to 1; got some that are not, or NaN")

    def __len__(self) -> int:
        return len(self.reasons)

    @property
    def accepted(self) -> Tensor:
        """(N,) bool: the items with a weight."""
        return self.weights > 0

    def histogram(self, classes: int) -> Tensor:
        """(K,) accepted items of each class.

        Raises:
            ConfigError: a label is not below `classes`.
        """
        check_count("classes", classes)
        if len(self) and int(self.labels.max()) >= classes:
            raise ConfigError(
                f"classes is {classes}, but there is an item of class {int(self.labels.max())}"
            )
        return torch.bincount(self.labels[self.accepted], minlength=classes)

    def agreement(self, other: PseudoLabels | Tensor) -> float:
        """The part of the items with the same label, left out or not; 1 where there are none.

        Args:
            other: Of the same items; or their labels (N,).

        Raises:
            DataError: they are not of as many items.
        """
        labels = other.labels if isinstance(other, PseudoLabels) else other
        if labels.shape != self.labels.shape:
            raise DataError(
                f"agreement needs labels of the same items, got {tuple(self.labels.shape)} and "
                f"{tuple(labels.shape)}"
            )
        same = self.labels == labels.to(self.labels.device)
        return float(same.double().mean()) if len(self) else 1.0


def threshold(probabilities: Tensor, least: float = 0.9) -> PseudoLabels:
    r"""Accept the items whose confidence :math:`\max_k p_{ik}` is at least `least`; weight 1.

    Lee 2013, "Pseudo-label"; the threshold as in Sohn et al. 2020, "FixMatch", arXiv:2001.07685.

    Args:
        probabilities: (N, K), rows that sum to one.
        least: In [0, 1].

    Raises:
        ConfigError: `least` is not in [0, 1].
        DataError: the probabilities are none.
    """
    check_number("least", least, "[0, 1]")
    confidence, labels = check_probabilities(probabilities).max(dim=1)
    kept = confidence >= least
    reasons = [
        "" if ok else f"confidence {value:.2f} below {least:.2f}"
        for ok, value in zip(kept.tolist(), confidence.tolist(), strict=True)
    ]
    return PseudoLabels(labels, kept.to(confidence.dtype), reasons)


def class_balanced(probabilities: Tensor, per_class: int | float) -> PseudoLabels:
    r"""Accept the most confident items of each predicted class, the same number or part; weight 1.

    Class-balanced self-training selects by a threshold of each class; its labels are weighted by
    those thresholds, ours are the predictions as they are. Of equal confidences the earlier item
    is taken. Classes that are never predicted get nothing. Zou et al. 2018, arXiv:1810.07911.

    Args:
        probabilities: (N, K), rows that sum to one.
        per_class: int: items of each class, at least 1. float in (0, 1]: part of the items that
            are predicted as the class, rounded up: no predicted class is left without any.

    Raises:
        ConfigError: `per_class` is out of range.
        DataError: the probabilities are none.
    """
    if isinstance(per_class, float):
        check_number("per_class, where it is a part and no number of items,", per_class, "(0, 1]")
    else:
        check_count("per_class", per_class)
    confidence, labels = check_probabilities(probabilities).max(dim=1)
    kept = torch.zeros_like(labels, dtype=torch.bool)
    reasons = [""] * len(labels)
    for label in sorted(set(labels.tolist())):
        items = (labels == label).nonzero().squeeze(1)
        # Less a small tolerance: 0.1 · 30 is a bit more than 3 in floating point.
        part = isinstance(per_class, float)
        count = math.ceil(per_class * len(items) - 1e-9) if part else int(per_class)
        ranked = items[confidence[items].argsort(descending=True, stable=True)]
        kept[ranked[:count]] = True
        for item in ranked[count:].tolist():
            reasons[item] = f"class {label} has its {count} already"
    return PseudoLabels(labels, kept.to(confidence.dtype), reasons)


@torch.no_grad()
def centroid(features: Tensor, probabilities: Tensor, rounds: int = 1) -> PseudoLabels:
    r"""The class whose centroid is nearest by cosine; all items are accepted with weight 1.

    .. math:: c_k = \frac{\sum_i p_{ik} z_i}{\sum_i p_{ik}}, \qquad
              \hat y_i = \arg\max_k \cos(z_i, c_k), \qquad z_i = f_i / \|f_i\|

    then `rounds` times again with :math:`1[\hat y_i = k]` for :math:`p_{ik}`. Classes that are
    never predicted have no centroid. SHOT, Liang et al. 2020, arXiv:2002.08546, whose features have
    a 1 appended; ours are as given. N = 1 keeps its prediction.

    Args:
        features: (N, D).
        probabilities: (N, K), rows that sum to one.
        rounds: 0: the first centroids decide.

    Raises:
        ConfigError: `rounds` is no whole number, or negative.
        DataError: features or probabilities are none, or not of the same items.
    """
    if rounds != 0:
        check_count("rounds (if not 0)", rounds)
    p = check_probabilities(probabilities)
    z = unit_rows(check_features(features, len(p))).to(p.device, p.dtype)
    labels = p.argmax(dim=1)
    shares = p
    for _ in range(rounds + 1):
        predicted = torch.bincount(labels, minlength=p.shape[1]) > 0
        # The sum has the direction of the mean, without a division by zero.
        similarity = z @ unit_rows(shares.T @ z).T
        labels = similarity.masked_fill(~predicted, -torch.inf).argmax(dim=1)
        shares = torch.nn.functional.one_hot(labels, p.shape[1]).to(p.dtype)
    return PseudoLabels(labels, torch.ones_like(p[:, 0]), [""] * len(p))
