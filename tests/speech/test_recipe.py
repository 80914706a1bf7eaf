"""The speech recipes end to end at tiny sizes, and their checks before the start."""

import json

import pytest
import torch

from lora_lightning import load_adapter
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.runner.loading import run_recipe
from lora_lightning.speech.tasks.recognisers import load_recogniser

TINY = [
    "accelerator=cpu", "enrolment=[1,2]", "headline=2", "data.test=2", "train.lora.steps=[1,2]",
    "train.full.steps=[1,2]", "data.spoken.target_voices=[dutch,czech]",
    "unlabelled=[1,2]", "train.label_free.steps=1", "train.label_free.keep=[1.0]",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_LIGHTNING_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(
    ("seeds", "voices"),
    [([1], ["dutch"]), pytest.param([0, 1], ["dutch", "czech"], marks=pytest.mark.slow)],
)
def test_speakers_with_the_packaged_model(seeds, voices, tmp_path):
    given = [f"seeds={seeds}", f"data.spoken.target_voices={voices}"]
    run = run_recipe("speaker", [*TINY, *given], out=tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())
    methods = dict.fromkeys(r["method"] for r in rows)
    assert list(methods) == [
        "source only", "lexicon only", "LoRA, no labels, 1 s", "LoRA, no labels, 1 s, lexicon",
        "LoRA, no labels, 2 s", "LoRA, no labels, 2 s, lexicon", "LoRA, 1 target labels",
        "LoRA, 2 target labels", "full, 1 target labels", "full, 2 target labels",
    ]  # fmt: skip
    assert {r["domain"] for r in rows} == set(voices)
    assert {r["metric"] for r in rows} == {"WER", "CER"}
    assert {r["items"] for r in rows} == {None, 1, 2}
    lora = next(r for r in rows if r["method"].startswith("LoRA, 1"))
    full = next(r for r in rows if r["method"].startswith("full"))
    assert lora["trainable_parameters"] < 0.03 * full["trainable_parameters"]
    assert lora["file_bytes"] < 300_000
    assert len([t for t in run.transcripts if t.split == "held-out"]) == 2 * len(seeds) * len(
        voices
    )
    own = [t for t in run.transcripts if t.split == "target"]
    assert {t.domain for t in own} == set(voices)
    assert all(t.changed == (t.round != 0) and 0 <= t.confidence <= 1 for t in own)
    header = (tmp_path / "transcripts.csv").read_text().splitlines()[0].split(",")
    assert {"adapted", "confidence", "source", "changed", "round"} <= set(header)
    assert (tmp_path / "report.html").exists()
    # The adapter belongs to the source model beside it.
    model = load_recogniser(tmp_path / "source.safetensors")
    source = model(torch.zeros(1, 8000))[0]
    load_adapter(model, tmp_path / "adapters" / "dutch-2.safetensors")
    assert not torch.equal(model(torch.zeros(1, 8000))[0], source)
    for seed in seeds[1:]:
        assert (tmp_path / "adapters" / f"dutch-2-seed{seed}.safetensors").exists()


@pytest.mark.usefixtures("undrawn")
def test_acoustics_keep_what_they_sound_like(tmp_path):
    given = [
        "data.environments=[telephone,street]", "data.spoken.environment_voices=2",
        "methods=[source_only,lora]",
    ]  # fmt: skip
    run = run_recipe("acoustics", [*TINY, *given], out=tmp_path)
    assert {r.domain for r in run.rows} == {"telephone", "street"}
    assert len(list((tmp_path / "audio").rglob("*.flac"))) == 4
    assert all(t.audio and "audio" in t.audio for t in run.transcripts)


@pytest.mark.usefixtures("undrawn")
def test_a_source_model_is_trained_where_none_is_given(tmp_path):
    given = [
        "model.checkpoint=null", "model.dim=16", "model.num_layers=1", "model.ffn_dim=16",
        "train.source.epochs=1", "data.spoken.source_voices=2", "data.spoken.source_utterances=4",
        "methods=[source_only]",
    ]  # fmt: skip
    run_recipe("speaker", [*TINY, *given], out=tmp_path / "first")
    again = [
        *TINY, f"model.checkpoint={tmp_path}/first/source.safetensors", "methods=[source_only]",
    ]  # fmt: skip
    run_recipe("speaker", again, out=tmp_path / "second")
    first, second = ((tmp_path / d / "results.csv").read_text() for d in ("first", "second"))
    assert first == second  # the file is the model that was measured


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["enrolment=[20,5]"], "sizes in rising order"),
        (["unlabelled=[0]"], "above 0"),
        (["train.label_free.steps=1", "train.label_free.keep=[0.5,0.9]"], "2 rounds"),
        (["train.label_free.keep=[2.0]"], "keep"),
        (["data.lexicon=nowhere.txt"], "nowhere.txt"),
        (["headline=7"], r"headline must be one of enrolment=\[1, 2\], got 7"),
        (["train.lora.steps=[1]"], r"train.lora.steps must hold a number of steps for each"),
        (["data.test=0"], "data.test must be a whole number of at least 1"),
        (["methods=[lorra]"], "did you mean 'lora'"),
        (["lora.rank=0"], "rank"),
        (["data.environments=[moon]"], "moon"),
        (["data.spoken.target_voices=[klingon]"], "klingon"),
        (["model.checkpoint=none.safetensors"], "no recogniser's file"),
    ],
)
def test_what_cannot_be_run_is_said_first(tmp_path, overrides, message):
    with pytest.raises((ConfigError, DataError), match=message):
        run_recipe("speaker", [*TINY, *overrides], out=tmp_path)


def test_too_few_recordings_or_no_transcripts(tmp_path):
    from lora_lightning.speech.data.synthetic.spoken import spoken_set
    from lora_lightning.speech.data.synthetic.voices import target_voices

    folder = spoken_set(
        tmp_path / "set", speakers=target_voices(["dutch"]), utterances=3, progress=False
    )
    listing = folder / "utterances.jsonl"
    with pytest.raises(DataError, match="dutch has 3 usable recordings, but 4 are needed"):
        run_recipe("speaker", [*TINY, f"data.target={listing}"], out=tmp_path / "out")
    with pytest.raises(DataError, match="3 recordings have no transcript"):
        run_recipe("speaker", [*TINY, f"data.target={folder / 'dutch'}"], out=tmp_path / "out")
