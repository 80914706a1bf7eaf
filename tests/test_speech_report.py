"""Reports of recognition: errors are better lower, words are compared, sound is embedded."""

import csv
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rich.console import Console

from lora_lightning import plots
from lora_lightning.report import print_table, verdict, write_report
from lora_lightning.results import Row, Run, Summary, Transcript
from lora_lightning.transcripts import Piece, compare, errors, telling

SIZES = (5, 20, 100)
VOICES = ("anna", "boris", "carla")
WER = {"LoRA": {5: 0.4, 20: 0.2, 100: 0.1}, "full": {5: 0.38, 20: 0.19, 100: 0.09}}


def rows(harm=0.0):
    found = []
    for seed in (0, 1):
        for i, voice in enumerate(VOICES):
            found.append(Row("source only", voice, seed, "WER", 0.5 + 0.1 * i, 0, 0.0))
            found.append(Row("source only", voice, seed, "CER", 0.2, 0, 0.0))
            for kind, parameters in (("LoRA", 30_000), ("full", 1_000_000)):
                for n in SIZES:
                    value = WER[kind][n] + (harm if voice == "boris" and kind == "LoRA" else 0)
                    method = f"{kind}, {n} target labels"
                    found.append(
                        Row(method, voice, seed, "WER", value, parameters, 3.0, 140_000, n)
                    )
    return found


@pytest.fixture
def run(tmp_path):
    wave = np.sin(np.arange(12_000) / 9).astype(np.float32) / 2
    transcripts = []
    for voice in VOICES:
        for i in range(4):
            path = tmp_path / f"{voice}{i}.wav"
            soundfile.write(path, wave, 16_000)
            transcripts.append(
                Transcript(path.name, voice, "one two <b>", "won two", "one two <b>", 0, str(path))
            )
    return Run(
        name="speaker", title="Voices", metric="WER", rows=rows(), predictions=[], classes=[],
        spectra={}, config={"headline": 20}, data_root=Path("x"), versions={}, skipped=[],
        notes=[], transcripts=transcripts,
    )  # fmt: skip


def test_words_are_compared():
    assert compare("a b c d", "a x c d e") == [
        Piece("equal", "a", "a"),
        Piece("substitute", "b", "x"),
        Piece("equal", "c d", "c d"),
        Piece("insert", "", "e"),
    ]
    assert compare("a b", "b") == [Piece("delete", "a", ""), Piece("equal", "b", "b")]
    assert compare("", "a b") == [Piece("insert", "", "a b")]
    assert compare("", "") == []
    assert [errors(*pair) for pair in (("a b", ""), ("a b", "a b"), ("", "a b"))] == [2, 0, 2]


def test_telling_recordings_come_from_each_domain_and_the_worst_is_last():
    def one(domain, adapted, audio="x.wav"):
        return Transcript("i", domain, "a b c", "x y z", adapted, 0, audio)

    best, good, second = one("p", "a b c"), one("q", "a b z"), one("p", "a b c")
    worst, silent = one("q", "x y z w"), one("r", "a b c", None)
    found = telling([worst, silent, good, best, second], 4)
    assert found == [best, good, second, worst] or found == [good, best, second, worst]
    assert telling([], 4) == []


def test_lower_is_better(run):
    summary = Summary(run)
    assert summary.lower
    assert summary.best() == {"full, 100 target labels", "source only"}
    assert summary.headline_methods() == [
        "source only", "LoRA, 20 target labels", "full, 20 target labels",
    ]  # fmt: skip
    assert verdict(run) == (
        "On the target, LoRA with 20 target labels lowers WER from 60.0 % to 20.0 %, 67 % fewer "
        "errors (mean of 2 seeds), 1.0 point above full fine-tuning, with 3.0 % of its trainable "
        "parameters. No target is worse than before."
    )


def test_harm_is_named(run):
    run.rows = rows(harm=0.5)
    assert verdict(run).endswith(" Worse than before in 2 of 6 cases: boris.")
    assert Summary(run).worse("LoRA, 20 target labels", "source only") == [
        ("boris", 0), ("boris", 1),
    ]  # fmt: skip


def test_accuracy_is_still_better_higher(run):
    run.metric = "accuracy"
    run.rows = [dataclasses.replace(r, metric="accuracy") for r in rows() if r.metric == "WER"]
    assert Summary(run).best() == {"source only"}
    assert "lowers accuracy" in verdict(run)


def test_the_page_can_be_listened_to(run, tmp_path):
    write_report(run, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<audio controls") == 8
    assert page.count("data:audio/flac;base64,") == 8
    assert "<mark" in page
    assert "<del>&lt;b&gt;</del>" in page  # what a user said is no markup
    assert "<b>" not in page.replace("<b>anna</b>", "").replace("<b>boris</b>", "").replace(
        "<b>carla</b>", ""
    )
    assert "media-src data:" in page
    assert "lower is better" in page
    assert len(page) < 3_000_000


def test_the_plots_of_a_speech_run(run):
    assert [p.name for p in plots.draw(run)] == ["enrolment", "targets", "spectrograms"]


def test_sound_that_is_gone_is_left_out(run, tmp_path):
    for transcript in run.transcripts:
        transcript.audio = str(tmp_path / "gone.wav")
    write_report(run, tmp_path / "out")
    assert "<audio" not in (tmp_path / "out" / "report.html").read_text()
    assert not (tmp_path / "out" / "plots" / "spectrograms.png").exists()


def test_files_of_a_speech_run(run, tmp_path):
    write_report(run, tmp_path / "out")
    found = list(csv.DictReader(io.StringIO((tmp_path / "out" / "transcripts.csv").read_text())))
    assert len(found) == 12
    assert found[0]["reference"] == "one two <b>"
    assert not (tmp_path / "out" / "predictions.csv").exists()
    assert '"items": 20' in (tmp_path / "out" / "results.json").read_text()


def test_the_table_fits_80_columns(run):
    out = io.StringIO()
    print_table(run, Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("target labels" in line for line in lines) >= 6
