"""Closed-form domain alignment (CORAL, subspaces), with classifiers and regressors on top.

Nothing is trained, no weight changes: the baselines that every adapter has to beat. Legend of
shapes: N labelled source items, M target items, D features, K classes, V values, d dimensions of
a subspace.

`nearest_centroid`, `subspace_alignment`, `nmf_subspace` and `coral` give the nearest class mean.
`regressed` gives values, after any of the alignments `ALIGNMENTS`; `recentred` corrects the head's
predictions.

Each method standardises each domain by its own means and deviations first, so that a mere shift
and scale of every feature is gone before it begins.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_lightning.adaptation.neighbours import check_features
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.lora.values import check_number, finite
from lora_lightning.registry import Registry

Matrix = NDArray[np.float64]
Pair = tuple[Matrix, Matrix]  # source (N, ·) and target (M, ·) in one space
Alignment = Callable[[Tensor, Tensor], Pair]  # source (N, D), target (M, D)
# Maps both domains into one space, in which a classifier or regressor is fitted.
ALIGNMENTS: Registry[Alignment] = Registry("alignment")
ENERGY = 0.9  # part of the source's variance that a subspace holds
PARTS = 32  # dimensions of the NMF subspace at most


def nearest_centroid(source: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """The class whose mean source feature is nearest: (M, K) probabilities.

    Args:
        source: (N, D).
        labels: (N,), whole numbers 0 to K − 1, each class at least once.
        target: (M, D).

    Raises:
        DataError: features or labels of a wrong shape, empty, or not of the same items.
    """
    return _classified(source, labels, target, _standardised_each)


def subspace_alignment(
    source: Tensor, labels: Tensor, target: Tensor, energy: float = ENERGY
) -> Tensor:
    r"""The source's principal subspace turned onto the target's; then the nearest centroid.

    With bases :math:`X_S, X_T` (D, d) of the principal components: source items become
    :math:`S X_S (X_S^T X_T)` and target items :math:`T X_T`. Fernando et al. 2013, "Unsupervised
    visual domain adaptation using subspace alignment".

    Args:
        source, labels, target: See `nearest_centroid`.
        energy: d is the least that holds this part of the source's variance, in (0, 1).

    Raises:
        ConfigError: `energy` is out of range.
        DataError: see `nearest_centroid`.
    """
    check_number("energy", energy, "(0, 1)")
    return _classified(source, labels, target, partial(_subspaces, energy=energy))


def nmf_subspace(
    source: Tensor, labels: Tensor, target: Tensor, parts: int = PARTS, seed: int = 0
) -> Tensor:
    """`subspace_alignment` with the parts of a non-negative factorisation in place of components.

    Features after a ReLU are sums of parts; signed features take the parts of a semi-NMF. The
    bases are the orthonormalised parts (D, d). After Lee & Seung 1999; Ding et al. 2010.

    Args:
        source, labels, target: See `nearest_centroid`.
        parts: d at most.
        seed: Of the factorisations' starts.

    Raises:
        DataError: see `nearest_centroid`.
        DecompositionError: `parts` is below 1.
    """
    return _classified(source, labels, target, partial(_nmf_subspaces, parts=parts, seed=seed))


def coral(source: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    r"""The source's features given the target's covariance; then the nearest centroid.

    :math:`S\,C_S^{-1/2} C_T^{1/2}` with :math:`C = cov + I`. Sun, Feng & Saenko 2016, "Return of
    frustratingly easy domain adaptation", arXiv:1511.05547.

    Args:
        source, labels, target: See `nearest_centroid`.

    Raises:
        DataError: see `nearest_centroid`.
    """
    return _classified(source, labels, target, _coloured)


def regressed(source: Tensor, values: Tensor, target: Tensor, alignment: str = "none") -> Tensor:
    r"""Values of the target items by ridge regression in the aligned space: (M, V).

    :math:`\min_W \|S' W - Y\|_F^2 + \lambda \|W\|_F^2` on the aligned, standardised source
    :math:`S'`, with the λ of the least leave-one-out error in 10⁻² to 10⁵. Hoerl & Kennard 1970,
    "Ridge regression".

    Args:
        source: (N, D).
        values: (N, V), what is known of the source items.
        target: (M, D).
        alignment: One of `ALIGNMENTS`.

    Raises:
        ConfigError: there is no such alignment.
        DataError: features or values of a wrong shape, empty, or not of the same items.
    """
    from sklearn.linear_model import RidgeCV

    if alignment not in ALIGNMENTS:
        raise ConfigError(f"alignment must be one of {', '.join(ALIGNMENTS)}; got {alignment!r}")
    _check(source, values, target)
    if values.ndim != 2 or not finite(values):
        raise DataError(f"values must be finite numbers (N, V), got {tuple(values.shape)}")
    s, t = ALIGNMENTS.get(alignment)(source, target)
    model: Any = RidgeCV(np.logspace(-2, 5, 15)).fit(s, values.double().numpy())
    return torch.from_numpy(model.predict(t)).float().reshape(len(t), -1)


@ALIGNMENTS.register("none")
def _standardised_each(source: Tensor, target: Tensor) -> Pair:
    return _standardised(source), _standardised(target)


@ALIGNMENTS.register("subspace")
def _subspaces(source: Tensor, target: Tensor, energy: float = ENERGY) -> Pair:
    from sklearn.decomposition import PCA

    s, t = _standardised_each(source, target)
    of_source = PCA(energy).fit(s).components_.T
    of_target = PCA(min(of_source.shape[1], *t.shape)).fit(t).components_.T
    return s @ of_source @ (of_source.T @ of_target), t @ of_target


@ALIGNMENTS.register("nmf")
def _nmf_subspaces(source: Tensor, target: Tensor, parts: int = PARTS, seed: int = 0) -> Pair:
    from lora_lightning.linalg.nonnegative import nmf, semi_nmf

    found = []
    signed = bool((source < 0).any() or (target < 0).any())
    d = min(parts, source.shape[1], len(source), len(target))
    for x in (source, target):
        # Scaled, not centred: parts begin at zero.
        scaled = x.double() / x.double().std(dim=0).clamp_min(1e-8)
        basis = (semi_nmf if signed else nmf)(scaled, d, seed=seed).H.T
        found.append(torch.linalg.qr(basis.double()).Q.numpy())
    s, t = _standardised_each(source, target)
    of_source, of_target = found
    return s @ of_source @ (of_source.T @ of_target), t @ of_target


@ALIGNMENTS.register("coral")
def _coloured(source: Tensor, target: Tensor) -> Pair:
    s, t = _standardised_each(source, target)
    return s @ _power(s, -0.5) @ _power(t, 0.5), t


def _power(x: Matrix, exponent: float) -> Matrix:
    values, vectors = np.linalg.eigh(np.cov(x.T) + np.eye(x.shape[1]))
    return np.asarray((vectors * values**exponent) @ vectors.T)


def _check(source: Tensor, known: Tensor, target: Tensor) -> None:
    check_features(source)
    check_features(target)
    if source.shape[1] != target.shape[1] or len(known) != len(source):
        raise DataError(
            f"source {tuple(source.shape)}, labels {tuple(known.shape)} and target "
            f"{tuple(target.shape)} do not fit: expected (N, D), (N,) and (M, D)"
        )
    if len(source) < 2 or len(target) < 2:
        raise DataError("alignment needs two items of each domain at least")


def _classified(source: Tensor, labels: Tensor, target: Tensor, align: Alignment) -> Tensor:
    from sklearn.neighbors import NearestCentroid

    _check(source, labels, target)
    classes = torch.unique(labels)
    if labels.ndim != 1 or len(classes) < 2:
        raise DataError(f"alignment needs labels (N,) of two classes, got {tuple(labels.shape)}")
    s, t = align(source, target)
    said: Any = NearestCentroid().fit(s, labels.numpy()).predict_proba(t)
    full = torch.zeros(len(t), int(classes.max()) + 1, device="cpu")
    full[:, classes] = torch.from_numpy(said).float()
    return full


def _standardised(x: Tensor) -> Matrix:
    from sklearn.preprocessing import StandardScaler

    return np.asarray(StandardScaler().fit_transform(x.double().numpy()))


@torch.no_grad()
def recentred(features: Tensor, source_mean: Tensor, head: nn.Module) -> Tensor:
    r"""The head's predictions for features shifted to the source's mean.

    :math:`p_i = softmax(h(f_i - \bar f + \bar f_s))`: the difference of the means is taken for the
    domain shift. It is wrong where the classes' shares change. The first moment of CORAL, Sun et
    al. 2016, arXiv:1511.05547.

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
