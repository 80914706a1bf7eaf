"""Predictions that agree over the graph of nearest neighbours: votes, label propagation, LAME.

Legend of shapes: N items, K classes, D features, k neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lora_lightning.adaptation.neighbours import check_features, check_probabilities, nearest
from lora_lightning.adaptation.pseudo_labels import (
    PseudoLabels,
    centroid,
    class_balanced,
    threshold,
)
from lora_lightning.lora.values import check_count, check_number
from lora_lightning.registry import Registry

FAR = 0.1  # NRC's affinity of a neighbour that is not reciprocal
SHARPNESS = 3  # of the similarities, γ in the paper
TOLERANCE = 1e-6  # of the conjugate gradients, and of the change at which LAME stops


def vote(features: Tensor, probabilities: Tensor, neighbours: int = 5) -> PseudoLabels:
    r"""The class with the highest mean probability of the nearest items; that is the weight.

    .. math:: q_i = \frac1k \sum_{j \in N_k(i)} p_j, \qquad \hat y_i = \arg\max_k q_{ik}

    The item itself is not counted. N = 1 is left out with its own prediction. AdaContrast's
    refinement, Chen et al. 2022, arXiv:2204.10377.

    Args:
        features: (N, D), compared by cosine.
        probabilities: (N, K), rows that sum to one.
        neighbours: k, at most N − 1 are used.

    Raises:
        ConfigError: `neighbours` is no whole number, or below 1.
        DataError: features or probabilities are none, or not of the same items.
    """
    p, near = _near(features, probabilities, neighbours)
    if len(p) == 1:
        return _alone(p)
    weights, labels = p[near].mean(dim=1).max(dim=1)
    return PseudoLabels(labels, weights.clamp(0, 1), [""] * len(p))


def reciprocal(features: Tensor, probabilities: Tensor, neighbours: int = 5) -> PseudoLabels:
    r"""Accept the items whose own prediction is that of their neighbours, the mutual ones first.

    .. math:: q_i = \frac{\sum_{j \in N_k(i)} a_{ij} p_j}{\sum_{j \in N_k(i)} a_{ij}}, \qquad
              a_{ij} = 1 \text{ if } i \in N_k(j), \text{ else } 0.1

    The label is the vote's, :math:`\hat y_i = \arg\max_k q_{ik}`, the weight :math:`\max_k q_{ik}`.
    N = 1 is left out with its own prediction. After NRC, Yang et al. 2021, arXiv:2110.04202.

    Args:
        features, probabilities, neighbours: See `vote`.

    Raises:
        ConfigError: `neighbours` is no whole number, or below 1.
        DataError: features or probabilities are none, or not of the same items.
    """
    p, near = _near(features, probabilities, neighbours)
    if len(p) == 1:
        return _alone(p)
    own = torch.arange(len(p), device=near.device)
    mutual = (near[near] == own[:, None, None]).any(dim=2)
    affinity = torch.where(mutual, 1.0, FAR).to(p.dtype)
    votes = (affinity[:, :, None] * p[near]).sum(dim=1) / affinity.sum(dim=1, keepdim=True)
    share, labels = votes.max(dim=1)
    mine = p.argmax(dim=1)
    kept = labels == mine
    same = (mine[near] == mine[:, None]).sum(dim=1)
    reasons = [
        "" if ok else f"{agree} of {near.shape[1]} neighbours agree, their vote is class {label}"
        for ok, agree, label in zip(kept.tolist(), same.tolist(), labels.tolist(), strict=True)
    ]
    return PseudoLabels(labels, share.clamp(0, 1) * kept, reasons)


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
        features, probabilities, neighbours: See `vote`.
        alpha: α, in [0, 1): how far labels spread; 0 keeps the predictions.

    Raises:
        ConfigError: `alpha` or `neighbours` is out of range.
        DataError: features or probabilities are none, or not of the same items.
    """
    from scipy.sparse import coo_array, diags_array, eye_array
    from scipy.sparse.linalg import cg

    check_number("alpha", alpha, "[0, 1)")
    p = check_probabilities(probabilities)
    near, alike = nearest(check_features(features, len(p)), neighbours)
    if len(p) == 1:
        return _alone(p)
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
        features, probabilities, neighbours: See `vote`.
        iterations: Steps at most; it ends when no probability changes by more than 1e-6.

    Returns:
        (N, K), rows that sum to one. N = 1 keeps its prediction.

    Raises:
        ConfigError: `neighbours` or `iterations` is no whole number, or below 1.
        DataError: features or probabilities are none, or not of the same items.
    """
    check_count("iterations", iterations)
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


def _near(features: Tensor, probabilities: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Probabilities, and the indices (N, k) of each item's nearest."""
    check_count("neighbours", neighbours)
    p = check_probabilities(probabilities)
    return p, nearest(check_features(features, len(p)), neighbours)[0].to(p.device)


def _alone(p: Tensor) -> PseudoLabels:
    return PseudoLabels(p.argmax(dim=1), torch.zeros_like(p[:, 0]), ["no neighbour to ask"])


Labeller = Callable[[Tensor, Tensor], PseudoLabels]  # features, probabilities → labels
LABELLERS: Registry[Labeller] = Registry("labeller")


# With a name, so that processes which a Trainer spawns can be given them.
@LABELLERS.register("threshold")
def _threshold(features: Tensor, p: Tensor) -> PseudoLabels:
    return threshold(p)


@LABELLERS.register("class-balanced")
def _class_balanced(features: Tensor, p: Tensor) -> PseudoLabels:
    return class_balanced(p, 0.5)


for name, labeller in {
    "centroid": centroid,
    "vote": vote,
    "reciprocal": reciprocal,
    "propagation": propagate,
}.items():
    LABELLERS.register(name)(labeller)
