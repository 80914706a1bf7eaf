"""Spoken sets: determinism, disjoint voices, the checked cache."""

import json
import sys

import numpy as np
import pytest
import soundfile

from lora_lightning.errors import ConfigError, DataError, MissingDependencyError
from lora_lightning.speech.data.manifests import load_utterances
from lora_lightning.speech.data.synthetic import spoken
from lora_lightning.speech.data.synthetic.espeak import Voice, speak, speak_all
from lora_lightning.speech.data.synthetic.phrases import phrases
from lora_lightning.speech.data.synthetic.spoken import spoken_set
from lora_lightning.speech.data.synthetic.voices import MOST_SOURCES, source_voices, target_voices

TWO = {"anna": Voice("en-us", "f2"), "boris": Voice("de", "whisper", rate=150)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("spoken") / "set"
    return spoken_set(root, speakers=TWO, utterances=3, progress=False)


def test_the_set_is_a_manifest_of_readable_files(folder):
    found = load_utterances(folder / "utterances.jsonl")
    assert [u.speaker for u in found] == ["anna"] * 3 + ["boris"] * 3
    assert len({u.text for u in found}) > 3
    for utterance in found:
        samples, rate = soundfile.read(utterance.path)
        assert rate == 16000
        assert 0.5 < len(samples) / rate < 10
        assert 0.05 < np.abs(samples).max() <= 1


def test_the_same_settings_give_the_same_bytes(folder, tmp_path):
    again = spoken_set(tmp_path / "again", speakers=TWO, utterances=3, progress=False)
    for path in folder.rglob("*.flac"):
        assert path.read_bytes() == (again / path.relative_to(folder)).read_bytes()


def test_a_complete_set_is_reused_and_a_damaged_one_made_anew(folder, monkeypatch):
    victim = folder / "anna" / "0001.flac"
    whole = victim.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(spoken, "speak_all", None)  # speaking would fail
        assert spoken_set(folder, speakers=TWO, utterances=3) == folder
    victim.write_bytes(whole[:-1])
    spoken_set(folder, speakers=TWO, utterances=3, progress=False)
    assert victim.read_bytes() == whole


def test_another_seed_gives_other_sentences(folder, tmp_path):
    other = spoken_set(tmp_path / "o", speakers=TWO, utterances=3, seed=1, progress=False)
    texts = [{u.text for u in load_utterances(f / spoken.LISTING)} for f in (folder, other)]
    assert not texts[0] & texts[1]


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="thesis"):
        spoken_set(tmp_path, speakers=TWO, utterances=1)
    assert (tmp_path / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speakers": {}}, "speakers is empty"),
        ({"speakers": {"a/b": Voice("en")}}, "becomes a folder"),
        ({"utterances": 0}, "utterances must be a whole number of at least 1, got 0"),
        ({"sample_rate": 100}, "sample_rate must be a whole number of at least 4000, got 100"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_settings_are_checked_first(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        spoken_set(tmp_path / "s", **{"speakers": TWO, "utterances": 1, **settings})
    assert not (tmp_path / "s").exists()


def test_voices_are_named_and_in_range():
    with pytest.raises(ConfigError, match=r"no voice 'en-us\+nobody'"):
        speak("one", Voice("en-us", "nobody"))
    with pytest.raises(ConfigError, match="no voice 'xx'"):
        next(speak_all([("one", Voice("xx"))]))
    with pytest.raises(ConfigError, match="pitch of a voice must lie in 0 to 100, got 101"):
        Voice("en", pitch=101)


def test_a_caller_may_stop_early():
    many = speak_all([("one two three", Voice("en-us"))] * 200)
    samples, rate = next(many)
    assert len(samples) > rate / 2
    many.close()  # the other process ends with it


def test_no_voice_and_no_timbre_is_on_both_sides():
    sources, targets = source_voices(MOST_SOURCES), target_voices()
    assert len(targets) >= 8
    assert len({v.espeak_name for v in sources.values()}) == MOST_SOURCES
    assert not {v.language for v in sources.values()} & {v.language for v in targets.values()}
    assert not {v.variant for v in sources.values()} & {v.variant for v in targets.values()}


def test_voices_by_name():
    assert list(target_voices(["dutch"])) == ["dutch"]
    with pytest.raises(ConfigError, match="did you mean 'dutch'"):
        target_voices(["duthc"])
    with pytest.raises(ConfigError, match=f"1 to {MOST_SOURCES} source voices, got 0"):
        source_voices(0)


def test_every_voice_speaks():
    jobs = [("seven", v) for v in (*source_voices(41).values(), *target_voices().values())]
    for (_, voice), (samples, _) in zip(jobs, speak_all(jobs), strict=True):
        assert np.abs(samples).max() > 1000, voice


def test_phrases_differ_and_are_lower_case():
    found = phrases(500, np.random.default_rng(0))
    assert len(set(found)) == 500
    assert all(set(p) <= set("abcdefghijklmnopqrstuvwxyz ") for p in found)
    words = {w for p in found for w in p.split()}
    assert {"zero", "kitchen", "anna", "forty"} <= words
    assert len(words) < 80


def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch):
    from lora_lightning.speech.data.synthetic import espeak

    espeak._library.cache_clear()
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "lora-lightning\[demo\]"'):
        speak("one", Voice("en"))
    espeak._library.cache_clear()


def test_the_manifest_tells_how_it_was_made(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["settings"]["speakers"]["boris"]["variant"] == "whisper"
    assert "espeakng-loader" in manifest["versions"]
