"""Distances between sets of features, against hand-worked numbers, SciPy and each other."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import linalg

from lora_lightning.adaptation.shift.distances import (
    Moments,
    bootstrap,
    coral_distance,
    frechet_distance,
    mmd,
    moments,
)
from lora_lightning.errors import DataError


def normal(n: int, d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mmd_by_hand():
    s, t = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]])
    # k(0, 2) = e^-2, k(1, 1) = 1, k(0, 1) = k(2, 1) = e^-0.5 with h = 1.
    assert mmd(s, t, bandwidth=1.0) == pytest.approx(math.exp(-2) + 1 - 2 * math.exp(-0.5))


def test_mmd_is_near_zero_for_one_set_and_grows_with_the_shift():
    a, b = normal(400), normal(400, seed=1)
    assert abs(mmd(a, b)) < 0.01
    found = [mmd(a, b + shift) for shift in (0.0, 0.5, 1.0, 2.0, 5.0)]
    assert found == sorted(found)
    assert mmd(a, b + 5) <= 2
    assert mmd(a, b + 1) == pytest.approx(mmd(b + 1, a))
    assert mmd(a + 100, b + 101) == pytest.approx(mmd(a, b + 1))


def test_mmd_of_sets_that_are_all_alike():
    ones = torch.ones(5, 3)
    assert mmd(ones, ones) == 0
    mostly = torch.cat([torch.ones(20, 3), torch.zeros(1, 3)])
    assert math.isfinite(mmd(mostly, ones))


def test_coral_by_hand():
    s = Moments(9, torch.zeros(2), torch.eye(2))
    t = Moments(9, torch.ones(2), torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    assert coral_distance(s, t) == pytest.approx((4 + 1 + 1 + 0) / 16)
    a = normal(50)
    assert coral_distance(a, a + 7) == pytest.approx(0, abs=1e-12)  # blind to the mean


def test_frechet_by_hand_and_against_scipy():
    s = Moments(9, torch.zeros(2), torch.diag(torch.tensor([4.0, 1.0])))
    t = Moments(9, torch.tensor([3.0, 4.0]), torch.diag(torch.tensor([1.0, 9.0])))
    # 25 + (2 - 1)² + (1 - 3)²
    assert frechet_distance(s, t) == pytest.approx(30)
    a, b = moments(normal(60) @ normal(4, 4, 2)), moments(normal(70, seed=3) + 0.3)
    root = linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    want = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace()
    assert frechet_distance(a, b) == pytest.approx(float(want) - 2 * root.trace())
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(normal(3, 8), normal(3, 8)) == pytest.approx(0, abs=1e-6)  # singular


def test_moments_stand_for_the_items():
    a, b = normal(30), normal(40, seed=1) * 2
    assert frechet_distance(moments(a), b) == frechet_distance(a, b)
    found = moments(a.float())
    assert (found.items, found.mean.dtype, found.covariance.shape) == (30, torch.float64, (4, 4))
    assert moments(normal(5, 1)).covariance.shape == (1, 1)


def test_the_interval_holds_the_distance_and_narrows_with_more_items():
    few = bootstrap(coral_distance, normal(20), normal(20, seed=1) * 2)
    many = bootstrap(coral_distance, normal(500), normal(500, seed=1) * 2)
    for found in (few, many):
        assert found.low < found.value < found.high
    assert many.high - many.low < few.high - few.low
    again = bootstrap(coral_distance, normal(20), normal(20, seed=1) * 2)
    assert again == few


def test_many_items_are_drawn_from(monkeypatch):
    monkeypatch.setattr("lora_lightning.adaptation.shift.distances.MOST", 300)
    a, b = normal(2000), normal(2000, seed=1) + 1
    small = mmd(a, b)
    monkeypatch.setattr("lora_lightning.adaptation.shift.distances.MOST", 2000)
    assert small == pytest.approx(mmd(a, b), rel=0.2)


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), r"\(1, 3\)"),
        (torch.zeros(5), torch.zeros(5, 3), r"\(5,\)"),
        (torch.zeros(5, 3), torch.zeros(5, 2), "3 features and target 2"),
        (torch.full((5, 3), float("nan")), torch.zeros(5, 3), "items"),
    ],
)
@pytest.mark.parametrize("distance", [mmd, coral_distance, frechet_distance])
def test_bad_input_says_what_is_wrong(distance, source, target, said):
    with pytest.raises(DataError, match=said):
        distance(source, target)


def test_bad_settings():
    with pytest.raises(ValueError, match="bandwidth"):
        mmd(normal(5), normal(5), bandwidth=0)
    with pytest.raises(ValueError, match="repeats"):
        bootstrap(mmd, normal(5), normal(5), repeats=1)
