"""Pseudo-labels of a few points in the plane."""

from __future__ import annotations

import math

import pytest
import torch

from lora_lightning.adaptation import pseudo_labels as pl
from lora_lightning.adaptation.label_propagation import reciprocal, vote
from lora_lightning.errors import ConfigError, DataError

# Two groups by direction; the third item of the first is predicted wrongly.
FEATURES = torch.tensor([[1.0, 0], [1, 0.1], [1, 0.2], [0, 1.0], [0.1, 1], [0.2, 1]])
P = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.45, 0.55], [0.1, 0.9], [0.2, 0.8], [0.3, 0.7]])
TRUTH = [0, 0, 0, 1, 1, 1]


def test_the_threshold_says_why():
    found = pl.threshold(P, 0.75)
    assert found.accepted.tolist() == [True, True, False, True, True, False]
    assert found.reasons[2] == "confidence 0.55 below 0.75"
    assert found.histogram(2).tolist() == [2, 2]


@pytest.mark.parametrize("per_class", [1, 0.25])
def test_each_class_gets_its_surest(per_class):
    found = pl.class_balanced(P, per_class)
    assert found.accepted.tolist() == [True, False, False, True, False, False]
    assert all(found.reasons[i] for i in (1, 2, 4, 5))


@pytest.mark.parametrize("method", [pl.centroid, lambda f, p: vote(f, p, 2)])
def test_neighbours_mend_the_wrong_one(method):
    assert method(FEATURES, P).labels.tolist() == TRUTH


def test_who_contradicts_the_neighbours_is_left_out():
    found = reciprocal(FEATURES, P, 2)
    assert found.accepted.tolist() == [True, True, False, True, True, True]
    assert found.reasons[2] == "0 of 2 neighbours agree, their vote is class 0"


METHODS = [pl.centroid, vote, reciprocal]


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_items_does_not_matter(method):
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert torch.equal(method(FEATURES, P).labels[order], method(FEATURES[order], P[order]).labels)


@pytest.mark.parametrize("method", METHODS)
def test_one_item_alone(method):
    found = method(FEATURES[:1], P[:1])
    assert found.labels.tolist() == [0]
    assert found.accepted.tolist() == [method is pl.centroid]


def test_classes_that_nobody_predicts_attract_nobody():
    p = torch.cat([P, torch.zeros(6, 3)], dim=1)
    assert pl.centroid(FEATURES, p).labels.tolist() == TRUTH


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pl.threshold(P, 2), ConfigError, "least must lie"),
        (lambda: pl.threshold(P * 2), DataError, "softmax"),
        (lambda: pl.centroid(FEATURES * math.nan, P), DataError, "NaN or infinity in 6 of 6"),
        (lambda: vote(FEATURES[:2], P), DataError, "items"),
        (lambda: vote(FEATURES, P, 0), ConfigError, "neighbours"),
        (lambda: pl.class_balanced(P, 1.5), ConfigError, "per_class"),
        (lambda: pl.threshold(P).histogram(1), ConfigError, "class 1"),
    ],
)
def test_mistakes_are_told(call, error, message):
    with pytest.raises(error, match=message):
        call()
