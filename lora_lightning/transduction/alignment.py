"""Alignment of two domains' features in closed form, and the nearest class mean after it.

Nothing is trained, no weight changes: the baselines that every adapter has to beat. Legend of
shapes: N labelled source items, M target items, D features, K classes, d dimensions of a subspace.

Each method standardises each domain by its own means and deviations first, so that a mere shift
and scale of every feature is gone before it begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.transduction.neighbours import check_features

Matrix = NDArray[np.float64]
Pair = tuple[Matrix, Matrix]  # source (N, ·) and target (M, ·) in one space
ENERGY = 0.9  # part of the source's variance that a subspace holds
PARTS = 32  # dimensions of the NMF subspace at most


def nearest_centroid(source: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """The class whose mean source feature is nearest: (M, K) probabilities.

    Args:
        source: (N, D).
        labels: (N,), whole numbers 0 to K − 1, each class at least once.
        target: (M, D).

    Raises:
        DataError: features or labels are none, or do not fit together.
    """
    return _classified(source, labels, target, lambda s, t: (s, t))


def subspace_alignment(
    source: Tensor, labels: Tensor, target: Tensor, energy: float = ENERGY
) -> Tensor:
    r"""The source's principal subspace turned onto the target's; then the nearest centroid.

    With bases :math:`X_S, X_T` (D, d) of the principal components: source items become
    :math:`S X_S (X_S^T X_T)` and target items :math:`T X_T`. Fernando et al. 2013, "Unsupervised
    visual domain adaptation using subspace alignment".

    Args:
        source: (N, D).
        labels: (N,).
        target: (M, D).
        energy: d is the least that holds this part of the source's variance, in (0, 1).

    Raises:
        ConfigError: `energy` is out of range.
        DataError: see `nearest_centroid`.
    """
    from sklearn.decomposition import PCA

    if not 0 < energy < 1:
        raise ConfigError(f"energy is a part of the whole, in (0, 1); got {energy}")

    def align(s: Matrix, t: Matrix) -> Pair:
        of_source = PCA(energy).fit(s).components_.T
        of_target = PCA(min(of_source.shape[1], *t.shape)).fit(t).components_.T
        return s @ of_source @ (of_source.T @ of_target), t @ of_target

    return _classified(source, labels, target, align)


def nmf_subspace(
    source: Tensor, labels: Tensor, target: Tensor, parts: int = PARTS, seed: int = 0
) -> Tensor:
    """`subspace_alignment` with the parts of a non-negative factorisation in place of components.

    Features after a ReLU are sums of parts; signed features take the parts of a semi-NMF. The
    bases are the orthonormalised parts (D, d). After Lee & Seung 1999; Ding et al. 2010.

    Args:
        source: (N, D).
        labels: (N,).
        target: (M, D).
        parts: d at most.
        seed: Of the factorisations' starts.

    Raises:
        DataError: see `nearest_centroid`.
        DecompositionError: `parts` is below 1.
    """
    from lora_lightning.nmf import nmf, semi_nmf

    found = []
    signed = bool((source < 0).any() or (target < 0).any())
    d = min(parts, source.shape[1], len(source), len(target))
    for x in (source, target):
        # Scaled, not centred: parts begin at zero.
        scaled = x.double() / x.double().std(dim=0).clamp_min(1e-8)
        basis = (semi_nmf if signed else nmf)(scaled, d, seed=seed).H.T
        found.append(torch.linalg.qr(basis.double()).Q.numpy())

    def align(s: Matrix, t: Matrix) -> Pair:
        of_source, of_target = found
        return s @ of_source @ (of_source.T @ of_target), t @ of_target

    return _classified(source, labels, target, align)


def coral(source: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    r"""The source's features given the target's covariance; then the nearest centroid.

    :math:`S\,C_S^{-1/2} C_T^{1/2}` with :math:`C = cov + I`. Sun, Feng & Saenko 2016, "Return of
    frustratingly easy domain adaptation", arXiv:1511.05547.

    Args:
        source: (N, D).
        labels: (N,).
        target: (M, D).

    Raises:
        DataError: see `nearest_centroid`.
    """

    def align(s: Matrix, t: Matrix) -> Pair:
        return s @ _power(s, -0.5) @ _power(t, 0.5), t

    return _classified(source, labels, target, align)


def _power(x: Matrix, exponent: float) -> Matrix:
    values, vectors = np.linalg.eigh(np.cov(x.T) + np.eye(x.shape[1]))
    return np.asarray((vectors * values**exponent) @ vectors.T)


def _classified(
    source: Tensor, labels: Tensor, target: Tensor, align: Callable[[Matrix, Matrix], Pair]
) -> Tensor:
    from sklearn.neighbors import NearestCentroid

    check_features(source)
    check_features(target)
    if source.shape[1] != target.shape[1] or labels.shape != source.shape[:1]:
        raise DataError(
            f"source {tuple(source.shape)}, labels {tuple(labels.shape)} and target "
            f"{tuple(target.shape)} do not fit: expected (N, D), (N,) and (M, D)"
        )
    classes = torch.unique(labels)
    if len(source) < 2 or len(target) < 2 or len(classes) < 2:
        raise DataError("alignment needs two classes, and two items of each domain at least")
    s, t = align(_standardised(source), _standardised(target))
    said: Any = NearestCentroid().fit(s, labels.numpy()).predict_proba(t)
    full = torch.zeros(len(t), int(classes.max()) + 1)
    full[:, classes] = torch.from_numpy(said).float()
    return full


def _standardised(x: Tensor) -> Matrix:
    from sklearn.preprocessing import StandardScaler

    return np.asarray(StandardScaler().fit_transform(x.double().numpy()))
