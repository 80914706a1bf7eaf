"""A recipe over a grid of settings: cells, the shared source model, resuming, what is the best."""

import csv
import json
import re

import pytest

from lora_lightning.cli import main
from lora_lightning.errors import ConfigError
from lora_lightning.runner.grid import split, sweep_grid
from lora_lightning.runner.grid_results import Cell, Line, Sweep
from lora_lightning.runner.loading import run_recipe
from tests.runner.test_experiment import PointsExperiment, recipe  # noqa: F401  # a fixture

RATES = "train.lora.learning_rate=1e-3,1e-1"


@pytest.fixture
def sources(monkeypatch):
    """The folder of each run that trained a source model."""
    trained = []
    real = PointsExperiment.source

    def source(self):
        trained.append(self.config.out)
        return real(self)

    monkeypatch.setattr(PointsExperiment, "source", source)
    return trained


def rows(folder):
    with open(folder / "sweep.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("undrawn")
def test_a_sweep_runs_each_combination_once(recipe, sources, capsys):  # noqa: F811
    """Through the command, with a cell that cannot be; a second one runs what is new alone."""
    out = recipe / "out"
    command = ["sweep", str(recipe), RATES, f"out={out}"]
    assert main([*command, "lora.rank=1,0"]) == 1
    said = capsys.readouterr()
    assert "cell 4 of 4: train.lora.learning_rate=1e-1 lora.rank=0" in said.err
    assert "failed: rank must be" in " ".join(said.out.split())
    assert "No label of a target chose it." in " ".join(said.out.split())
    assert len(sources) == 1
    name = "train.lora.learning_rate=1e-1,lora.rank=1"
    # The same as the run by itself.
    alone = run_recipe(recipe, ["methods=[source_only,lora]", *name.split(",")], recipe / "alone")
    held = json.loads((out / f"cells/{name}/results.json").read_text())
    values = {(r["method"], r["domain"]): r["value"] for r in held}
    assert values == {(r.method, r.domain): r.value for r in alone.rows}
    page = (out / f"cells/{name}/report.html").read_text()
    assert "The source model is that of" in page
    assert " ".join(["[source_only,lora]&#x27;", *name.split(","), f"out={out}"]) in page

    assert main([*command, "lora.rank=1,2", "--by", "near"]) == 0
    assert len(sources) == 3  # alone, and once for the new cells
    table = rows(out)
    assert [(r["train.lora.learning_rate"], r["lora.rank"]) for r in table] == [
        ("1e-3", "1"), ("1e-3", "2"), ("1e-1", "1"), ("1e-1", "2"),
    ]  # fmt: skip
    assert len({r["folder"] for r in table}) == 4
    assert not any(r["failed"] for r in table)
    best = max(table, key=lambda r: float(r["near"]))
    said = " ".join(capsys.readouterr().out.split())
    assert f"on near ({100 * float(best['near']):.1f} %): train.lora.learning" in said
    assert "Labels of the target chose it" in said
    plot = (out / "plots/sweep.svg").read_text()
    assert {"train.lora.learning_rate", "lora.rank"} <= set(re.findall(r">([^<>]+)</text>", plot))
    assert main([*command, "lora.rank=1,2", "--by", "nere"]) == 2
    assert "--by nere: that was not measured; choose one of far, near" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_cells_that_change_the_source_have_their_own(recipe, sources):  # noqa: F811
    out = recipe / "out"
    sweep = sweep_grid(recipe, ["train.source.epochs=1,2", "methods=[label_free]", f"out={out}"])
    assert len(sources) == 2
    assert {line.method for cell in sweep.cells for line in cell.lines} == {"LoRA, no labels"}
    # Settings that are the same for all were changed: nothing is taken from before.
    sweep_grid(recipe, ["train.source.epochs=1,2", f"out={out}"])
    assert len(sources) == 4


def test_mistakes_are_found_before_anything_runs(recipe, sources):  # noqa: F811
    for given, said in (
        (["lora.rnk=1,2"], "unknown key 'lora.rnk'"),
        (["lora.rank=1,1"], "expected different values"),
        (["lora.rank=1,2", "lora.rank=3,4"], "expected different values, once"),
        (["lora.rank=1,2", "lora.rank=3"], "lora.rank is given twice"),
        (["lora.rank=1,"], "expected different values"),
        (["out=a,b"], "out is the same for all cells"),
        (["lora.rank=1,2", "seeds=0,1"], "seeds must be a list"),
    ):
        with pytest.raises(ConfigError, match=said):
            sweep_grid(recipe, given)
    assert not sources


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("a=1,2", ["a=1", "a=2"]),
        ("a=[1,2]", ["a=[1,2]"]),
        ("a=[x], [x,y]", ["a=[x]", "a=[x,y]"]),
        ("a={b: 1, c: 2},null", ["a={b: 1, c: 2}", "a=null"]),
        ("a='x,y',z", ["a='x,y'", "a=z"]),
        ("a", ["a"]),
    ],
)
def test_commas_within_brackets_or_quotes_separate_nothing(override, values):
    assert split(override) == values


def test_what_is_best(tmp_path):
    """Errors are the lower the better; cells that are level are counted; no measure, no best."""
    lines = [{"source": 0.5, "a": 0.3}, {"source": 0.2, "a": 0.4}, {"source": 0.2, "a": 0.1}]
    cells = [
        Cell({"k": str(i)}, tmp_path / str(i), [Line("LoRA", measured, 1)])
        for i, measured in enumerate(lines)
    ]
    sweep = Sweep({"k": ["0", "1", "2"]}, cells, "WER")
    assert sweep.best()[0] is cells[1]
    assert "k=1, the first of 2 that are level" in sweep.verdict()
    sweep.by = "a"
    assert sweep.best()[0] is cells[2]
    assert "too good" in sweep.verdict()
    for line in lines:
        del line["source"]
    sweep.by = None
    assert sweep.best() is None
    assert "No cell is named the best" in sweep.verdict()
    sweep.write(tmp_path)
    assert len(rows(tmp_path)) == 3
