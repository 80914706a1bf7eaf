"""Label-free scores, the alarms, and the choice among candidates."""

from __future__ import annotations

import math

import pytest
import torch

from lora_lightning.adaptation import validators as v
from lora_lightning.adaptation.guard import Guard, Limits
from lora_lightning.adaptation.selection import Candidate, select
from lora_lightning.errors import ConfigError, DataError


def said(labels, sure=0.7, classes=4):
    """Probabilities: `sure` for these labels, the rest shared."""
    p = torch.full((len(labels), classes), (1 - sure) / (classes - 1))
    p[torch.arange(len(labels)), torch.tensor(labels)] = sure
    return p


SOURCE = said([0, 1, 2, 3] * 10)


def test_scores_by_hand():
    identity = torch.eye(4)
    assert v.nuclear_norm(identity) == pytest.approx(1)
    assert v.nuclear_norm(identity[[0, 0, 0, 0]]) == pytest.approx(0.5)  # 2 / sqrt(4 · 4)
    assert v.mean_entropy(torch.full((3, 4), 0.25)) == pytest.approx(math.log(4))
    assert v.information(identity) == pytest.approx(1)
    assert v.information(torch.full((3, 4), 0.25)) == pytest.approx(0, abs=1e-12)
    assert v.agreement(identity, identity[[0, 1, 3, 2]]) == 0.5
    assert v.expected_accuracy(identity, [identity[[0, 1, 3, 2]]]) == pytest.approx(0.5)
    assert v.expected_accuracy(identity[[0, 0]], [identity[[0, 0]]]) == 0  # one class only


def test_cohesion_by_hand():
    labels, near = torch.tensor([0, 0, 1, 1]), torch.tensor([[1], [0], [3], [2]])
    assert v.cohesion(labels, near, 2) == pytest.approx(1)
    assert v.cohesion(labels, torch.tensor([[2], [3], [0], [1]]), 2) == pytest.approx(-1)
    assert v.cohesion(labels * 0, near, 2) == 0


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        (torch.zeros(0, 4), "must be"),
        (torch.ones(3, 1), "two classes"),
        (torch.full((2, 2), math.nan), "NaN or infinity in 2 of 2"),
        (torch.randn(2, 2), "sum to one"),
    ],
)
def test_what_is_no_prediction_is_told(probabilities, message):
    with pytest.raises(DataError, match=message):
        v.nuclear_norm(probabilities)


def test_what_sharpens_and_mends_a_few_is_accepted():
    better = said([0, 1, 2, 3] * 8 + [0, 1, 2, 2] * 2, sure=0.95)
    assert Guard(SOURCE).check(better).accepted


@pytest.mark.parametrize(
    ("probabilities", "alarm"),
    [
        (said([0] * 40, sure=0.97), "collapse"),
        (said([0, 1, 2, 3, 0] * 8), "keep the source's label"),
        (said([1, 0, 3, 2] * 10), "keep the source's label, below 42%"),
        (torch.full((40, 4), math.nan), "NaN"),
    ],
)
def test_alarms(probabilities, alarm):
    found = Guard(SOURCE).check(probabilities)
    assert not found.accepted
    assert any(alarm in text for text in found.alarms)


def test_a_class_that_swells_is_an_alarm():
    source = said([0] * 4 + [1] * 12 + [2] * 12 + [3] * 12, sure=0.3)
    now = said([0] * 31 + [1] * 3 + [2] * 3 + [3] * 3, sure=0.9)
    assert any("times as often" in x for x in Guard(source).check(now).alarms)


def test_neighbours_that_part_are_an_alarm():
    near = torch.arange(40).roll(4)[:, None]  # one of the same class
    mixed = torch.arange(4).repeat(10)
    mixed[::3] = mixed[::3].roll(1)
    found = Guard(SOURCE, near, Limits(agreement=0)).check(said(mixed.tolist()))
    assert any("neighbours agree too little" in x for x in found.alarms)


def test_limits_are_checked():
    with pytest.raises(ConfigError, match="agreement must lie"):
        Limits(agreement=2)
    with pytest.raises(ConfigError, match="class_share"):
        Limits(class_share=0.5)


def test_the_choice_never_takes_a_collapsed_candidate():
    collapsed, good, weak = said([0] * 40, 1.0), said([0, 1, 2, 3] * 10, 0.9), SOURCE
    names = {"collapsed": collapsed, "good": good, "weak": weak}
    found = select([Candidate(n, p) for n, p in names.items()], SOURCE)
    assert found.name == "good"
    assert list(found.rejected) == ["collapsed"]
    assert select([Candidate("collapsed", collapsed)], SOURCE).name == "source"


def test_the_majority_decides_against_the_surest():
    three = {"a": [0, 1, 2, 3] * 10, "b": [0, 1, 2, 3] * 9 + [1, 1, 2, 3]}
    three["c"] = [0, 1, 2, 3] * 9 + [0, 1, 2, 2]
    sure = said([(i // 2) % 4 for i in range(40)], 0.999)  # another order, as even, and sharper
    given = [Candidate(n, said(labels, 0.8)) for n, labels in three.items()]
    found = select([*given, Candidate("sure", sure)], SOURCE)
    assert (found.name, found.criterion) == ("a", "agreement")
    # Two are no majority: the nuclear norm decides between them.
    pair = select([given[0], Candidate("sure", said(three["b"], 0.999))], SOURCE)
    assert (pair.name, pair.criterion) == ("sure", "nuclear norm")


def test_candidates_that_agree_on_nothing_are_no_majority():
    orders = [[(i * k) % 4 for i in range(40)] for k in (1, 3)]
    orders += [[(i // 2) % 4 for i in range(40)], [(i // 3) % 4 for i in range(40)]]
    strict = Limits(agreement=1.0)  # none of them may stay then
    found = select(
        [Candidate(str(i), said(o, 0.9)) for i, o in enumerate(orders[1:])], SOURCE, limits=strict
    )
    assert found.name == "source"
    assert len(found.rejected) == 3


def test_a_canary_decides_where_there_is_one():
    good, weak = said([0, 1, 2, 3] * 10, 0.9), SOURCE
    found = select([Candidate("good", good, 0.5), Candidate("weak", weak, 0.6)], SOURCE)
    assert (found.name, found.criterion) == ("weak", "canary")
    with pytest.raises(ConfigError, match="some candidates have a canary"):
        select([Candidate("good", good, 0.5), Candidate("weak", weak)], SOURCE)
    with pytest.raises(ConfigError, match="different names"):
        select([Candidate("a", good), Candidate("a", weak)], SOURCE)
