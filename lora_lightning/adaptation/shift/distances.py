"""Distances between two sets of features: MMD, CORAL, Fréchet.

Legend of shapes: N source items, M target items, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lora_lightning.errors import DataError
from lora_lightning.linalg.torch_settings import shuffled
from lora_lightning.lora.values import check_count, check_number, finite

Distance = Callable[[Tensor, Tensor], float]
MOST = 2000  # items of a set for distances between all pairs; drawn at random from more


class Moments(NamedTuple):
    """Summary of a set of features, for distances that need no items."""

    items: int  # N
    mean: Tensor  # (D,), float64
    covariance: Tensor  # (D, D), of the sample, float64


@torch.no_grad()
def moments(features: Tensor) -> Moments:
    """Mean and covariance of features (N, D).

    Raises:
        DataError: fewer than two items, another shape, or NaN.
    """
    x = _checked(features, "features")
    return Moments(len(x), x.mean(dim=0), torch.cov(x.T).reshape(x.shape[1], -1))


@torch.no_grad()
def mmd(source: Tensor, target: Tensor, bandwidth: float | None = None) -> float:
    r"""Squared maximum mean discrepancy with a Gaussian kernel, unbiased; 0 for one distribution.

    .. math:: \overline{k(s, s')}_{s \ne s'} + \overline{k(t, t')}_{t \ne t'}
        - 2\,\overline{k(s, t)}, \qquad k(a, b) = \exp\left(-\frac{\|a - b\|^2}{2 h^2}\right)

    At most 2. It may be a little below 0, being unbiased. Gretton et al. 2012, "A kernel two-sample
    test", JMLR 13 (lemma 6).

    Args:
        source: (N, D).
        target: (M, D).
        bandwidth: h; None: the median distance between items of both sets together.

    Raises:
        DataError: fewer than two items, shapes that do not fit, or NaN.
        ConfigError: a bandwidth that is not above 0.
    """
    s, t = _pair(source, target)
    both = torch.cat([s, t])
    squares = torch.cdist(both, both).square()
    if bandwidth is None:
        pairs = squares[tuple(torch.triu_indices(len(both), len(both), 1, device="cpu"))]
        h2 = float(pairs.median())
        if h2 == 0:  # more than half of the pairs are equal
            h2 = float(pairs.mean())
        if h2 == 0:
            return 0.0
    else:
        check_number("bandwidth", bandwidth, "(0, inf)")
        h2 = bandwidth**2
    k = torch.exp(-squares / (2 * h2))
    n, m = len(s), len(t)
    within_s = (k[:n, :n].sum() - n) / (n * (n - 1))
    within_t = (k[n:, n:].sum() - m) / (m * (m - 1))
    return float(within_s + within_t - 2 * k[:n, n:].mean())


@torch.no_grad()
def coral_distance(source: Tensor | Moments, target: Tensor | Moments) -> float:
    r"""Distance of covariances, :math:`\|C_s - C_t\|_F^2 / 4D^2`.

    Invariant to a shift of the mean. Sun & Saenko 2016, "Deep CORAL", arXiv:1607.01719.

    Raises:
        DataError: see `moments`, or other features.
    """
    s, t = _moments_of(source, target)
    d = len(s.mean)
    return float((s.covariance - t.covariance).square().sum()) / (4 * d * d)


@torch.no_grad()
def frechet_distance(source: Tensor | Moments, target: Tensor | Moments) -> float:
    r"""Squared distance of the two normal distributions with these means and covariances.

    .. math:: \|\mu_s - \mu_t\|^2 + tr\left(C_s + C_t - 2\,(C_s C_t)^{1/2}\right)

    In squared units of the features; biased upwards with few items. Dowson & Landau 1982, J.
    Multivariate Analysis 12; for networks' features Heusel et al. 2017, arXiv:1706.08500.

    Raises:
        DataError: see `moments`, or other features.
    """
    s, t = _moments_of(source, target)
    root = _root(s.covariance)
    # (C_s C_t)^½ has the same trace as (C_s^½ C_t C_s^½)^½, which is symmetric.
    crossed = torch.linalg.eigvalsh(root @ t.covariance @ root).clamp_min(0).sqrt().sum()
    apart = (s.mean - t.mean).square().sum()
    total = apart + s.covariance.trace() + t.covariance.trace() - 2 * crossed
    return max(0.0, float(total))


class Interval(NamedTuple):
    """A distance with its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap(
    distance: Distance,
    source: Tensor,
    target: Tensor,
    *,
    unbiased: bool = False,
    repeats: int = 100,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    r"""A distance with its bootstrap interval: items of both sets are resampled with replacement.

    Distances are biased upwards with few items; resampling adds the same bias once more, which
    measures it. With :math:`\hat d` of the items and :math:`d^*` of the draws the value is
    :math:`2\hat d - \overline{d^*}`, the interval :math:`2\hat d` minus the draws' quantiles,
    each at least 0. Efron & Tibshirani 1993, chapter 10; Davison & Hinkley 1997, chapter 5.

    Args:
        distance: From (N, D) and (M, D) to a number.
        source: (N, D).
        target: (M, D).
        unbiased: The distance is unbiased, as `mmd` is: its value is not corrected, and the
            interval lies around it.
        repeats: Number of resamples, at least 2.
        confidence: Of the interval, in (0, 1).
        seed: Of the resampling.

    Raises:
        DataError: see `moments`.
        ConfigError: `repeats` or `confidence` is out of range.
    """
    check_count("repeats", repeats, 2)
    check_number("confidence", confidence, "(0, 1)")
    s, t = _pair(source, target)
    generator = torch.Generator().manual_seed(seed)

    def drawn(x: Tensor) -> Tensor:
        return x[torch.randint(len(x), (len(x),), generator=generator, device="cpu").to(x.device)]

    found = torch.tensor([distance(drawn(s), drawn(t)) for _ in range(repeats)], device="cpu")
    off = found.double() - found.double().mean()
    value = distance(s, t)
    value -= 0.0 if unbiased else float(found.double().mean()) - value
    tail = (1 - confidence) / 2
    low, high = off.quantile(off.new_tensor([tail, 1 - tail])).tolist()
    return Interval(*(max(0.0, x) for x in (value, value - high, value - low)))


def _checked(features: Tensor, name: str) -> Tensor:
    if features.ndim != 2 or len(features) < 2 or features.shape[1] < 1:
        raise DataError(
            f"{name} must be (items, features) with two items or more; got {tuple(features.shape)}"
        )
    if not finite(features):
        bad = (~torch.isfinite(features).all(dim=1)).nonzero().flatten()[:5].tolist()
        raise DataError(f"{name} holds NaN or infinity, such as in items {bad}")
    return features.detach().double()


def _pair(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    s, t = _checked(source, "source features"), _checked(target, "target features")
    if s.shape[1] != t.shape[1]:
        raise DataError(f"source has {s.shape[1]} features and target {t.shape[1]}")
    return _few(s), _few(t.to(s.device))


def _few(x: Tensor) -> Tensor:
    if len(x) <= MOST:
        return x
    chosen = shuffled(len(x))[:MOST]
    return x[chosen.to(x.device)]


def _moments_of(source: Tensor | Moments, target: Tensor | Moments) -> tuple[Moments, Moments]:
    s, t = (x if isinstance(x, Moments) else moments(x) for x in (source, target))
    if len(s.mean) != len(t.mean):
        raise DataError(f"source has {len(s.mean)} features and target {len(t.mean)}")
    return s, t


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root
