"""Plots: random samples, rows that sum to one, and unusual inputs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

from lora_lightning.report import plots
from lora_lightning.report.plots.domains import _apart, domain_plot
from lora_lightning.report.plots.items import MOST_LABELS, _confusion, confusion_plot, sample
from lora_lightning.report.plots.ranks import rank_plot
from lora_lightning.report.plots.spectra import _without_common_prefix, spectrum_plot
from lora_lightning.report.results import Prediction
from tests.helpers.report_runs import make_run, row, three_seeds


def test_many_classes_are_thinned(tmp_path: Path) -> None:
    classes = [f"class {i}" for i in range(65)]
    answers = [Prediction("x", "dim-1", c, c, 0.5, classes[0], 0.5, 0) for c in classes[:60]]
    run = make_run(tmp_path, three_seeds(), classes=classes, predictions=answers)
    figure, caption = confusion_plot(run) or pytest.fail("no plot")
    labels = figure.axes[0].get_yticklabels()
    assert 10 < len(labels) <= MOST_LABELS
    assert "Only some" in caption


def test_confusion_is_normalised_by_row_and_knows_missing_classes() -> None:
    shares = _confusion([("a", "a"), ("a", "b"), ("b", "b")], ["a", "b", "c"])
    assert shares[:2].tolist() == [[50, 50, 0], [0, 100, 0]]
    assert all(math.isnan(share) for share in shares[2])


def test_one_class_and_a_prediction_that_is_no_class(tmp_path: Path) -> None:
    answers = [Prediction("x", "dim-1", "mug", "mug", 0.5, "ghost", math.nan, 0)]
    run = make_run(tmp_path, [], classes=["mug"], predictions=answers, spectra={})
    assert [plot.name for plot in plots.draw(run)] == ["confusion", "samples"]


def test_images_that_are_broken_missing_or_of_any_mode(tmp_path: Path) -> None:
    for name, mode in (("a.png", "RGB"), ("b.png", "L"), ("c.png", "RGBA"), ("d.png", "P")):
        Image.new(mode, (20, 7)).save(tmp_path / name)
    (tmp_path / "e.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "f.png").write_text("no image")
    (tmp_path / "g.png").mkdir()
    answers = [
        Prediction(f"{n}.png", "dim-1", "漢字", "mug", 0.5, "mug", 0.5, 0) for n in "abcdefgh"
    ]
    run = make_run(tmp_path, [], predictions=answers, spectra={})
    drawn = {plot.name: plot.svg.decode() for plot in plots.draw(run)}
    assert "漢字" in drawn["samples"]  # text, which the reader's own fonts draw
    assert "sans-serif" in drawn["samples"]


def test_sample_is_fixed_stratified_and_blind_to_the_outcome() -> None:
    items = [
        Prediction(f"{d}/{i}", d, "a", "b", 0.5, "ab"[i % 2], 0.5, seed)
        for seed in (1, 0)
        for d in ("x", "y", "z")
        for i in range(20)
    ]
    drawn = sample(items, 12)
    assert drawn == sample(items[::-1], 12)
    assert [p.domain for p in drawn] == ["x"] * 4 + ["y"] * 4 + ["z"] * 4
    assert {p.seed for p in drawn} == {0}
    flipped = [dataclasses.replace(p, adapted="a") for p in items]
    assert [p.item for p in sample(flipped, 12)] == [p.item for p in drawn]
    assert len(sample(items, 2)) == 2


def test_spectra_without_values_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path, three_seeds(), spectra={"a": [0.0], "b": [], "c": [math.nan]})
    assert spectrum_plot(run) is None
    run.spectra["d"] = [1e-3]
    assert spectrum_plot(run) is not None


def test_layer_names_lose_what_they_share() -> None:
    names = ["model.blocks.0.fc", "model.blocks.1.fc"]
    assert _without_common_prefix(names) == ["blocks.0.fc", "blocks.1.fc"]
    assert _without_common_prefix(["model.a", "model.b.c"]) == ["a", "b.c"]
    assert _without_common_prefix(["head"]) == ["head"]


def test_labels_are_moved_apart_and_stay_inside() -> None:
    assert _apart([1.0, 5.0], 1, 0, 10) == [1, 5]
    assert _apart([9.8, 9.9, 10.0], 1, 0, 10) == [8, 9, 10]


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plots.draw(make_run(tmp_path, three_seeds(), predictions=[]))
    assert dict(matplotlib.rcParams) == before


def test_ranks_are_drawn_by_size_and_the_chosen_one_apart(tmp_path: Path) -> None:
    sizes = {"1": 10_000, "4": 40_000, "16": 160_000, "auto": 25_000}
    rows = [row("source only", d, s, 0.7) for d in ("source", "dim-1", "dim-2") for s in (0, 1)]
    for i, (rank, size) in enumerate(sizes.items()):
        method = f"LoRA, rank {rank}, target labels"
        rows += [
            row(method, d, s, 0.9 + i / 100 + s / 50, trainable_parameters=size)
            for d in ("source", "dim-1", "dim-2")
            for s in (0, 1)
        ]
    run = make_run(tmp_path, rows, predictions=[], spectra={})
    drawn = [plot.name for plot in plots.draw(run)]
    assert "ranks" in drawn
    figure, caption = rank_plot(run) or pytest.fail("no plot")
    axes = figure.axes[0]
    fixed, chosen = axes.containers
    assert [list(map(float, c[0].get_xdata())) for c in (fixed, chosen)] == [
        [1e4, 4e4, 16e4],
        [25e3],
    ]
    assert list(fixed[0].get_ydata()) == pytest.approx([91, 92, 93])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["10 k", "40 k", "160 k"]
    assert "higher is better" in caption
    assert rank_plot(make_run(tmp_path, three_seeds())) is None


def test_closed_forms_are_thin_where_there_are_many_methods(tmp_path: Path) -> None:
    free = [f"closed form {i}" for i in range(6)]
    rows = [
        row(m, d, 0, 0.7, trainable_parameters=0, file_bytes=None)
        for m in ["source only", *free]
        for d in ("source", "dim-1", "dim-2")
    ]
    few = make_run(tmp_path, rows[:9])
    many = make_run(tmp_path, [*rows, *three_seeds()])
    for run, thin in ((few, 0), (many, 6)):
        figure, caption = domain_plot(run) or pytest.fail("no plot")
        lines = [line for line in figure.axes[0].lines if line.get_linewidth() == 0.7]
        assert len(lines) == thin
        assert ("closed form 0, closed form 1" in caption) == bool(thin)
