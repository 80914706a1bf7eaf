"""The translation recipe end to end at tiny sizes, and its checks before the start."""

import csv
import json

import pytest
import torch

from lora_lightning import load_adapter
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.runner.loading import load_recipe, run_recipe
from lora_lightning.text.methods import METHODS
from lora_lightning.text.parallel import Pair, TextBatch
from lora_lightning.text.translators import load_translator
from tests.helpers.miniature import TINY_TRANSLATION as TINY

DOMAINS = ["nautical-1", "medical-3"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run of two seeds: the folder of results, and what was returned."""
    out = tmp_path_factory.mktemp("out")
    return out, run_recipe("translation", [*TINY, f"data.target={DOMAINS}", "seeds=[0,3]"], out)


def test_results_hold_every_method_domain_and_seed(ran):
    out, _ = ran
    rows = json.loads((out / "results.json").read_text())
    assert list(load_recipe("translation").methods) == list(METHODS)
    assert list(dict.fromkeys(r["method"] for r in rows)) == [
        "source only", "translation memory, target labels", "LoRA, no labels",
        "LoRA, target labels", "full, target labels",
    ]  # fmt: skip
    keys = {(r["method"], r["domain"], r["seed"], r["metric"]) for r in rows}
    assert len(keys) == len(rows) == 5 * 3 * 2 * 2
    assert {r["domain"] for r in rows} == {"everyday", *DOMAINS}
    assert {r["metric"] for r in rows} == {"BLEU", "exact"}
    assert all(0 <= r["value"] <= 1 for r in rows)
    tuned = {r["method"]: r["trainable_parameters"] for r in rows}
    assert tuned["source only"] == tuned["translation memory, target labels"] == 0
    assert (
        0 < tuned["LoRA, no labels"] < tuned["LoRA, target labels"] < tuned["full, target labels"]
    )


def test_files_of_a_run(ran):
    out, run = ran
    assert {p.name for p in out.iterdir()} == {
        "adapters", "config.yaml", "plots", "report.html", "results.csv", "results.json",
        "source.safetensors", "translations.csv",
    }  # fmt: skip
    made = {p.stem for p in (out / "adapters").iterdir()}
    ends = ("", "-no-labels", "-seed3", "-no-labels-seed3")
    assert made == {f"{d}{end}" for d in DOMAINS for end in ends}
    page = (out / "report.html").read_text()
    assert "<h2>Read</h2>" in page
    assert "<h2>BLEU</h2>" in page
    assert "<audio" not in page
    with (out / "translations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(run.transcripts) == 2 * 2 * (3 + 4)  # held out, and learnt from
    own = [t for t in run.transcripts if t.split == "target"]
    assert all(t.changed == (t.round != 0) and 0 <= t.confidence <= 1 for t in own)
    assert not {t.item for t in own} & {t.item for t in run.transcripts if t not in own}
    assert sum("no labels, nautical-1" in note for note in run.notes) == 2


def test_the_adapter_fits_the_source_model(ran):
    out, _ = ran
    model = load_translator(out / "source.safetensors")
    batch = TextBatch.of([Pair("the man", "ke")], model.subwords)
    before = model(batch.source, batch.target)
    load_adapter(model, out / "adapters" / "nautical-1.safetensors")
    assert not torch.equal(model(batch.source, batch.target), before)


@pytest.mark.usefixtures("undrawn")
def test_the_same_seed_gives_the_same_table_and_the_model_can_be_given(ran, tmp_path):
    out, first = ran
    given = ["data.target=[medical-3]", "seeds=[3]", f"model.checkpoint={out}/source.safetensors"]
    again = run_recipe("translation", [*TINY, *given], tmp_path)
    before = {(r.method, r.domain, r.metric): r.value for r in first.rows if r.seed == 3}
    found = {(r.method, r.domain, r.metric): r.value for r in again.rows}
    assert found == {key: value for key, value in before.items() if key[1] != "nautical-1"}


@pytest.mark.usefixtures("undrawn")
def test_pairs_of_ones_own(tmp_path):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    rows = [f"{w} {v}\t{v} {w}\t{d}" for d, v in (("news", "x"), ("law", "y")) for w in words]
    path = tmp_path / "pairs.tsv"
    path.write_text("source\ttarget\tdomain\n" + "\n".join(rows) + "\n")
    given = [f"data.pairs={path}", "data.source=news", "methods=[source_only,lora]"]
    run = run_recipe("translation", [*TINY, *given], tmp_path / "out")
    assert {r.domain for r in run.rows} == {"news", "law"}
    assert {t.domain for t in run.transcripts} == {"law"}
    with pytest.raises(DataError, match="law has 5 training pairs, but labelled=6"):
        run_recipe("translation", [*TINY, *given, "labelled=6"], tmp_path / "out")
    with pytest.raises(DataError, match=r"data.target: unknown domain 'lww'; did you mean 'law'"):
        run_recipe("translation", [*TINY, *given, "data.target=[lww]"], tmp_path / "out")
    with pytest.raises(DataError, match=r"data.source: unknown domain 'everyday'"):
        run_recipe("translation", [*TINY, given[0]], tmp_path / "out")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("labelled=0", "labelled must be a whole number of at least 1, got 0"),
        ("data.test=0", "data.test must be a whole number of at least 1"),
        ("train.lora.epochs=0", "train.lora.epochs must be a whole number of at least 1"),
        ("train.full.learning_rate=-1", "learning_rate must be above 0"),
        ("train.label_free.steps=1", "a step for each of the 3 rounds"),
        ("train.label_free.keep=[0.0]", "keep must hold parts"),
        ("train.label_free.schedule=linear", "schedule must be one of"),
        ("memory.weight=2", "weight must lie in"),
        ("methods=[lorra]", "did you mean 'lora'"),
        ("lora.rank=0", "rank"),
        ("data.target=[naval-1]", "no register 'naval-1'"),
        ("data.source=news", "data.source must be everyday without data.pairs"),
        ("model.num_heads=3", "dim must be even and a multiple of num_heads"),
        ("model.checkpoint=none.safetensors", "no translator's file"),
    ],
)
def test_what_cannot_be_run_is_said_first(tmp_path, override, message):
    with pytest.raises((ConfigError, DataError), match=message):
        run_recipe("translation", [*TINY, override], out=tmp_path)
