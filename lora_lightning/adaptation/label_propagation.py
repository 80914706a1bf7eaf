"""Predictions that agree over the graph of nearest neighbours: label propagation, LAME.

Legend of shapes: N items, K classes, D features, k neighbours.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lora_lightning.adaptation.neighbours import (
    check_count,
    check_features,
    check_probabilities,
    nearest,
)
from lora_lightning.adaptation.pseudo_labels import PseudoLabels, alone
from lora_lightning.errors import ConfigError

SHARPNESS = 3  # of the similarities, γ in the paper
TOLERANCE = 1e-6  # of the conjugate gradients, and of the change at which LAME stops


@torch.no_grad()
def propagate(
    features: Tensor, probabilities: Tensor, neighbours: int = 10, alpha: float = 0.9
) -> PseudoLabels:
    r"""Labels propagated over the neighbour graph, weighted by their certainty.

    .. math:: Z = (I - \alpha S)^{-1} P, \qquad S = D^{-1/2} W D^{-1/2}, \qquad
              W = \tfrac12 (A + A^T), \qquad a_{ij} = \max(\cos(f_i, f_j), 0)^3

    over the k nearest j of each i, by SciPy's conjugate gradients on the sparse graph. The label
    is :math:`\arg\max_k z_{ik}`, the weight :math:`1 - H(\hat z_i) / \log K`. Zhou et al. 2004,
    "Learning with local and global consistency"; graph and weights as in Iscen et al. 2019,
    arXiv:1904.04717. N = 1 is left out with its own prediction.

    Args:
        features: (N, D), compared by cosine.
        probabilities: (N, K), rows that sum to one.
        neighbours: k, at most N − 1 are used.
        alpha: α, in [0, 1): how far labels spread; 0 keeps the predictions.

    Raises:
        ConfigError: `alpha` or `neighbours` is out of range.
        DataError: features or probabilities are none, or not of the same items.
    """
    from scipy.sparse import coo_array, diags_array, eye_array
    from scipy.sparse.linalg import cg

    if not 0 <= alpha < 1:
        raise ConfigError(f"alpha must lie in [0, 1), got {alpha}")
    p = check_probabilities(probabilities)
    near, alike = nearest(check_features(features, len(p)), neighbours)
    if len(p) == 1:
        return alone(p)
    rows = np.repeat(np.arange(len(p)), near.shape[1])
    strength = alike.clamp_min(0).double().cpu().numpy().ravel() ** SHARPNESS
    graph = coo_array((strength, (rows, near.cpu().numpy().ravel())), shape=(len(p),) * 2).tocsr()
    graph = (graph + graph.T) / 2
    degrees = np.asarray(graph.sum(axis=1)).ravel()
    # An item without similar ones has no edge: it keeps its own prediction.
    scale = diags_array(1 / np.sqrt(np.where(degrees > 0, degrees, 1.0)))
    system = eye_array(len(p)) - alpha * (scale @ graph @ scale)
    start = p.double().cpu().numpy()
    spread = np.stack([cg(system, column, rtol=TOLERANCE)[0] for column in start.T], axis=1)
    z = torch.from_numpy(spread).clamp_min(0)
    z = (z / z.sum(dim=1, keepdim=True).clamp_min(1e-12)).to(p)
    evenness = torch.special.entr(z).sum(dim=1) / math.log(max(p.shape[1], 2))
    weights = (1 - evenness).clamp(0, 1)
    reasons = ["" if w > 0 else "all classes are alike" for w in weights.tolist()]
    return PseudoLabels(z.argmax(dim=1), weights, reasons)


@torch.no_grad()
def lame(
    features: Tensor, probabilities: Tensor, neighbours: int = 5, iterations: int = 100
) -> Tensor:
    r"""LAME: probabilities near the model's that agree among neighbours.

    The fixed point of
    :math:`z_{ik} \propto p_{ik} \exp\big(\sum_j w_{ij} z_{jk}\big)`, begun at p, with
    :math:`w_{ij} = 1` if j is among the k nearest of i, else 0. It minimises
    :math:`\sum_i KL(z_i \| p_i) - \sum_{ij} w_{ij} z_i^T z_j` step by step. Boudiaf et al. 2022,
    "Parameter-free online test-time adaptation", arXiv:2201.05718.

    Args:
        features: (N, D), compared by cosine.
        probabilities: (N, K), rows that sum to one.
        neighbours: k, at most N − 1 are used.
        iterations: Steps at most; it ends when no probability changes by more than 1e-6.

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
