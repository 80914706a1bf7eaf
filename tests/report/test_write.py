"""Reports: tables of known rows, files with all results, self-contained pages."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora_lightning.report.plots.domains import domain_plot
from lora_lightning.report.summary import Summary
from lora_lightning.report.write import (
    Prediction,
    Row,
    Run,
    print_table,
    verdict,
    write_report,
)
from tests.helpers.report_runs import FULL, LORA, SOURCE, make_run, row, three_seeds


def table_text(run: Run, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_table(run, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    return str(text)


def write(run: Run, out: Path) -> str:
    """Write the report; returns the page, after the general checks."""
    write_report(run, out)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""<[^>]*\b(?:src|href)=(?!"data:)""", page)
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert not list(out.rglob("*.tmp"))
    return page


def test_table_shows_known_means_and_spreads(tmp_path: Path) -> None:
    lines = table_text(make_run(tmp_path, three_seeds())).splitlines()
    numbers = {line.split("  ")[0].strip(): re.findall(r"\d+\.\d(?!\d)", line) for line in lines}
    assert numbers["source only"][:4] == ["95.0", "80.0", "60.0", "70.0"]
    assert numbers["LoRA,"][:4] == ["90.0"] * 4
    assert numbers["target labels"][:4] in (["1.0"] * 4, ["0.0"] * 4)
    text = "\n".join(lines)
    assert "± 1.0" in text
    assert "100 k" in text
    assert "412 kB" in text
    assert "3.4 M" in text
    assert text.index(SOURCE) < text.index("LoRA,") < text.index("full fine-tuning,")


def test_a_single_seed_has_no_spread(tmp_path: Path) -> None:
    text = table_text(make_run(tmp_path, [r for r in three_seeds() if r.seed == 0]))
    assert "±" not in text
    assert "one seed" in text


@pytest.mark.usefixtures("undrawn")
def test_seeds_without_a_value_are_left_out_and_said_so(tmp_path: Path) -> None:
    rows = three_seeds()
    rows[5] = dataclasses.replace(rows[5], value=math.nan)
    rows.append(row(FULL, "dim-1", 7, 0.5))  # a seed measured on one domain only
    run = make_run(tmp_path, rows)
    assert Summary(run).cell(LORA, ["source"]).lost == 1
    assert Summary(run).target(FULL).mean == pytest.approx(0.93)
    assert "*: seeds without a value" in table_text(run)
    assert "90.5*" in write(run, tmp_path / "out")


@pytest.mark.usefixtures("undrawn")
def test_all_values_nan(tmp_path: Path) -> None:
    rows = [dataclasses.replace(r, value=math.nan, seconds=math.nan) for r in three_seeds()]
    run = make_run(tmp_path, rows)
    assert "–" in table_text(run)
    assert "no two methods" in write(run, tmp_path / "out")


@pytest.mark.parametrize(
    ("domains", "shown"),
    [
        (["amazon", "webcam", "dslr"], ["amazon", "webcam", "mean"]),
        (["amazon", "a quite long name", "[red]dslr"], ["webcam", "a quite…", "[red]ds…", "mean"]),
        (["source", "webcam"], ["test", "webcam"]),
        (["source", "target"], ["test", "target"]),
        (["source", *"abcdef"], ["test", "mean"]),
        (["only"], ["only"]),
    ],
)
def test_columns_of_free_domain_names(tmp_path: Path, domains: list[str], shown: list[str]) -> None:
    rows = [row(m, d, s, 0.5) for m in (SOURCE, LORA, FULL) for d in domains for s in (0, 1)]
    run = make_run(tmp_path, rows, config={"data": {"source": "dslr"}})
    if "webcam" in shown and "webcam" not in domains:
        shown = [name.replace("webcam", "amazon") for name in shown]
    heads = table_text(run).splitlines()[2]
    assert all(name in heads for name in shown)
    assert domain_plot(run) is not None


@pytest.mark.usefixtures("undrawn")
def test_best_is_marked_with_and_without_labels(tmp_path: Path) -> None:
    run = make_run(tmp_path, three_seeds())
    assert Summary(run).best() == {SOURCE, FULL}
    assert write(run, tmp_path / "out").count('class="best"') == 2


@pytest.mark.usefixtures("undrawn")
def test_files_round_trip(tmp_path: Path) -> None:
    rows = [*three_seeds(), row(LORA, "dim-1", 9, math.nan, metric="loss")]
    run = make_run(tmp_path / "data", rows)
    write(run, tmp_path)
    read = json.loads((tmp_path / "results.json").read_text())
    assert read.pop()["value"] is None
    assert [Row(**entry) for entry in read] == rows[:-1]
    with (tmp_path / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(line["value"]) for line in table[:-1]] == [r.value for r in rows[:-1]]
    assert math.isnan(float(table[-1]["value"]))
    assert table[0]["file_bytes"] == ""
    with (tmp_path / "predictions.csv").open(newline="") as file:
        assert [line["item"] for line in csv.DictReader(file)] == [p.item for p in run.predictions]


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "data", three_seeds(), predictions=[])
    write(run, tmp_path)
    assert len(list((tmp_path / "plots").iterdir())) == 2
    write(dataclasses.replace(run, spectra={}), tmp_path)
    assert [p.stem for p in (tmp_path / "plots").iterdir()] == ["accuracy"]


@pytest.mark.usefixtures("undrawn")
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "data", three_seeds())
    write(run, tmp_path)
    old = (tmp_path / "results.json").read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(dataclasses.replace(run, rows=[]), tmp_path)
    assert (tmp_path / "results.json").read_bytes() == old
    assert not list(tmp_path.rglob("*.tmp"))


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('$x$')</script>"
    rows = [row(m + evil, d, 0, 0.5) for m in (SOURCE, LORA) for d in ("source", evil)]
    predictions = [Prediction(evil, evil, evil, "$5", 0.5, "a^$_{", 0.5, 0)]
    page = write(
        make_run(
            tmp_path,
            rows,
            title=evil,
            predictions=predictions,
            classes=[evil, "$5", "a^$_{"],
            config={evil: evil},
            versions={evil: evil},
            skipped=[(evil, evil)],
            notes=[evil],
            spectra={evil: [1.0]},
            command=evil,
        ),
        tmp_path / "out",
    )
    assert page.count("&lt;script&gt;") > 10


def test_page_has_what_a_reader_looks_for(tmp_path: Path) -> None:
    page = write(make_run(tmp_path, three_seeds()), tmp_path / "out")
    for text in (
        "raises accuracy from 70.0 % to 90.0 %",
        "1 file skipped",
        "a note",
        "2.14.0",
        "two cores",
        "lora-lightning run lighting",
        "&quot;rank&quot;: 2",
        "somewhere",
    ):
        assert text in page
    assert page.count("data:image/svg+xml;base64,") == 4
    pictures = (tmp_path / "out" / "plots").iterdir()
    drawn = ["accuracy", "confusion", "samples", "spectrum"]  # the others are of speech
    assert sorted(path.stem for path in pictures) == drawn


def test_verdict_in_words(tmp_path: Path) -> None:
    assert verdict(make_run(tmp_path, three_seeds())) == (
        "On the target, LoRA with target labels raises accuracy from 70.0 % to 90.0 % (mean of "
        "3 seeds), 3.0 points below full fine-tuning, with 2.9 % of its trainable parameters."
    )


@pytest.mark.parametrize(
    ("lora", "full", "words"),
    [
        (0.4, 0.5, "lowers accuracy from 50.0 % to 40.0 %, 10.0 points below"),
        (0.5, 0.49, "leaves accuracy at 50.0 %, 1.0 point above"),
        (0.6, 0.6, "level with full fine-tuning"),
        (0.6, math.nan, "to 60.0 %."),
    ],
)
def test_verdict_of_other_outcomes(tmp_path: Path, lora: float, full: float, words: str) -> None:
    values = {SOURCE: 0.5, LORA: lora, FULL: full}
    rows = [row(m, "t", 0, value) for m, value in values.items()]
    assert words in verdict(make_run(tmp_path, rows))


def test_verdict_says_when_a_gap_is_within_the_spread(tmp_path: Path) -> None:
    rows = [row(SOURCE, "t", s, 0.5) for s in (0, 1)]
    rows += [row(LORA, "t", s, v) for s, v in enumerate((0.7, 0.8))]
    rows += [row(FULL, "t", s, v) for s, v in enumerate((0.75, 0.77))]
    assert "(within the spread over seeds)" in verdict(make_run(tmp_path, rows))


@pytest.mark.usefixtures("undrawn")
def test_an_empty_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, [], predictions=[], spectra={}, classes=[], skipped=[], notes=[])
    assert "no accuracy was measured" in table_text(run)
    assert "No accuracy was measured" in write(run, tmp_path / "out")
