"""Reports of recognition: lower is better, words are compared, audio is embedded."""

import base64
import csv
import dataclasses
import io
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import soundfile
from rich.console import Console

from lora_lightning.report import audio as listen
from lora_lightning.report import plots
from lora_lightning.report.plots.speech import enrolment_plot, spectrogram_plot, target_plot
from lora_lightning.report.plots.style import STYLE
from lora_lightning.report.results import Prediction, Row, Run, Transcript
from lora_lightning.report.summary import Summary
from lora_lightning.report.word_errors import Piece, compare, errors, telling
from lora_lightning.report.write import print_table, verdict, write_report
from lora_lightning.speech.data.audio import read_audio

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
        notes=[], transcripts=transcripts, read_audio=read_audio,
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
        "parameters. With it, no target is worse than before."
    )


def test_harm_is_named(run):
    run.rows = rows(harm=0.5)
    assert verdict(run).endswith(" With it, 2 of 6 cases are worse than before: boris.")
    assert Summary(run).worse("LoRA, 20 target labels", "source only") == [
        ("boris", 0), ("boris", 1),
    ]  # fmt: skip


def test_accuracy_is_still_better_higher(run):
    run.metric = "accuracy"
    run.rows = [dataclasses.replace(r, metric="accuracy") for r in rows() if r.metric == "WER"]
    assert Summary(run).best() == {"source only"}
    assert "lowers accuracy" in verdict(run)


@pytest.mark.usefixtures("undrawn")
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
    assert not (tmp_path / "out" / "plots" / "spectrograms.svg").exists()


def played(page):
    """The recordings in a page, decoded."""
    found = re.findall(r"data:audio/flac;base64,([^\"]+)", page)
    return [soundfile.read(io.BytesIO(base64.b64decode(text)), dtype="float32") for text in found]


@pytest.mark.parametrize("channels", [1, 2])
def test_sound_of_any_rate_and_channels_is_played_and_drawn(run, tmp_path, channels):
    wave = np.sin(np.arange(44_100) * 2 * np.pi * 440 / 44_100) / 2
    left_and_right = np.stack([wave, 0 * wave], axis=1)
    path = tmp_path / "studio.wav"
    soundfile.write(path, left_and_right[:, :channels], 44_100, subtype="PCM_24")
    run.transcripts = [dataclasses.replace(run.transcripts[0], audio=str(path))]
    [(samples, rate)] = played(listen.section(run))
    assert rate == 16_000
    assert samples.shape == (16_000,)
    # The mean of both channels, still at 440 Hz.
    assert np.abs(samples[2000:-2000]).max() == pytest.approx(0.5 / channels, abs=0.01)
    assert np.abs(np.fft.rfft(samples)).argmax() == 440
    assert spectrogram_plot(run) is not None


def test_a_tone_is_drawn_at_its_frequency(run, tmp_path):
    soundfile.write(tmp_path / "tone.wav", np.sin(np.arange(16_000) * np.pi / 8) / 2, 16_000)
    run.transcripts = [dataclasses.replace(run.transcripts[0], audio=str(tmp_path / "tone.wav"))]
    figure, _ = spectrogram_plot(run)
    axes = figure.axes[0]
    [image] = axes.get_images()
    loudest = np.asarray(image.get_array()).mean(axis=1).argmax()
    _, _, bottom, top = image.get_extent()
    height = bottom + (loudest + 0.5) / image.get_array().shape[0] * (top - bottom)
    ticks = dict(
        zip((t.get_text() for t in axes.get_yticklabels()), axes.get_yticks(), strict=True)
    )
    assert height == pytest.approx(ticks["1"], abs=(top - bottom) / 60)  # the tone has 1 kHz


@pytest.mark.parametrize("word", ["WORMWOOD ", "i ", "$m$ "])
def test_long_sentences_fit_the_picture(run, word):
    said = 60 * word
    run.transcripts = [dataclasses.replace(run.transcripts[0], reference=said, source=said + "x")]
    with matplotlib.rc_context(STYLE):
        figure, _ = spectrogram_plot(run)
        figure.savefig(io.BytesIO())
    [axes] = figure.axes
    assert axes.get_position().width > 0.9  # the sentences do not push the picture aside
    for text in (axes._left_title, *axes.texts):
        assert text.get_window_extent().x1 <= figure.bbox.x1
    assert any("(1 wrong)" in text.get_text() for text in axes.texts)


def test_a_recording_too_short_to_draw_is_left_out(run, tmp_path):
    soundfile.write(tmp_path / "click.wav", np.ones(200) / 2, 16_000)
    run.transcripts = [dataclasses.replace(run.transcripts[0], audio=str(tmp_path / "click.wav"))]
    assert spectrogram_plot(run) is None
    assert len(played(listen.section(run))) == 1


def test_long_recordings_do_not_swell_the_page(run, tmp_path, monkeypatch):
    one = len(listen.section(dataclasses.replace(run, transcripts=run.transcripts[:1])))
    monkeypatch.setattr(listen, "MOST_CHARACTERS", 3 * one)
    assert 2 <= len(played(listen.section(run))) <= 3


def test_a_method_that_gave_no_value_is_left_out_of_the_plots(run):
    lost = "full, 5 target labels"
    run.rows = [dataclasses.replace(r, value=np.nan) if r.method == lost else r for r in run.rows]
    figure, _ = enrolment_plot(run)
    sizes = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].get_lines()}
    assert sizes["full"] == [20, 100]
    assert sizes["LoRA"] == [5, 20, 100]


def test_targets_that_are_not_drawn_are_owned_up_to(run):
    run.rows = [
        Row(m, f"v{i:02}", 0, "WER", 0.5 - i / 1000, 0, 0.0, None, n)
        for m, n in (("source only", None), ("LoRA, 5 target labels", 5))
        for i in range(41)
    ]
    figure, caption = target_plot(run)
    assert len(figure.axes[0].get_yticks()) == 40
    assert "Only the 40 worst" in caption
    assert figure.axes[0].get_yticklabels()[0].get_text() == "v00"


@pytest.mark.usefixtures("undrawn")
def test_a_run_with_predictions_as_well_writes_both(run, tmp_path):
    run.predictions = [Prediction("a.wav", "anna", "yes", "no", 0.5, "yes", 0.5, 0)]
    write_report(run, tmp_path / "out")
    assert (tmp_path / "out" / "predictions.csv").exists()
    assert (tmp_path / "out" / "transcripts.csv").exists()


@pytest.mark.usefixtures("undrawn")
def test_files_of_a_speech_run(run, tmp_path):
    write_report(run, tmp_path / "out")
    found = list(csv.DictReader(io.StringIO((tmp_path / "out" / "transcripts.csv").read_text())))
    assert len(found) == 12
    assert found[0]["reference"] == "one two <b>"
    counts = [found[0][name] for name in ("words", "source_errors", "adapted_errors")]
    assert counts == ["3", "2", "0"]
    assert not (tmp_path / "out" / "predictions.csv").exists()
    assert '"items": 20' in (tmp_path / "out" / "results.json").read_text()


def test_the_table_fits_80_columns(run):
    out = io.StringIO()
    print_table(run, Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("target labels" in line for line in lines) >= 6
