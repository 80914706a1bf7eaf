"""Recognition: errors against the size of the enrolment, errors by target, spectrograms."""

from __future__ import annotations

import math
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lightning.plots.style import INK, QUIET, RIGHT, WRONG, colour, look
from lora_lightning.results import Run, Summary, Transcript
from lora_lightning.transcripts import errors, telling
from lora_lightning.wording import shorten

Drawing = tuple[Figure, str]


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
        f"{_direction(summary)} is better."
    )


def _family_line(axes: Axes, summary: Summary, family: str, i: int) -> None:
    points = [(n, m) for m in summary.methods if _family(m) == family and (n := summary.items(m))]
    sizes, methods = zip(*sorted(points), strict=True)
    values = [100 * np.array(summary.each(m)) for m in methods]
    low, high = (np.array([np.nanpercentile(v, q) for v in values]) for q in (25, 75))
    means = [100 * summary.target(m).mean for m in methods]
    axes.fill_between(sizes, low, high, color=colour(i), alpha=0.15, linewidth=0)
    axes.plot(sizes, means, label=family, **look(i))


def _family(method: str) -> str:
    """The name of a method without the size: "LoRA" for "LoRA, 20 target labels"."""
    return method.partition(",")[0]


def target_plot(run: Run) -> Drawing | None:
    """The metric of each target: before, with the adapter, with all weights."""
    summary = Summary(run)
    shown = summary.headline_methods()
    if not summary.lower or not summary.targets or len(shown) < 2:
        return None
    targets = sorted(summary.targets, key=lambda d: -_mean(summary, shown[0], d))[:40]
    figure = Figure(figsize=(9, 1.2 + 0.36 * len(targets)), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=True, axis="x")
    for i, method in enumerate(shown):
        cells = [summary.cell(method, [d]) for d in targets]
        x, error = (100 * np.array([getattr(c, n) for c in cells]) for n in ("mean", "sd"))
        y = np.arange(len(targets)) + 0.1 * (i - (len(shown) - 1) / 2)
        axes.errorbar(x, y, xerr=np.nan_to_num(error), label=method, linestyle="", **look(i))
    for line, domain in enumerate(targets):
        ends = [100 * _mean(summary, m, domain) for m in (shown[0], shown[1])]
        axes.plot(ends, [line, line], color=QUIET, linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(targets)), [shorten(d, 30) for d in targets])
    axes.set_ylim(len(targets) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{run.metric} (%)")
    figure.legend(loc="outside upper left", ncols=3, frameon=False, handletextpad=0.2)
    spread = f" Bars: standard deviation over {summary.seeds} seeds." if summary.seeds > 1 else ""
    return figure, f"One line a target; further left is better.{spread}"


def _mean(summary: Summary, method: str, domain: str) -> float:
    return summary.cell(method, [domain]).mean


def spectrogram_plot(run: Run) -> Drawing | None:
    """Some recordings as pictures, with what was understood of them before and after."""
    first = [t for t in run.transcripts if t.seed == run.transcripts[0].seed]
    found = [(t, image) for t in telling(first, 4) if (image := _spectrogram(t)) is not None]
    if not found:
        return None
    figure = Figure(figsize=(9, 2.5 * len(found)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)  # type: ignore[union-attr, call-arg]
    grid = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    for axes, (t, (decibels, seconds, top)) in zip(grid, found, strict=True):
        extent = (0.0, seconds, 0.0, top / 1000)
        axes.imshow(decibels, origin="lower", aspect="auto", extent=extent, cmap="magma")
        axes.set_title(shorten(f"{t.domain}: {t.reference}", 95))
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
    text = textwrap.shorten(heard or "(nothing)", 95, placeholder=" …")
    return f"{name}: {text}" + (f"   [{wrong} wrong]" if wrong else ""), not wrong


def _spectrogram(t: Transcript) -> tuple[np.ndarray, float, float] | None:
    """Decibels (frequency, time), seconds, and the highest frequency in Hz."""
    import soundfile

    try:
        samples, rate = soundfile.read(t.audio, dtype="float32")
    except (OSError, RuntimeError):
        return None
    size, hop = max(rate // 40, 16), max(rate // 60, 8)
    if len(samples) < size:
        return None
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::hop] * np.hanning(size)
    power = np.abs(np.fft.rfft(frames, axis=1)).T ** 2
    decibels = 10 * np.log10(power + 1e-10)
    return np.clip(decibels, decibels.max() - 70, None), len(samples) / rate, rate / 2


def _direction(summary: Summary) -> str:
    return "Lower" if summary.lower else "Higher"
