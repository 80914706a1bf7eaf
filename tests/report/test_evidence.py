"""Intervals by item and by seed, and what is called a gain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torchmetrics.functional.text import sacre_bleu_score

from lora_lightning.report.evidence import Evidence, _bleu, by_seed, of_mean
from lora_lightning.report.results import Row
from lora_lightning.report.write import verdict
from lora_lightning.text.experiment import bleu_sums
from tests.helpers.report_runs import FULL, LORA, SOURCE, make_run, row


def paired(better: int, worse: int, n: int = 39) -> Evidence:
    """Two methods on the same items: some right with the first alone, some with the second."""
    first, second = np.zeros(n), np.zeros(n)
    first[:better], second[better : better + worse] = 1, 1
    rows = {"a": first, "b": second}
    ones = np.ones(n)
    return Evidence({(m, "t", 0): np.stack([x, ones], 1) for m, x in rows.items()}, "accuracy")


@pytest.mark.parametrize(
    ("better", "worse", "clear"),
    # By McNemar's exact test 5 against 0 is 6 % by chance, 6 against 0 is 3 %.
    [(1, 0, False), (4, 0, False), (5, 0, False), (7, 0, True), (12, 9, False), (2, 14, True)],
)
def test_a_gain_is_one_that_chance_seldom_makes(better: int, worse: int, clear: bool) -> None:
    interval, more, less = paired(better, worse).difference("a", "b", ["t"]) or pytest.fail("none")
    assert (more, less) == (better, worse)
    assert interval.clear == clear
    assert interval.low <= (better - worse) / 39 <= interval.high


def test_items_are_better_in_the_mean_of_the_seeds() -> None:
    """The guard kept the source model in the first seed; the interval is of both."""
    degrees = {("a", 0): [9, 9, 9], ("a", 1): [1, 9, 20], ("b", 0): [9, 9, 9], ("b", 1): [9, 9, 9]}
    scores = {(m, "t", s): of_mean(np.array(v)) for (m, s), v in degrees.items()}
    found = Evidence(scores, "azimuth error").difference("a", "b", ["t"])
    assert found
    assert found[1:] == (1, 1)


def test_of_many_items_the_sums_are_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    right = np.random.default_rng(0).random((3, 1500)) < np.array([[0.7], [0.75], [0.5]])
    scores = {
        (m, "t", 0): np.stack([x, np.ones(1500)], 1) for m, x in zip("abc", right, strict=True)
    }
    drawn = Evidence(scores, "accuracy")
    ends = [drawn.mean("a", ["t"]), *((drawn.difference(m, "c", ["t"]) or [None])[0] for m in "ab")]
    monkeypatch.setattr("lora_lightning.report.evidence.FEW", 100)
    near = [drawn.mean("a", ["t"]), *((drawn.difference(m, "c", ["t"]) or [None])[0] for m in "ab")]
    for one, other in zip(ends, near, strict=True):
        assert one
        assert other
        assert abs(one.low - other.low) + abs(one.high - other.high) < 0.012


def test_the_interval_of_a_mean_is_the_binomials() -> None:
    values = np.stack([np.arange(400) < 100, np.ones(400)], 1).astype(float)
    found = Evidence({("a", "t", s): values for s in (0, 1)}, "accuracy").mean("a", ["t"])
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.25 - 0.0424, 0.25 + 0.0424), abs=0.006)
    assert Evidence({}, "accuracy").mean("a", ["t"]) is None


def test_seeds_have_student_s_interval() -> None:
    found = by_seed([0.1, 0.2, 0.3])
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.2 - 0.2484, 0.2 + 0.2484), abs=1e-4)
    assert by_seed([0.1]) is None


def test_sums_of_translations_are_those_of_bleu() -> None:
    found = ["the old man went to the sea", "a cat sat on the mat today", "no"]
    wanted = ["the old man walked to the sea", "a cat sat on a mat today .", "nothing at all"]
    sums = np.array(bleu_sums(found, wanted)).sum(0)
    assert float(_bleu(sums)) == pytest.approx(
        float(sacre_bleu_score(found, [[w] for w in wanted])), abs=1e-6
    )


def test_one_picture_of_39_is_no_gain(tmp_path: Path) -> None:
    rows = [row(SOURCE, "night", 0, 13 / 39), row(LORA, "night", 0, 14 / 39)]
    scores = {
        (r.method, "night", 0): np.stack([np.arange(39) < 39 * r.value - 0.5, np.ones(39)], 1)
        for r in rows
    }
    said = verdict(make_run(tmp_path, rows, scores=scores))
    assert "changes accuracy from 33.3 % to 35.9 %, which can be chance: 1 of 39 items" in said
    assert "raises" not in said


@pytest.mark.parametrize(("seeds", "word"), [(2, "raises"), (3, "changes")])
def test_seeds_decide_from_three_on(tmp_path: Path, seeds: int, word: str) -> None:
    """Items are sure of these gains; the seeds, of which one loses, are not."""
    values = {SOURCE: (0.5, 0.5, 0.5), LORA: (0.9, 0.45, 0.9), FULL: (0.9, 0.9, 0.9)}
    rows: list[Row] = [row(m, "t", s, v[s]) for m, v in values.items() for s in range(seeds)]
    assert f"labels {word} accuracy" in verdict(make_run(tmp_path, rows))
