"""Unsupervised validators: scores of predictions without labels.

Legend of shapes: N items, K classes, D features. Probabilities are rows that sum to one.
Every score has blind spots: the docstrings name them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_lightning.adaptation import neighbours
from lora_lightning.errors import ConfigError, DataError


def check_probabilities(probabilities: Tensor, name: str = "probabilities") -> Tensor:
    """(N, K) as float64 on the CPU.

    Raises:
        DataError: there is no item, one class, NaN, or rows that do not sum to one.
    """
    found = neighbours.check_probabilities(probabilities, name)
    if found.shape[1] < 2:
        raise DataError(f"{name} must have at least two classes, got {found.shape[1]}")
    return found.double().cpu()


def nuclear_norm(probabilities: Tensor) -> float:
    r"""Nuclear norm of confident and diverse predictions, in (0, 1]: ‖P‖* / √(N · min(N, K)).

    Blind to confident mistakes that are spread evenly over the classes. Cui et al. 2020, "Towards
    discriminability and diversity", arXiv:2003.12237; as a validator Deng et al. 2023,
    arXiv:2302.01094.
    """
    p = check_probabilities(probabilities)
    # The singular values of P by the eigenvalues of PᵀP: K × K, whatever N is.
    values = torch.linalg.eigvalsh(p.T @ p).clamp_min(0).sqrt()
    return float(values.sum()) / math.sqrt(len(p) * min(p.shape))


def mean_entropy(probabilities: Tensor) -> float:
    """Mean entropy of the rows in nats. Blind to collapse: one class for all, confidently, is 0."""
    return float(_entropy(check_probabilities(probabilities)).mean())


def marginal_entropy(probabilities: Tensor) -> float:
    """Entropy of the mean row in nats, log K at most: how evenly the classes are used."""
    return float(_entropy(check_probabilities(probabilities).mean(dim=0, keepdim=True)))


def information(probabilities: Tensor) -> float:
    r"""(H(p̄) − mean H(pᵢ)) / log K, in [0, 1]: the objective of information maximisation.

    A model trained on it scores high in it: it suits the comparison of other objectives.
    """
    found = marginal_entropy(probabilities) - mean_entropy(probabilities)
    return found / math.log(probabilities.shape[1])


def agreement(probabilities: Tensor, others: Tensor) -> float:
    """The part of the items that both label alike.

    Raises:
        DataError: they are not of the same items and classes.
    """
    if probabilities.shape != others.shape:
        raise DataError(
            f"agreement needs predictions of the same items and classes, got "
            f"{tuple(probabilities.shape)} and {tuple(others.shape)}"
        )
    return float((probabilities.argmax(1) == others.argmax(1)).double().mean())


def expected_accuracy(probabilities: Tensor, variants: Sequence[Tensor]) -> float:
    r"""An estimate of accuracy: the mean agreement with predictions under dropout, corrected.

    :math:`1 - \hat e\,`, with :math:`\hat e` the disagreement divided by
    :math:`H(\bar p) / \log K`, at most 1: a model that uses few classes agrees with itself too
    easily. After AETTA, Lee et al. 2024, arXiv:2404.01351.

    Raises:
        ConfigError: there are no variants.
    """
    if not variants:
        raise ConfigError("expected_accuracy needs predictions under dropout, at least one set")
    p = check_probabilities(probabilities)
    disagreement = 1 - sum(agreement(probabilities, v) for v in variants) / len(variants)
    evenness = marginal_entropy(torch.cat([p, *map(check_probabilities, variants)]))
    share = evenness / math.log(p.shape[1])
    return 1 - min(1.0, disagreement / share) if share > 0 else 0.0


def thresholded_confidence(
    confidence: Tensor, source_confidence: Tensor, source_accuracy: float
) -> float:
    r"""Expected accuracy: the part of the items with a confidence of t or more.

    t is such that this part, of the source's items that the model was not trained on, is its
    accuracy there. Blind to a model that is confident and wrong. Average thresholded confidence
    (ATC), Garg et al. 2022, "Leveraging unlabeled data to predict out-of-distribution
    performance", arXiv:2201.04234.

    Args:
        confidence: (M,) of the target's items: the likeliest class's probability.
        source_confidence: (N,), likewise of the source's.
        source_accuracy: In [0, 1].

    Raises:
        DataError: there is no item, or an accuracy out of range.
    """
    if not len(confidence) or not len(source_confidence) or not 0 <= source_accuracy <= 1:
        raise DataError(
            f"expected accuracy needs items of both domains and an accuracy in [0, 1]; got "
            f"{len(confidence)}, {len(source_confidence)} and {source_accuracy}"
        )
    wrong = round((1 - source_accuracy) * len(source_confidence))
    if wrong == len(source_confidence):
        return 0.0
    threshold = source_confidence.sort().values[wrong]
    return float((confidence >= threshold).double().mean())


def cohesion(labels: Tensor, near: Tensor, classes: int) -> float:
    r"""Agreement of neighbours' labels beyond chance: Cohen's kappa, 1 at most.

    :math:`(a - c) / (1 - c)` with a the part of the (item, neighbour) pairs that agree and c what
    the labels' shares would give by chance. Labels (N,), neighbours `near` (N, k) by the *source's*
    features: adaptation cannot make them agree by moving features. Labels that are all alike
    give 0. Cohen 1960, "A coefficient of agreement for nominal scales".
    """
    if near.numel() == 0:
        return 0.0
    agree = float((labels[near] == labels[:, None]).double().mean())
    shares = torch.bincount(labels, minlength=classes).double() / len(labels)
    chance = float((shares**2).sum())
    return 0.0 if chance >= 1 else (agree - chance) / (1 - chance)


def _entropy(p: Tensor) -> Tensor:
    found: Tensor = torch.special.entr(p).sum(dim=-1)
    return found
