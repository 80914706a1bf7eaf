"""Corrections of predictions that train nothing: LAME and feature re-centring.

They are the baselines that every adapter has to beat. Legend of shapes: N items, K classes,
D features, k neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.transduction.neighbours import (
    check_count,
    check_features,
    check_probabilities,
    nearest,
)

TOLERANCE = 1e-6  # of LAME's answers, where it stops


@torch.no_grad()
def lame(
    features: Tensor, probabilities: Tensor, neighbours: int = 5, iterations: int = 100
) -> Tensor:
    r"""Answers that stay near the model's and agree among neighbours.

    The fixed point of
    :math:`z_{ik} \propto p_{ik} \exp\big(\sum_j w_{ij} z_{jk}\big)`, begun at p, with
    :math:`w_{ij} = 1` if j is among the k nearest of i, else 0. It minimises
    :math:`\sum_i KL(z_i \| p_i) - \sum_{ij} w_{ij} z_i^T z_j` step by step. Boudiaf et al. 2022,
    "Parameter-free online test-time adaptation", arXiv:2201.05718.

    Args:
        features: (N, D), compared by cosine.
        probabilities: (N, K), rows that sum to one.
        neighbours: k, at most N − 1 are used.
        iterations: Steps at most; it ends when no answer moves by more than 1e-6.

    Returns:
        (N, K), rows that sum to one. N = 1 keeps its prediction.

    Raises:
        ConfigError: `neighbours` or `iterations` is no whole number, or below 1.
        DataError: features or probabilities are none, or not of the same items.
    """
    check_count(iterations, "iterations")
    p = check_probabilities(probabilities)
    near = nearest(check_features(features, len(p)), neighbours)[0].to(p.device)
    log_p = p.clamp_min(1e-10).log()
    z = log_p.softmax(dim=1)
    for _ in range(iterations):
        before = z
        z = (log_p + z[near].sum(dim=1)).softmax(dim=1)
        if float((z - before).abs().max()) < TOLERANCE:
            break
    return z


@torch.no_grad()
def recentred(features: Tensor, source_mean: Tensor, head: nn.Module) -> Tensor:
    r"""The head's answers for features moved to where the source's lie on the mean.

    :math:`p_i = softmax(h(f_i - \bar f + \bar f_s))`: what the target's features share is taken
    for the change of domain. It is wrong where the classes' shares change. The first moment of
    CORAL, Sun et al. 2016, arXiv:1511.05547.

    Args:
        features: (N, D) that the head takes, of the target.
        source_mean: (D,) mean of the source's features.
        head: From features (N, D) to logits (N, K).

    Raises:
        ConfigError: the mean is not one number for each feature.
        DataError: the features are none, or the head gives something else than logits (N, K).
    """
    found = check_features(features)
    if source_mean.shape != found.shape[1:]:
        raise ConfigError(
            f"source_mean must hold one number for each of {found.shape[1]} features, got the "
            f"shape {tuple(source_mean.shape)}"
        )
    logits = head(found - found.mean(dim=0) + source_mean.to(found))
    if logits.ndim != 2 or len(logits) != len(found):
        raise DataError(f"the head gives {tuple(logits.shape)} for {len(found)} items, not logits")
    return logits.float().softmax(dim=1)  # type: ignore[no-any-return]
