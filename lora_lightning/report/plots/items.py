"""Single target items before and after adaptation: confusion matrices and a grid of samples."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image, ImageOps

from lora_lightning.report.metrics import CLOSE, DEGREES, angle_between, shorten
from lora_lightning.report.plots.style import INK, QUIET, RIGHT, WRONG, Drawing, plot
from lora_lightning.report.results import Prediction, Run
from lora_lightning.report.summary import Summary, target_items

MOST_SAMPLES, MOST_LABELS, MOST_NUMBERS = 24, 30, 12


@plot("confusion", "What is taken for what?")
def confusion_plot(run: Run) -> Drawing | None:
    """Two row-normalised confusion matrices on the target, before and after."""
    items = target_items(run)
    if not items or Summary(run).unit == DEGREES:
        return None
    found = {name for p in items for name in (p.label, p.source, p.adapted)}
    classes = run.classes + sorted(found - set(run.classes))
    longest = min(16, max(map(len, classes)))
    figure = Figure(figsize=(9, 4.1 + 0.06 * longest), layout="compressed")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, name, side in zip(axes, ("before", "after"), ("source", "adapted"), strict=True):
        answers = [(p.label, str(getattr(p, side))) for p in items]
        image = _matrix(ax, _confusion(answers, classes), classes)
        accuracy = 100 * sum(a == b for a, b in answers) / len(answers)
        ax.set_title(f"{name}: {accuracy:.1f} % of {len(answers)} answers right")
        ax.set_xlabel("predicted class")
    axes[0].set_ylabel("true class")
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=30, pad=0.015)
    bar.set_label("share of the true class (%)", size=8.5)
    bar.ax.tick_params(labelsize=8.5)
    bar.outline.set_visible(False)
    return figure, (
        "Each row shows what the target items of one true class are taken for; a row adds up to "
        "100 %. A perfect model has a dark diagonal and nothing beside it."
        + (" Only some of the class names are written." if len(classes) > MOST_LABELS else "")
    )


def _confusion(answers: list[tuple[str, str]], classes: list[str]) -> np.ndarray:
    """Percent of each true class, shape (true, predicted); NaN for a class without items."""
    index = {name: i for i, name in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes)))
    for label, answer in answers:
        counts[index[label], index[answer]] += 1
    totals = counts.sum(1, keepdims=True)
    return np.where(totals > 0, 100 * counts / np.maximum(totals, 1), np.nan)


def _matrix(ax: Axes, shares: np.ndarray, classes: list[str]) -> AxesImage:
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    ax.set_facecolor("#eceff1")  # where a class has no items
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    step = math.ceil(len(classes) / MOST_LABELS)
    ticks, size = range(0, len(classes), step), 8.5 if len(classes) <= MOST_NUMBERS else 7
    names = [shorten(classes[i], 16) for i in ticks]
    ax.set_xticks(ticks, names, rotation=90, fontsize=size)
    ax.set_yticks(ticks, names, fontsize=size)
    if len(classes) <= MOST_NUMBERS:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.5:
                tint = "white" if share > 55 else INK
                ax.text(column, row, f"{share:.0f}", ha="center", va="center", color=tint, size=8)
    return image


def sample(items: list[Prediction], count: int = MOST_SAMPLES) -> list[Prediction]:
    """A random sample: from one run, in turn from each domain, whatever was predicted."""
    rng = random.Random(0)
    first = min(p.seed for p in items)
    piles: dict[str, list[Prediction]] = {}
    for p in sorted((p for p in items if p.seed == first), key=lambda p: p.item):
        piles.setdefault(p.domain, []).append(p)
    for pile in piles.values():
        rng.shuffle(pile)
    order = rng.sample(list(piles), len(piles))  # where there are more domains than places
    rounds = range(max(map(len, piles.values())))
    drawn = [piles[d][i] for i in rounds for d in order if i < len(piles[d])][:count]
    return sorted(drawn, key=lambda p: (p.domain, p.label, p.item))


@plot("samples", "What does it look like?")
def sample_plot(run: Run) -> Drawing | None:
    """Target images with the predictions before and after."""
    items = target_items(run)
    if not items:
        return None
    drawn, degrees = sample(items), Summary(run).unit == DEGREES
    columns = min(6, max(len(drawn), 4))
    lines = math.ceil(len(drawn) / columns)
    # Placed in inches: squares of `side`, with two lines of text above and two below.
    margin, gap, above, below = 0.1, 0.14, 0.36, 0.46
    side = (9 - 2 * margin - (columns - 1) * gap) / columns
    height = lines * (above + side + below) - 0.04
    figure = Figure(figsize=(9, height))
    for i, p in enumerate(drawn):
        line, column = divmod(i, columns)
        left = margin + column * (side + gap)
        bottom = height - (line + 1) * (above + side) - line * below
        ax = figure.add_axes((left / 9, bottom / height, side / 9, side / height))
        _tile(ax, run.data_root / p.item, p, side, degrees)
    domains = len({p.domain for p in items})
    label, right = "class", "right"
    if degrees:
        label, right = "azimuth", f"within {CLOSE:.0f}°"
    return figure, (
        f"{len(drawn)} target items drawn by chance"
        f"{f', in turn from each of the {domains} domains' * (domains > 1)}, failures included "
        f"(first run, seed {drawn[0].seed}). Above each image its true {label} and domain; below "
        "it the predictions before and after, with the model's confidence. "
        f"✓ is {right}, ✗ is wrong."
    )


def _tile(ax: Axes, path: Path, p: Prediction, side: float, degrees: bool) -> None:
    ax.set_axis_off()
    picture = _thumbnail(path)
    if picture is None:
        ax.text(0.5, 0.5, "no image", ha="center", va="center", color=QUIET)
        picture = np.full((8, 8, 3), 236, np.uint8)
    # The pixels as they are, which the browser scales: half of the bytes.
    ax.imshow(picture, extent=(0, 1, 0, 1), interpolation="none")
    title = _degrees(p.label) if degrees else shorten(p.label, 20)
    ax.text(0, 1 + 0.18 / side, title, weight="bold", size=8.5)
    ax.text(0, 1 + 0.05 / side, shorten(p.domain, 28), color=QUIET, size=7)
    lines = (("before", p.source, p.source_confidence), ("after", p.adapted, p.adapted_confidence))
    room = int(15 * (side - 0.55))  # characters between the word before and the percentage
    for i, (when, answer, confidence) in enumerate(lines):
        y = -(0.15 + 0.145 * i) / side
        right, text = answer == p.label, shorten(answer, room)
        if degrees:
            off = angle_between(float(answer), float(p.label))
            right, text = off <= CLOSE, _degrees(answer)
        mark, tint = ("✓", RIGHT) if right else ("✗", WRONG)
        ax.text(0, y, when, color=QUIET, size=7)
        ax.text(0.37 / side, y, f"{mark} {text}", color=tint, size=7.2)
        if math.isfinite(confidence):
            ax.text(1, y, f"{100 * confidence:.0f} %", ha="right", color=QUIET, size=7)


def _degrees(number: str) -> str:
    return f"{float(number):z.0f}°".replace("-", "−")


def _thumbnail(path: Path) -> np.ndarray | None:
    """A square RGB array with the whole image in it, nothing for a file that cannot be read."""
    try:
        with Image.open(path) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
            side = min(224, max(picture.size))
            return np.asarray(ImageOps.pad(picture, (side, side), color="#eceff1"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
