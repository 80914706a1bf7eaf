"""Nearest neighbours by cosine similarity, and checks of features, probabilities, logits.

Legend of shapes: N items, K classes, D features, k neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.lora.values import check_count

CHUNK = 1024  # rows compared at once: memory is CHUNK × N
SUM_TOLERANCE = 1e-3


@torch.no_grad()
def nearest(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    r"""The items most similar to each item, itself left out, the most similar first.

    .. math:: s_{ij} = \frac{f_i^T f_j}{\|f_i\| \|f_j\|}, \qquad j \ne i

    An item whose features are all zero has the similarity 0 to all. N = 1 gives empty rows. Which
    of several equally similar items come first is up to ``torch.topk``, the same in each call.

    Args:
        features: (N, D) floating point; half precision is compared in float32.
        count: Neighbours of each item, at least 1; no more than N − 1 are given.

    Returns:
        indices (N, k) int64 and similarities (N, k) with k = min(count, N − 1).

    Raises:
        ConfigError: `count` is no whole number, or below 1.
        DataError: the features are not (N, D), there are none, or they hold NaN or infinity.
    """
    check_count("count", count)
    found = check_features(features)
    unit = unit_rows(found)
    n = len(unit)
    k = min(count, n - 1)
    indices = torch.empty(n, k, dtype=torch.int64, device=unit.device)
    similarities = torch.empty(n, k, dtype=unit.dtype, device=unit.device)
    for start in range(0, n, CHUNK):
        rows = slice(start, min(start + CHUNK, n))
        near = unit[rows] @ unit.T
        own = torch.arange(len(near), device=unit.device)
        # Not "all but the first": of two equal items either may come first.
        near[own, own + start] = -torch.inf
        similarities[rows], indices[rows] = near.topk(k, dim=1)
    return indices, similarities.clamp(-1.0, 1.0)


def unit_rows(features: Tensor) -> Tensor:
    """Rows of length one; rows of zeros stay."""
    # By the largest entry first: squares of very large or small features leave the range.
    largest = features.abs().amax(dim=1, keepdim=True)
    scaled = features / torch.where(largest > 0, largest, 1.0)
    return torch.nn.functional.normalize(scaled, dim=1)


def check_features(features: Tensor, items: int | None = None, name: str = "features") -> Tensor:
    """(N, D) detached, in float32 or float64.

    Raises:
        DataError: they are not (N, D), none, not of `items` items, or hold NaN or infinity.
    """
    found = _check_rows(features, name, "features")
    if items is not None and len(found) != items:
        raise DataError(
            f"{name} are of {len(found)} items and the probabilities of {items}: give both of the "
            "same items, in the same order"
        )
    return found


def check_probabilities(probabilities: Tensor, name: str = "probabilities") -> Tensor:
    """(N, K) detached, in float32 or float64.

    Raises:
        DataError: they are not (N, K), none, hold NaN or infinity, or rows do not sum to one.
    """
    found = _check_rows(probabilities, name, "classes")
    wrong = (found.sum(dim=1) - 1).abs() > SUM_TOLERANCE
    wrong |= (found < -1e-6).any(dim=1)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise DataError(
            f"{name} must be rows of numbers from 0 on that sum to one; row {row} has the "
            f"sum {float(found[row].sum()):.4g} and the smallest {float(found[row].min()):.4g}: "
            "take the softmax of logits first"
        )
    return found.clamp(0.0, 1.0)


def check_logits(logits: Tensor) -> Tensor:
    """(B, K) in float32 or float64.

    Raises:
        ConfigError: they are not (B, K), none, or of a single class.
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or not len(logits):
        raise ConfigError(
            f"expected logits (items, classes) of two classes or more, got {tuple(logits.shape)}"
        )
    return logits if logits.dtype == torch.float64 else logits.float()


def _check_rows(values: Tensor, name: str, columns: str) -> Tensor:
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 1:
        raise DataError(
            f"{name} must be (items, {columns}) with one of each at least, got the shape "
            f"{tuple(values.shape)}"
        )
    if not values.is_floating_point():
        raise DataError(f"{name} must be floating point, got {values.dtype}: call .float() first")
    found = values.detach()
    if found.dtype in (torch.float16, torch.bfloat16):
        found = found.float()
    bad = ~torch.isfinite(found).all(dim=1)
    if bool(bad.any()):
        raise DataError(
            f"{name} hold NaN or infinity in {int(bad.sum())} of {len(found)} rows, row "
            f"{int(bad.int().argmax())} first: look at those items, or at the model's weights"
        )
    return found
