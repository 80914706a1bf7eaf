"""Manifests, the layouts of known corpora, and plain folders."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lora_lightning.errors import ConfigError, DataError, DataNotFoundError
from lora_lightning.speech.data.manifests import load_utterances, write_manifest
from lora_lightning.speech.data.utterances import Utterance


def write(path, text="", encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def facts(utterances, root):
    return [(str(u.path.relative_to(root)), u.text, u.speaker) for u in utterances]


def librispeech(root):
    write(root / "84/121123/84-121123.trans.txt", "84-121123-0000 GO DO\r\n84-121123-0001 A\n\n")
    write(root / "26/495/26-495.trans.txt", "26-495-0000 HELLO")
    write(root / "26/495/._26-495.trans.txt", "x")
    write(root / ".old/26/495/26-495.trans.txt", "26-495-0000 HELLO")
    return [
        ("26/495/26-495-0000.flac", "HELLO", "26"),
        ("84/121123/84-121123-0000.flac", "GO DO", "84"),
        ("84/121123/84-121123-0001.flac", "A", "84"),
    ]


def commonvoice(root):
    header = "client_id\tpath\tsentence\tup_votes\n"
    write(root / "validated.tsv", header + 'b1\tb.mp3\t"Hello," he said\t2\nb1\ta.mp3\tIt\'s\t2\n')
    write(root / "train.tsv", header + "c\tc.mp3\tNo\t2\n")
    write(root / "clips/a.mp3")
    write(root / "clips/b.mp3")
    return [("clips/b.mp3", '"Hello," he said', "b1"), ("clips/a.mp3", "It's", "b1")]


def vctk(root):
    for name in ("p225_001_mic1", "p225_001_mic2", "p225_002_mic2"):
        write(root / f"wav48_silence_trimmed/p225/{name}.flac")
    write(root / "wav48_silence_trimmed/p315/p315_001.wav")
    write(root / "wav48_silence_trimmed/log.txt")
    write(root / "txt/p225/p225_001.txt", "Please call Stella.\n")
    write(root / "txt/p225/p225_002.txt", "Ask her.\n")
    return [
        ("wav48_silence_trimmed/p225/p225_001_mic1.flac", "Please call Stella.", "p225"),
        ("wav48_silence_trimmed/p225/p225_002_mic2.flac", "Ask her.", "p225"),
        ("wav48_silence_trimmed/p315/p315_001.wav", None, "p315"),
    ]


def folder(root):
    for name in ("ann/x.WAV", "ann/deep/y.flac", "top.ogg", ".hidden/z.wav", "ann/.z.wav"):
        write(root / name)
    write(root / "ann/x.txt", "\ufeffTwo\n lines ")
    write(root / "notes.txt", "none")
    return [
        ("ann/deep/y.flac", None, "ann"),
        ("ann/x.WAV", "Two lines", "ann"),
        ("top.ogg", None, None),
    ]


@pytest.mark.parametrize("layout", [librispeech, commonvoice, vctk, folder])
def test_layouts_are_found_and_can_be_forced(tmp_path, layout):
    expected = layout(tmp_path)
    assert facts(load_utterances(tmp_path), tmp_path) == expected
    assert facts(load_utterances(str(tmp_path), layout.__name__), tmp_path) == expected
    assert all(math.isnan(u.seconds) for u in load_utterances(tmp_path))


def test_a_folder_above_librispeech_parts(tmp_path):
    expected = librispeech(tmp_path / "LibriSpeech/dev-clean")
    assert facts(load_utterances(tmp_path), tmp_path / "LibriSpeech/dev-clean") == expected


def test_one_part_of_common_voice(tmp_path):
    commonvoice(tmp_path)
    expected = [("clips/c.mp3", "No", "c")]
    train = tmp_path / "train.tsv"
    assert facts(load_utterances(train, "commonvoice"), tmp_path) == expected
    write(tmp_path / "clips/c.mp3")
    assert facts(load_utterances(train), tmp_path) == expected
    (tmp_path / "validated.tsv").unlink()
    assert facts(load_utterances(tmp_path), tmp_path) == expected


def test_nothing_found_names_what_was_looked_for(tmp_path):
    write(tmp_path / "notes.md")
    with pytest.raises(DataError) as found:
        load_utterances(tmp_path)
    for part in (".jsonl", "*.trans.txt", "clips/", "wav48*", ".flac", str(tmp_path)):
        assert part in str(found.value)
    with pytest.raises(DataError, match=r"looked for\n  vctk: wav48") as found:
        load_utterances(tmp_path, "vctk")
    assert "clips" not in str(found.value)
    with pytest.raises(DataError, match=r"no recordings in .*notes.md"):
        load_utterances(tmp_path / "notes.md")
    with pytest.raises(DataError, match="looked for\n  manifest"):
        load_utterances(tmp_path, "manifest")
    with pytest.raises(DataNotFoundError, match=r"no file or folder .*gone"):
        load_utterances(tmp_path / "gone")
    with pytest.raises(ConfigError, match="unknown layout 'libri'; did you mean 'librispeech'"):
        load_utterances(tmp_path, "libri")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv(tmp_path, encoding):
    text = 'path,text,speaker,domain,target,duration\r\na.wav,"Hé, ""you""",ann,office,3,9\r\n\r\n'
    text += "/abs/b.wav,,,,-0.5,x\r\n"
    a, b = load_utterances(write(tmp_path / "m.csv", text, encoding))
    assert (a.path, a.text, a.speaker) == (tmp_path / "a.wav", 'Hé, "you"', "ann")
    assert (a.domain, a.target) == ("office", 3.0)
    assert (b.path, b.text, b.speaker, b.domain, b.target) == (
        Path("/abs/b.wav"), None, None, None, -0.5,
    )  # fmt: skip
    assert math.isnan(a.seconds)


@pytest.mark.parametrize(
    ("path", "text", "speaker", "target"),
    [
        ("path", "text", "speaker", "target"),
        ("audio", "transcript", "speaker_id", "label"),
        ("file", "sentence", "client_id", "label"),
        ("audio_filepath", "text", "speaker", "target"),
    ],
)
def test_names_of_columns(tmp_path, path, text, speaker, target):
    cells = {path: "a.wav", text: "yes", speaker: "s1", target: "up", "other": "?"}
    expected = Utterance(tmp_path / "a.wav", "yes", "s1", None, "up")
    tsv = "\t".join(cells) + "\n" + "\t".join(cells.values()) + "\n"
    for name, content in (("m.tsv", tsv), ("m.jsonl", json.dumps(cells))):
        (found,) = load_utterances(write(tmp_path / name, content))
        assert found == Utterance(**{**vars(expected), "seconds": found.seconds})


def test_targets_are_numbers_if_all_are(tmp_path):
    def targets(column, *cells):
        rows = [f"{column},path", *(f"{cell},x.wav" for cell in cells)]
        return [u.target for u in load_utterances(write(tmp_path / "m.csv", "\n".join(rows)))]

    assert targets("target", "1", "", "2.5") == [1.0, None, 2.5]
    assert targets("target", "1", "two") == ["1", "two"]
    assert targets("label", "1", "2") == ["1", "2"]  # a label is a class


def test_a_line_separator_within_a_text(tmp_path):
    path = write(tmp_path / "m.jsonl", json.dumps({"path": "a"}, ensure_ascii=False) + "\n")
    write(path, '{"path": "a.wav", "text": "one\u2028line", "speaker": 7}\n\n')
    (found,) = load_utterances(path)
    assert (found.text, found.speaker) == ("one\u2028line", "7")


WRONG = {
    "latin.csv": ("path,text\na.wav,ok\nb.wav,\xe9\n", "line 3: not UTF-8"),
    "cells.csv": ("path,text\na.wav,x,y\n", "line 2: 3 cells, but 2 columns"),
    "few.tsv": ("path\ttext\na.wav\tx\nb.wav\n", "line 3: 1 cells, but 2 columns"),
    "quote.csv": ('path,text\na.wav,"x"y\n', "line 2: "),
    "header.csv": ("wav,text\na.wav,x\n", "no column 'path' or .*, only 'wav' or 'text'"),
    "none.csv": ("", "no column 'path'"),
    "rows.csv": ("path,text\n", "has no rows"),
    "path.csv": ("path,text\n,x\n", "line 2: no file"),
    "json.jsonl": ('{"path": "a.wav"}\n{"path": \n', "line 2: not JSON"),
    "list.jsonl": ('["a.wav"]\n', "line 1: expected an object"),
    "empty.jsonl": ("\n", "has no rows"),
    "nopath.jsonl": ('{"text": "x"}', "line 1: no file"),
    "number.jsonl": ('{"path": 3}', "line 1: no file"),
    "nul.jsonl": ('{"path": "a\\u0000"}', "line 1: no file"),
    "text.jsonl": ('{"path": "a", "text": ["x"]}', "line 1: 'text' or .* must be text"),
    "deep.jsonl": ('{"path": ' + 100_000 * "[", "line 1: not JSON"),
    "bool.jsonl": ('{"path": "a", "target": true}', "line 1: 'target' must be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_lines_are_named(tmp_path, name):
    text, reason = WRONG[name]
    path = write(tmp_path / name, text, "latin-1")
    with pytest.raises(DataError, match=f"{name}.*{reason}"):
        load_utterances(path)


def test_wrong_texts_of_corpora(tmp_path):
    listing = write(tmp_path / "a/1/2/1-2.trans.txt", "1-2-0000 YES\n1-2-0001\n")
    with pytest.raises(DataError, match=r"trans.txt, line 2: expected '<name> <TEXT>'"):
        load_utterances(tmp_path)
    listing.unlink()
    write(tmp_path / "a/x.wav")
    write(tmp_path / "a/x.txt", "one\ntwo \xe9", "latin-1")
    with pytest.raises(DataError, match=r"x.txt, line 2: not UTF-8"):
        load_utterances(tmp_path)


def test_round_trip(tmp_path):
    items = [
        Utterance(tmp_path / "sub/a b.wav", 'He said "é\n"\t', "s,1", "d", "up", 1.25),
        Utterance(Path("/elsewhere/b.wav"), "", None, None, -0.1, 1 / 3),
        Utterance(tmp_path / "up/../c.wav", None, target=float("inf"), seconds=2.0),
        Utterance(tmp_path / "odd\udcff.wav", seconds=1.0),
    ]
    path = write_manifest(tmp_path / "sub/more/m.jsonl", items)
    assert load_utterances(path) == items
    path = write_manifest(tmp_path / "m.jsonl", items)
    assert load_utterances(path) == items
    assert json.loads(path.read_text().splitlines()[0])["path"] == "sub/a b.wav"
    write_manifest(path, [Utterance(tmp_path / "x.wav")])
    assert "seconds" not in path.read_text()
    with pytest.raises(ConfigError, match=r"name it \*\.jsonl, got m\.csv"):
        write_manifest(tmp_path / "m.csv", items)


def test_a_relative_manifest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    items = [Utterance(Path("audio/a.wav"), seconds=1.0)]
    assert load_utterances(write_manifest("m.jsonl", items)) == items
    (moved,) = load_utterances(write_manifest("other/m.jsonl", items))
    assert moved.path == tmp_path / "audio/a.wav"


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = write_manifest(tmp_path / "m.jsonl", [Utterance(tmp_path / "a.wav")])
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_manifest(path, [Utterance(tmp_path / "b.wav")])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]
