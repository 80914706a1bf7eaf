"""LAME, re-centring, label propagation and temperatures: on numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lora_lightning.adaptation.class_centroids import (
    complete,
    soft_centroids,
    trusted_centroids,
    unhelpful,
)
from lora_lightning.adaptation.closed_form import recentred
from lora_lightning.adaptation.label_propagation import lame, propagate
from lora_lightning.adaptation.target import Predicted
from lora_lightning.errors import ConfigError, DataError

# Two items that lie together, one of them wrong, and one alone.
FEATURES = torch.tensor([[1.0, 0.0], [1.0, 0.05], [0.0, 1.0], [0.05, 1.0]])
SAID = torch.tensor([[0.9, 0.1], [0.45, 0.55], [0.1, 0.9], [0.2, 0.8]])


def test_lame_is_a_fixed_point_and_corrects_the_odd_one():
    z = lame(FEATURES, SAID, neighbours=1)
    assert z.argmax(1).tolist() == [0, 0, 1, 1]
    near = torch.tensor([1, 0, 3, 2])
    torch.testing.assert_close(z, (SAID.log() + z[near]).softmax(1), atol=1e-5, rtol=0)
    assert torch.equal(lame(FEATURES[:1], SAID[:1]).argmax(1), SAID[:1].argmax(1))
    one = lame(FEATURES, SAID, neighbours=1, iterations=1)
    expected = torch.tensor([0.9 * math.exp(0.45), 0.1 * math.exp(0.55)])
    torch.testing.assert_close(one[0], expected / expected.sum())
    with pytest.raises(ConfigError, match="iterations"):
        lame(FEATURES, SAID, iterations=0)
    with pytest.raises(DataError, match="same items"):
        lame(FEATURES[:2], SAID)


def test_soft_centroids_are_their_equation_and_correct_the_odd_one():
    q = soft_centroids(FEATURES, SAID)
    assert q.argmax(1).tolist() == [0, 0, 1, 1]
    z = nn.functional.normalize(FEATURES - FEATURES.mean(0), dim=1)
    expected = SAID
    for _ in range(3):
        centres = nn.functional.normalize(expected.T @ z, dim=1)
        expected = SAID * (z @ centres.T / 0.1).exp()
        expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(q, expected)
    torch.testing.assert_close(soft_centroids(FEATURES[:1], SAID[:1]), SAID[:1])
    for wrong in ({"rounds": 0}, {"temperature": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            soft_centroids(FEATURES, SAID, **wrong)


def groups(shares, spread=0.3):
    """Groups around the axes, and predictions by their distances."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(torch.tensor(shares))
    x = torch.eye(4)[labels] + spread * torch.randn(len(labels), 4, generator=generator)
    return Predicted((3 * x).softmax(1), x)


def test_centroids_are_trusted_where_all_classes_are_there():
    full, lacking = groups([20] * 4), groups([40, 0, 0, 0])
    blind = Predicted(full.probabilities * 0 + 0.25, full.features)
    assert complete(full)
    assert not complete(lacking)
    assert not unhelpful(blind, full)
    assert unhelpful(full, full)
    for source, again, by in (
        (blind, full, "target statistics"),
        (full, full, "source statistics"),
        (full, None, "source statistics"),
        (lacking, None, "source"),
    ):
        found, told = trusted_centroids(source, again)
        assert told == by
        used = again if by == "target statistics" else source
        want = soft_centroids(used.features, used.probabilities)
        assert torch.equal(found, source.probabilities if by == "source" else want)


def test_features_are_moved_to_the_sources_mean():
    head = nn.Linear(2, 2)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2)), head.bias.zero_()
    found = recentred(FEATURES + 5, FEATURES.mean(0), head)
    torch.testing.assert_close(found, head(FEATURES).detach().softmax(1))
    with pytest.raises(ConfigError, match="one number for each of 2"):
        recentred(FEATURES, torch.zeros(3), head)
    with pytest.raises(DataError, match="not logits"):
        recentred(FEATURES, torch.zeros(2), lambda x: x.sum(1))


def test_propagation_solves_its_equation():
    found = propagate(FEATURES, SAID, neighbours=1, alpha=0.9)
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert (found.weights > 0).all()
    # Pairs with one edge each: S swaps the two, Z = (P + 0.9 P') / (1 − 0.81).
    z = (SAID[0] + 0.9 * SAID[1]) / 0.19
    share = z / z.sum()
    evenness = -(share * share.log()).sum() / math.log(2)
    assert found.weights[0].item() == pytest.approx(1 - evenness.item(), abs=1e-4)
    assert torch.equal(propagate(FEATURES, SAID, alpha=0.0).labels, SAID.argmax(1))


def test_propagation_of_one_and_of_items_that_nothing_resembles():
    one = propagate(FEATURES[:1], SAID[:1])
    assert (one.labels.tolist(), one.weights.tolist()) == ([0], [0.0])
    assert one.reasons[0]
    apart = propagate(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), SAID[:2])
    assert torch.equal(apart.labels, SAID[:2].argmax(1))
    even = propagate(FEATURES, torch.full((4, 2), 0.5))
    assert even.weights.max() < 1e-6
    with pytest.raises(ConfigError, match="alpha"):
        propagate(FEATURES, SAID, alpha=1.0)
