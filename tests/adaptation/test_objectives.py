"""Losses without labels, on numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lora_lightning import inject
from lora_lightning.adaptation import objectives as o
from lora_lightning.adaptation.loss import (
    Loss,
    consistency,
    pseudo_cross_entropy,
    pull_to_source,
    source_divergence,
)
from lora_lightning.adaptation.target import Predicted
from lora_lightning.errors import ConfigError
from lora_lightning.speech.ctc_objectives import (
    dust_distances,
    non_blank_rate,
    normalised_distance,
    suta,
)

SURE = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
EVEN = torch.zeros(2, 2)


def test_entropy_by_hand():
    assert o.entropy(EVEN).item() == pytest.approx(math.log(2))
    assert o.entropy(SURE).item() == pytest.approx(0, abs=1e-6)


def test_information_maximisation_by_hand():
    assert o.information_maximisation(SURE).item() == pytest.approx(0, abs=1e-6)
    # Sure of one class for all: no entropy, and KL((1, 0) || (1/2, 1/2)) = log 2.
    assert o.information_maximisation(SURE[:1]).item() == pytest.approx(math.log(2), abs=1e-5)
    assert o.information_maximisation(SURE[:1], diversity=0).item() == pytest.approx(0, abs=1e-6)
    prior = torch.tensor([0.8, 0.2])
    expected = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert o.information_maximisation(SURE, prior).item() == pytest.approx(expected, abs=1e-5)


def test_a_running_mean_has_the_gradient_of_the_batch():
    mean = o.RunningMarginal(2, momentum=0.9)
    mean.update(torch.tensor([1.0, 0.0]))
    p = torch.tensor([0.0, 1.0], requires_grad=True)
    found = mean.update(p)
    torch.testing.assert_close(found.detach(), torch.tensor([0.9, 0.1]))
    found[0].backward()
    assert p.grad.tolist() == [1.0, 0.0]
    mean.reset()
    assert mean.mean is None


def test_minimum_class_confusion_by_hand():
    # Undecided between both classes: each row of the confusion is (1/2, 1/2).
    assert o.minimum_class_confusion(EVEN).item() == pytest.approx(0.5)
    assert o.minimum_class_confusion(SURE).item() == pytest.approx(0, abs=1e-6)


def test_pseudo_cross_entropy_counts_weights_and_leaves_out():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], requires_grad=True)
    labels, weights = torch.tensor([0, 0]), torch.tensor([1.0, 3.0])
    expected = (math.log(2) + 3 * math.log(4 / 3)) / 4
    assert pseudo_cross_entropy(logits, labels, weights).item() == pytest.approx(expected)
    nothing = pseudo_cross_entropy(logits, torch.tensor([-1, -1]))
    nothing.backward()
    assert nothing.item() == 0
    assert float(logits.grad.abs().sum()) == 0


def test_consistency_looks_at_sure_items_only():
    weak = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    strong = torch.zeros(2, 2, requires_grad=True)
    assert consistency(weak, strong, least=0.7).item() == pytest.approx(math.log(2))
    assert consistency(weak, strong, least=0.9).item() == 0


LOSSES = [o.entropy, o.information_maximisation, o.minimum_class_confusion]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_right_and_finite(loss):
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, logits)
    extreme = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    value = loss(extreme)
    value.backward()
    assert value.isfinite()
    assert extreme.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: o.entropy(torch.zeros(3)), "expected logits"),
        (lambda: o.entropy(torch.zeros(3, 1)), "two classes"),
        (lambda: o.information_maximisation(EVEN, diversity=-1), "diversity"),
        (lambda: o.information_maximisation(EVEN, torch.ones(3) / 3), "each of 2 classes"),
        (lambda: o.information_maximisation(EVEN, torch.ones(2)), "sum to 1"),
        (lambda: o.minimum_class_confusion(EVEN, 0), "temperature"),
        (lambda: pseudo_cross_entropy(EVEN, torch.zeros(3, dtype=int)), "one label"),
        (lambda: consistency(EVEN, SURE[:1]), "two views"),
        (lambda: o.RunningMarginal(1), "two classes"),
        (lambda: dust_distances(["a"], [[]]), "one variant"),
    ],
)
def test_mistakes_are_told(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_frames_that_say_something():
    logits = torch.tensor([[[1.0, 0], [0, 1.0], [0, 1.0]], [[0, 1.0], [0, 1.0], [0, 1.0]]])
    # Two of three frames of the first, and one that is no padding of the second.
    assert non_blank_rate(logits, torch.tensor([3, 1])) == pytest.approx(3 / 4)


def test_edit_distance_by_hand():
    assert normalised_distance("kitten", "sitting") == pytest.approx(3 / 7)
    assert normalised_distance("", "") == 0
    assert normalised_distance("ab", "") == 1


def test_what_changes_under_dropout_is_in_doubt():
    assert dust_distances(["abcd", "abcd", ""], [["abcd"], ["abxx"], [""]]) == [0, 0.5, 0]


def test_neighbour_consistency_by_hand():
    near = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.0, 1.0]]])
    assert o.neighbour_consistency(SURE, near).item() == pytest.approx(-(1.5 + 2) / 2, abs=1e-5)
    weights = torch.tensor([[1.0, 0.1], [1.0, 0.1]])
    expected = -(1 + 0.05 + 1.1) / 2
    assert o.neighbour_consistency(SURE, near, weights).item() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ConfigError, match="neighbours' probabilities"):
        o.neighbour_consistency(SURE, near[:1])
    with pytest.raises(ConfigError, match="affinities"):
        o.neighbour_consistency(SURE, near, weights[:1])


def test_source_divergence_by_hand():
    source = torch.tensor([[0.75, 0.25], [1.0, 0.0]])
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5) + math.log(2)) / 2
    assert source_divergence(EVEN, source).item() == pytest.approx(expected)
    assert source_divergence(source.clamp_min(1e-9).log(), source).item() == pytest.approx(
        0, abs=1e-5
    )
    with pytest.raises(ConfigError, match="expected the source's"):
        source_divergence(EVEN, source[:1])


def test_the_pull_is_the_norm_of_what_the_adapter_adds():
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Conv1d(4, 3, 2))
    with pytest.raises(ConfigError, match="no live adapter"):
        pull_to_source(model)
    inject(model, rank=2, alpha=6.0, target_modules="all", trainable=[])
    assert pull_to_source(model).item() == 0
    base = [m.weight.detach().clone() for m in model]
    factors = [f for f in model.modules() if hasattr(f, "lora_B")]
    for f in factors:
        torch.nn.init.normal_(f.lora_B)
    with torch.no_grad():
        moved = sum(float(((m.weight - b) ** 2).sum()) for m, b in zip(model, base, strict=True))
    pull = pull_to_source(model)
    assert pull.item() == pytest.approx(moved, rel=1e-4)
    pull.backward()
    assert all(f.lora_B.grad.abs().sum() > 0 for f in factors)


def test_suta_by_hand():
    # Blank is class 0. Frames: blank; undecided between 1 and 2, both above the blank; padding.
    frames = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 5.0, 5.0], [7.0, 7.0, 7.0]]])
    lengths = torch.tensor([2])
    z = torch.tensor([0.0, 5.0, 5.0]) / 2.5
    p = z.softmax(0)
    sharp = float(-(p * p.log()).sum())
    confusion = o.minimum_class_confusion(frames[0, :2, 1:], 2.5).item()
    found = suta(frames, lengths, blank=0).item()
    assert found == pytest.approx(0.3 * sharp + 0.7 * confusion)
    silent = suta(frames[:, :1], torch.tensor([1]), blank=0, weight=1.0)
    assert silent.item() == 0
    with pytest.raises(ConfigError, match="weight must lie in"):
        suta(frames, lengths, weight=2.0)
    with pytest.raises(ConfigError, match="two classes beside"):
        suta(frames[:, :, :2], lengths)


@pytest.mark.parametrize("kind", ["function", "class"])
def test_an_objective_is_added_in_one_place(kind):
    name = f"mine, a {kind}"
    if kind == "function":
        o.OBJECTIVES.register(name)(lambda logits: 2 * o.entropy(logits))
    else:

        @o.OBJECTIVES.register(name)
        class Mine(o.Objective):
            def begin_round(self, now):
                self.weight = 2 * now.probabilities.sum(1)

            def __call__(self, logits, indices):
                return self.weight[indices].mean() * o.entropy(logits)

    logits, indices = torch.randn(4, 3), torch.arange(4)
    seen = Predicted(torch.full((4, 3), 1 / 3), torch.randn(4, 2))
    losses = [Loss(given, None, 1.0, 0.0, 0.0, 0.0, 8) for given in (name, name, o.entropy)]
    losses[0].begin(seen)
    losses[0].begin_round(seen)
    losses[1].load_state_dict(losses[0].state_dict())
    found = [loss(logits, indices, nn.Identity()) for loss in losses]
    torch.testing.assert_close(found[0], 2 * found[2])
    torch.testing.assert_close(found[1], found[0])
    with pytest.raises(ConfigError, match="objective must be one of"):
        Loss("yours", None, 1.0, 0.0, 0.0, 0.0, 8)
