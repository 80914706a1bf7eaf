"""The pictures of a run, drawn without a display and without pyplot's global state.

Each module holds functions that take a run and give a matplotlib `Figure` with its caption, or
nothing where the run has no data for it; `draw` turns them into PNG. Figures are 9 inches wide,
so that at 100 px an inch they fit a page of 900 px.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lora_lightning.report.plots.angles import angle_plot
from lora_lightning.report.plots.domains import domain_plot
from lora_lightning.report.plots.items import confusion_plot, sample_plot
from lora_lightning.report.plots.ranks import rank_plot
from lora_lightning.report.plots.rounds import rounds_plot
from lora_lightning.report.plots.spectra import spectrum_plot
from lora_lightning.report.plots.speech import enrolment_plot, spectrogram_plot, target_plot
from lora_lightning.report.plots.style import STYLE
from lora_lightning.report.results import Run

_STYLE: Any = STYLE  # matplotlib types the keys as one huge Literal
Drawing = tuple[Figure, str]
PLOTS: dict[str, tuple[str, Callable[[Run], Drawing | None]]] = {
    "accuracy": ("How good is each method, and where?", domain_plot),
    "ranks": ("Which rank?", rank_plot),
    "enrolment": ("How much labelled speech does it take?", enrolment_plot),
    "targets": ("Who gains, and how much?", target_plot),
    "spectrograms": ("What does it look like?", spectrogram_plot),
    "angles": ("How far off are the angles?", angle_plot),
    "confusion": ("What is taken for what?", confusion_plot),
    "samples": ("What does it look like?", sample_plot),
    "rounds": ("How did it go without labels?", rounds_plot),
    "spectrum": ("Which layers changed, and was the rank enough?", spectrum_plot),
}


@dataclass(frozen=True)
class Plot:
    """A picture with what a reader needs to read it."""

    name: str
    title: str
    caption: str
    png: bytes


def draw(run: Run) -> list[Plot]:
    """All plots that the run has data for."""
    plots = []
    for name, (title, figure_of) in PLOTS.items():
        with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
            # Class names in scripts that the font lacks come out as boxes: no cause for alarm.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            drawing = figure_of(run)
            if drawing is not None:
                figure, caption = drawing
                plots.append(Plot(name, title, caption, _png(figure)))
    return plots


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    return png.getvalue()
