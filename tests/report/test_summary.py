"""Means, spreads and averages over domains, and formatted numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lora_lightning.report.metrics import shorten, si
from lora_lightning.report.summary import Summary
from tests.helpers.report_runs import LORA, make_run, row


def test_spread_is_the_sample_deviation_of_the_seeds_averages(tmp_path: Path) -> None:
    rows = [row(LORA, "a", s, v) for s, v in enumerate((0.5, 0.7))]
    rows += [row(LORA, "b", s, v) for s, v in enumerate((0.7, 0.5))]
    summary = Summary(make_run(tmp_path, rows))
    assert summary.target(LORA).sd == pytest.approx(0.0)
    cell = summary.cell(LORA, ["a"])
    assert (cell.mean, cell.sd) == pytest.approx((0.6, math.sqrt(0.02)))


def test_a_given_average_counts_only_where_there_is_nothing_to_average(tmp_path: Path) -> None:
    rows = [row(LORA, "target", 0, 0.1)]
    assert Summary(make_run(tmp_path, rows)).target(LORA).mean == pytest.approx(0.1)
    rows += [row(LORA, "dim-1", 0, 0.5)]
    assert Summary(make_run(tmp_path, rows)).target(LORA).mean == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0 k"),
        (16_800, "17 k"),
        (3_400_000, "3.4 M"),
        (2e9, "2.0 G"),
    ],
)
def test_si(number: float, text: str) -> None:
    assert si(number) == text


def test_shorten_and_units() -> None:
    assert shorten("abcdef", 4) == "abc…"
    assert shorten("abcd", 4) == "abcd"
    assert si(487_000, "B") == "487 kB"
    assert si(12, "B") == "12 B"
