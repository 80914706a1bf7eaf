"""The commands adapt-speaker and transcribe, end to end."""

import errno
import importlib.util
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_lightning import inject, load_adapter, read_header
from lora_lightning.cli import main
from lora_lightning.lora.values import check_adapter_name
from lora_lightning.speech import enrolment as run_enrolment
from lora_lightning.speech import speakers as run
from lora_lightning.speech import speakers as untranscribed
from lora_lightning.speech.data.manifests import load_utterances, write_manifest
from lora_lightning.speech.data.synthetic.espeak import Voice
from lora_lightning.speech.data.synthetic.spoken import LISTING, spoken_set
from lora_lightning.speech.tasks.recognisers import ConformerCTC, load_recogniser, save_recogniser
from tests.helpers.files import rewrite
from tests.helpers.speech import TINY

VOICES = {"anna": Voice("en-us", "f2"), "boris": Voice("de", "m3")}


@pytest.fixture(scope="module")
def enrolment(tmp_path_factory):
    root = tmp_path_factory.mktemp("enrol") / "set"
    return spoken_set(root, speakers=VOICES, utterances=5, progress=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_recogniser(ConformerCTC(**TINY), path)
    return path


def adapt(model, enrolment, out, *more):
    return main(
        ["adapt-speaker", "--model", str(model), "--enroll", str(enrolment), "--out", str(out),
         "--steps", "3", "--accelerator", "cpu", "--held-out", "0", *more]
    )  # fmt: skip


def test_many_speakers_one_adapter_each(model, enrolment, tmp_path, capsys):
    assert adapt(model, enrolment / LISTING, tmp_path) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["anna.safetensors", "boris.safetensors"]
    table = " ".join(capsys.readouterr().out.split())
    assert "anna" in table
    assert "adapted" in table
    assert table.count("recordings: with 5") == 1  # once for both
    assert table.count("[1]") == 3
    waveform = torch.randn(1, 8000)
    source = load_recogniser(model)
    plain = source(waveform)[0]
    outputs = []
    for name in VOICES:
        adapted = load_recogniser(model)
        load_adapter(adapted, tmp_path / f"{name}.safetensors")
        outputs.append(adapted(waveform)[0])
    assert not torch.allclose(outputs[0], plain)
    assert not torch.allclose(outputs[0], outputs[1])


def test_an_interrupted_run_goes_on_where_it_was(model, enrolment, tmp_path, capsys, monkeypatch):
    real, seen = run._one, []

    def interrupted(base, name, *rest):
        seen.append(name)
        if name == "boris" and len(seen) == 2:
            raise KeyboardInterrupt
        return real(base, name, *rest)

    monkeypatch.setattr(run, "_one", interrupted)
    assert adapt(model, enrolment / LISTING, tmp_path) == 130
    assert "adapted" in capsys.readouterr().out  # the table tells what was done
    first = (tmp_path / "anna.safetensors").read_bytes()
    assert adapt(model, enrolment / LISTING, tmp_path) == 0
    assert seen == ["anna", "boris", "boris"]
    assert "already there" in capsys.readouterr().out
    assert (tmp_path / "anna.safetensors").read_bytes() == first


def test_the_order_of_speakers_does_not_matter(model, enrolment, tmp_path):
    """The base is restored: the second speaker gets the same adapter as alone."""
    adapt(model, enrolment / LISTING, tmp_path / "both")
    alone = [u for u in load_utterances(enrolment / LISTING) if u.speaker == "boris"]
    write_manifest(tmp_path / "boris.jsonl", alone)
    adapt(model, tmp_path / "boris.jsonl", tmp_path / "alone")
    both, one = ((tmp_path / d / "boris.safetensors").read_bytes() for d in ("both", "alone"))
    assert both == one


ENGINES = ["processes", pytest.param("ray", marks=pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='Ray is not installed: pip install "ray"'
))]  # fmt: skip


@pytest.mark.slow  # each process imports torch and torchaudio
@pytest.mark.filterwarnings("default")  # Ray's own
@pytest.mark.parametrize("engine", ENGINES)
def test_several_at_once_give_the_files_of_one_after_the_other(
    model, enrolment, tmp_path, engine, capsys
):
    adapt(model, enrolment / LISTING, tmp_path / "turn")
    (tmp_path / "once").mkdir()
    (tmp_path / "once/anna.safetensors").write_bytes(b"damaged")  # one that fails is listed
    more = ["--jobs", "2", "--engine", engine]
    assert adapt(model, enrolment / LISTING, tmp_path / "once", *more) == 1
    said = capsys.readouterr()
    assert "failed" in said.out
    assert "✓ all: 1/1 done" in said.err
    assert adapt(model, enrolment / LISTING, tmp_path / "once", *more, "--overwrite") == 0
    made = [{p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("turn", "once")]
    assert made[0] == made[1]


def test_one_bad_speaker_never_ends_the_run(model, enrolment, tmp_path, capsys, monkeypatch):
    """Each has a file of its own, in the summary; what fails for all ends the run at once."""
    names = ["José", "李明", "", "train", "x" * 300, "Anna", "anna", "[/]", "ruined", "bug"]
    sounds = load_utterances(enrolment / LISTING)
    rows = [replace(sounds[i % 5], speaker=name) for i, name in enumerate(names)]

    def learn(base, adapter, learn, *rest):
        if learn[0].speaker == "ruined":
            torch.linalg.cholesky(-torch.eye(2))
        if learn[0].speaker == "bug":
            raise KeyError("a fault")
        check_adapter_name(adapter)
        inject(base.model, name=adapter, rank=1, target_modules=["head"])

    monkeypatch.setattr(run, "_learn", learn)
    listing = write_manifest(tmp_path / "m.jsonl", rows)
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.safetensors").write_bytes(b"damaged")
    assert adapt(model, listing, tmp_path / "out") == 1
    out, err = capsys.readouterr()
    assert [out.count(w) for w in ("adapted: ", "failed: ")] == [7, 3]
    assert "cannot be decomposed" in out
    assert "Traceback" in err
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"José.safetensors", "李明.safetensors"} < files
    assert len({f.lower() for f in files}) == 8
    assert all(f in out for f in files)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "_learn", full)
    assert adapt(model, listing, tmp_path / "other") == 2


def test_another_base_is_refused_and_overwritten_on_request(model, enrolment, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    write_manifest(tmp_path / "a.jsonl", load_utterances(enrolment / LISTING)[:5])
    assert adapt(model, tmp_path / "a.jsonl", out) == 0
    torch.manual_seed(7)
    save_recogniser(ConformerCTC(**TINY), tmp_path / "other.safetensors")
    assert adapt(tmp_path / "other.safetensors", tmp_path / "a.jsonl", out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert adapt(tmp_path / "other.safetensors", tmp_path / "a.jsonl", out, "--overwrite") == 0


def test_an_adapter_that_does_harm_is_not_kept(model, enrolment, tmp_path, capsys, monkeypatch):
    # Of 5 recordings none would be held out by itself.
    monkeypatch.setattr(run_enrolment, "FEWEST_TO_SPLIT", 5)
    rates = iter([0.9, 0.5])  # after, before
    monkeypatch.setattr(run_enrolment, "_wer", lambda *_: next(rates))
    write_manifest(tmp_path / "a.jsonl", load_utterances(enrolment / LISTING)[:5])
    given = model, tmp_path / "a.jsonl", tmp_path / "a.safetensors", "--held-out", "0.2"
    assert adapt(*given) == 0
    assert not (tmp_path / "a.safetensors").exists()
    table = capsys.readouterr().out
    assert "kept source" in table
    assert "--held-out 0 keeps it" in " ".join(table.split())
    assert "90.0" in table


def test_few_recordings_are_cross_validated(model, enrolment, tmp_path, capsys, monkeypatch):
    """None of 5 is held out for good; each is, once, from an adapter that learnt the others."""
    write_manifest(tmp_path / "a.jsonl", load_utterances(enrolment / LISTING)[:5])
    learnt, judged_on, rates = [], [], [0.5, 0.9]  # before, after

    def compared(base, test, lexicon):
        judged_on.append([u.path.name for u in test])
        return tuple(rates)

    def learn(base, adapter, learn, *rest):
        learnt.append([u.path.name for u in learn])
        inject(base.model, name=adapter, rank=1, target_modules=["head"])

    monkeypatch.setattr(run, "compared", compared)
    monkeypatch.setattr(run, "_learn", learn)
    out = tmp_path / "a.safetensors"
    assert adapt(model, tmp_path / "a.jsonl", out, "--held-out", "0.2") == 0
    assert not out.exists()
    assert "kept source" in capsys.readouterr().out
    assert len(learnt) == 3
    assert sorted(n for names in judged_on for n in names) == sorted(learnt[0] + judged_on[0])
    assert not set(learnt[1]) & set(judged_on[1])
    rates.reverse()
    assert adapt(model, tmp_path / "a.jsonl", out, "--held-out", "0.2") == 0
    assert out.exists()
    assert len(learnt[-1]) == 5
    assert "only 5 recordings" in " ".join(capsys.readouterr().out.split())


def _untranscribed(enrolment, folder, others=True):
    """Boris without transcripts; the others with theirs, or nobody else."""
    sounds = load_utterances(enrolment / LISTING)
    rows = [replace(u, text=None) if u.speaker == "boris" else u for u in sounds]
    rows = [u for u in rows if others or u.speaker == "boris"]
    return write_manifest(folder / "m.jsonl", rows)


def test_a_speaker_without_transcripts_is_learnt_from_the_recordings(enrolment, tmp_path, capsys):
    listing = _untranscribed(enrolment, tmp_path)
    given = ("--steps", "5", "--lexicon", "spoken")
    assert adapt("spoken", listing, tmp_path / "out", *given) == 0
    assert len(list((tmp_path / "out").iterdir())) == 2
    printed = "".join(capsys.readouterr())
    assert re.search("✓ boris: .*round 5:", printed)
    assert "failed" not in printed
    adapted, waveform = load_recogniser("package"), torch.randn(1, 8000)
    source = adapted(waveform)[0]
    load_adapter(adapted, tmp_path / "out" / "boris.safetensors")
    assert not torch.equal(adapted(waveform)[0], source)


def test_transcripts_are_a_canary_on_request(enrolment, tmp_path, capsys, monkeypatch):
    """They are not trained on; an adapter that does harm on them is discarded."""
    texts = []
    real = untranscribed.PseudoTranscriptCallback
    monkeypatch.setattr(
        untranscribed,
        "PseudoTranscriptCallback",
        lambda *a, **k: texts.append(real(*a, **k)) or texts[-1],
    )
    rates = iter([0.9, 0.5])  # after, before
    monkeypatch.setattr(run_enrolment, "_wer", lambda *_: next(rates))
    out = tmp_path / "a.safetensors"
    given = ("--steps", "5", "--untranscribed", "--lexicon", "spoken")
    write_manifest(tmp_path / "a.jsonl", load_utterances(enrolment / LISTING)[:5])
    assert adapt("spoken", tmp_path / "a.jsonl", out, *given) == 0
    assert "kept source" in capsys.readouterr().out
    assert not out.exists()
    assert all(u.text is None for u in texts[0].recordings)


def test_the_guard_keeps_the_source(enrolment, tmp_path, capsys, monkeypatch):
    listing = _untranscribed(enrolment, tmp_path, others=False)
    given = ("--steps", "10", "--learning-rate", "1.0", "--lexicon", "spoken")
    assert adapt("spoken", listing, tmp_path / "out", *given) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "kept source: " in printed
    assert "--no-guard adapts all the same" in printed
    assert not (tmp_path / "out").exists()


def test_a_speaker_of_whom_nothing_is_understood_fails_alone(enrolment, tmp_path, capsys):
    silent = ConformerCTC(**TINY)
    with torch.no_grad():
        silent.head.bias[silent.labels.blank] = 1e3
    save_recogniser(silent, tmp_path / "silent.safetensors")
    listing = _untranscribed(enrolment, tmp_path)
    assert adapt(tmp_path / "silent.safetensors", listing, tmp_path / "out") == 1
    assert "nothing is understood" in " ".join(capsys.readouterr().out.split())
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["anna.safetensors"]


def test_a_lexicon_that_cannot_be_read_is_said_first(model, enrolment, tmp_path, capsys):
    assert adapt(model, enrolment / LISTING, tmp_path / "out", "--lexicon", "nowhere.txt") == 2
    assert "nowhere.txt cannot be read as a lexicon" in capsys.readouterr().err


def test_bad_targets_for_the_output(model, enrolment, tmp_path, capsys):
    assert adapt(model, enrolment / LISTING, tmp_path / "one.safetensors") == 2
    assert "2 speakers need a file each" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    assert adapt(model, enrolment / LISTING, tmp_path / "file") == 2


def test_transcribe_prints_one_line_a_file(model, enrolment, tmp_path, capsys):
    adapt(model, enrolment / LISTING, tmp_path)
    shutil.copy(enrolment / "anna" / "0000.flac", tmp_path / "a.flac")
    (tmp_path / "b.flac").write_bytes(b"no sound")
    capsys.readouterr()
    adapter = str(tmp_path / "anna.safetensors")
    command = ["transcribe", "--model", str(model), "--adapter", adapter]
    assert main([*command, "--json", str(tmp_path / "a.flac"), str(tmp_path / "b.flac")]) == 1
    out, err = capsys.readouterr()
    (row,) = map(json.loads, out.splitlines())
    assert row["path"] == str(tmp_path / "a.flac")
    assert "b.flac" in err
    assert main([*command, "--beam", "4", str(enrolment / LISTING)]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 10
    assert "WER" in err
    # The header knows labels and sample rate; the merged file needs nothing else.
    own = load_recogniser(model)
    assert read_header(adapter)["data"] == {"labels": own.labels.spelt(), "sample_rate": 16000}
    merged = str(tmp_path / "merged.safetensors")
    assert main(["merge", *command[1:], "--out", merged]) == 0
    for file, what in ((adapter, "adapted tensors"), (merged, "of a whole model")):
        assert main(["inspect", file]) == 0
        shown = capsys.readouterr().out
        assert all(text in shown for text in (what, "abcdefg", "16,000 Hz"))
    assert main(["transcribe", "--model", merged, str(enrolment / LISTING)]) == 0
    assert main([*command, str(enrolment / LISTING)]) == 0
    found = capsys.readouterr().out.splitlines()
    assert found[:10] == found[10:]
    rewrite(Path(adapter), lambda t, h: h["data"]["labels"]["symbols"].pop())
    assert main([*command, str(tmp_path / "a.flac")]) == 2
    assert "29 classes, the labels are 28" in "".join(capsys.readouterr().err.splitlines())


def test_a_model_that_does_not_exist(enrolment, tmp_path, capsys):
    assert adapt(tmp_path / "none.safetensors", enrolment / LISTING, tmp_path / "out") == 2
    assert "no recogniser's file" in capsys.readouterr().err
