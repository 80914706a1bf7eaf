"""Recognition: errors against the size of the enrolment, errors by target, spectrograms."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from lora_lightning.report.metrics import shorten
from lora_lightning.report.plots.style import (
    COLOURS,
    INK,
    QUIET,
    RIGHT,
    WRONG,
    Drawing,
    colour,
    look,
    plot,
)
from lora_lightning.report.results import Run, Transcript
from lora_lightning.report.summary import Summary
from lora_lightning.report.word_errors import SAMPLE_RATE, errors, sound, telling

MOST_TARGETS = 40
WINDOW, BANDS = 512, 80  # samples of a Fourier transform, bands of the spectrogram
ROOM = 560  # points that a line of text may take; hinting makes it wider than measured
TICKS = (0.5, 1, 2, 4, 8)  # kHz


@plot("enrolment", "How much labelled speech does it take?")
def enrolment_plot(run: Run) -> Drawing | None:
    """The metric against the number of labelled items, a line for each kind of method."""
    summary = Summary(run)
    sizes = sorted({n for m in summary.methods if (n := summary.items(m)) is not None})
    if len(sizes) < 2:
        return None
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=True, axis="y")
    axes.set_xscale("log")
    families = list(dict.fromkeys(_family(m) for m in summary.methods if summary.items(m)))
    for i, family in enumerate(families, 1):
        _family_line(axes, summary, family, i)
    for method in summary.methods:
        cell = summary.target(method)
        if summary.items(method) is None and not math.isnan(cell.mean):
            axes.axhline(100 * cell.mean, color=colour(0), linestyle="--", linewidth=1.2)
            place = (0.995, 100 * cell.mean)
            where = ("axes fraction", "data")
            axes.annotate(method, place, xycoords=where, ha="right", va="bottom", color=QUIET)
    axes.set_ylim(bottom=0)
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.minorticks_off()
    axes.set_xlabel("labelled items of the target")
    axes.set_ylabel(f"{run.metric} (%)")
    axes.legend(frameon=False, loc="lower left")
    return figure, (
        "Mean over the targets; the band holds the middle half of targets and seeds. "
        f"{'Lower' if summary.lower else 'Higher'} is better."
    )


def _family_line(axes: Axes, summary: Summary, family: str, i: int) -> None:
    measured = [m for m in summary.methods if _family(m) == family and _finite(summary, m)]
    points = sorted((n, m) for m in measured if (n := summary.items(m)))
    if not points:
        return
    sizes, methods = zip(*points, strict=True)
    values = [_finite(summary, m) for m in methods]
    low, high = (np.array([np.percentile(v, q) for v in values]) for q in (25, 75))
    means = [100 * summary.target(m).mean for m in methods]
    axes.fill_between(sizes, low, high, color=colour(i), alpha=0.15, linewidth=0)
    axes.plot(sizes, means, label=family, **look(i))


def _finite(summary: Summary, method: str) -> list[float]:
    """Percent of every target and seed that has a value."""
    return [100 * v for v in summary.each(method) if math.isfinite(v)]


def _family(method: str) -> str:
    """The name of a method without the size: "LoRA" for "LoRA, 20 target labels"."""
    return method.partition(",")[0]


@plot("targets", "Who gains, and how much?")
def target_plot(run: Run) -> Drawing | None:
    """The metric of each target: before, with the adapter, with all weights."""
    summary = Summary(run)
    shown, thin = summary.headline_methods(), summary.closed_forms()
    if len(shown) > len(COLOURS):  # they are in the table
        shown = [m for m in shown if m not in thin]
    if not summary.apart or not summary.targets or len(shown) < 2:
        return None
    scale = summary.unit.scale
    targets = sorted(summary.targets, key=lambda d: -_mean(summary, shown[0], d))[:MOST_TARGETS]
    figure = Figure(figsize=(9, 1.2 + 0.36 * len(targets)), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=True, axis="x")
    for i, method in enumerate(shown):
        cells = [summary.cell(method, [d]) for d in targets]
        x, error = (scale * np.array([getattr(c, n) for c in cells]) for n in ("mean", "sd"))
        y = np.arange(len(targets)) + 0.1 * (i - (len(shown) - 1) / 2)
        axes.errorbar(x, y, xerr=np.nan_to_num(error), label=method, linestyle="", **look(i))
    for line, domain in enumerate(targets):
        ends = [scale * _mean(summary, m, domain) for m in (shown[0], shown[1])]
        axes.plot(ends, [line, line], color=QUIET, linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(targets)), [shorten(d, 30) for d in targets])
    axes.set_ylim(len(targets) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{run.metric} ({summary.unit.name})")
    figure.legend(loc="outside upper left", ncols=3, frameon=False, handletextpad=0.2)
    some = f" Only the {MOST_TARGETS} worst are shown." * (len(summary.targets) > MOST_TARGETS)
    return figure, f"One line a target; further left is better.{summary.bars()}{some}"


def _mean(summary: Summary, method: str, domain: str) -> float:
    return summary.cell(method, [domain]).mean


@plot("spectrograms", "What does it look like?")
def spectrogram_plot(run: Run) -> Drawing | None:
    """Spectrograms of some recordings, with the transcripts before and after."""
    drawn = ((t, _spectrogram(t, run)) for t in telling(run.heard(), 4))
    found = [(t, image) for t, image in drawn if image is not None]
    if not found:
        return None
    figure = Figure(figsize=(9, 2.5 * len(found)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)  # type: ignore[union-attr, call-arg]
    grid = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    for axes, (t, (decibels, seconds)) in zip(grid, found, strict=True):
        extent = (0.0, seconds, 0.0, _mel(SAMPLE_RATE / 2000))
        # Smoothed, the image would take several times the bytes, and show no more.
        axes.imshow(
            decibels, origin="lower", aspect="auto", extent=extent, cmap="magma",
            interpolation="nearest",
        )  # fmt: skip
        axes.set_yticks([_mel(k) for k in TICKS], [f"{k:g}" for k in TICKS])
        axes.set_title(_fitted(f"{t.domain}: {t.reference}", 10.5, "bold"))
        axes.set_ylabel("kHz")
        lines = [_line("before", t.reference, t.source), _line("after", t.reference, t.adapted)]
        for k, (text, right) in enumerate(lines):
            axes.text(
                0, -0.24 - 0.16 * k, text, transform=axes.transAxes, va="top", fontsize=9,
                color=RIGHT if right else WRONG,
            )  # fmt: skip
        axes.set_xlabel("s", loc="right", labelpad=-2, color=INK)
    return figure, (
        "Energy by frequency over time, brighter is louder; the title is what was said. Green: all "
        "words are right; red, with the number of wrong words: they are not."
    )


def _line(name: str, reference: str, heard: str) -> tuple[str, bool]:
    wrong = errors(reference, heard)
    count = f" ({wrong} wrong)" if wrong else ""
    return _fitted(f"{name}{count}: {heard or '(nothing)'}", 9), not wrong


def _fitted(text: str, size: float, weight: str = "normal") -> str:
    """The part of a line that fits the plot: capitals take more of it."""
    properties = FontProperties(size=size, weight=weight)
    width = TextPath((0, 0), text, prop=properties).get_extents().width
    return text if width <= ROOM else shorten(text, int(0.97 * len(text) * ROOM / width))


def _spectrogram(t: Transcript, run: Run) -> tuple[np.ndarray, float] | None:
    """Decibels (mel band, time) and the length in seconds; nothing for what cannot be drawn."""
    from torchaudio.transforms import AmplitudeToDB, MelSpectrogram

    waveform = sound(t, run)
    if waveform is None or len(waveform) < WINDOW:
        return None
    power = MelSpectrogram(SAMPLE_RATE, WINDOW, hop_length=160, n_mels=BANDS)(waveform)
    return AmplitudeToDB("power", top_db=70)(power).numpy(), len(waveform) / SAMPLE_RATE


def _mel(kilohertz: float) -> float:
    """A frequency on torchaudio's mel scale (O'Shaughnessy's)."""
    return 2595 * math.log10(1 + kilohertz / 0.7)
