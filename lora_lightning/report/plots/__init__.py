"""The plots of a run, drawn without a display and without pyplot's global state.

Each module holds functions that take a run and give a matplotlib `Figure` with its caption, or
nothing where the run has no data for it; `draw` turns them into SVG. Figures are 9 inches wide:
648 px at most 940 px of a page, and on a telephone they are scrolled rather than shrunk.
"""

from __future__ import annotations

from dataclasses import dataclass

# In the order in which the page has them; each file registers its own.
# isort: off
from lora_lightning.report.plots import domains, ranks, speech, angles, items  # noqa: F401
from lora_lightning.report.plots import rounds, losses, spectra  # noqa: F401
# isort: on

from lora_lightning.report.plots.style import PLOTS as PLOTS
from lora_lightning.report.plots.svg import styled, to_svg
from lora_lightning.report.results import Run


@dataclass(frozen=True)
class Plot:
    """A plot with its title and caption."""

    name: str
    title: str
    caption: str
    svg: bytes


def draw(run: Run) -> list[Plot]:
    """All plots that the run has data for."""
    plots = []
    for name, (title, figure_of) in PLOTS.items():
        with styled():
            drawing = figure_of(run)
            if drawing is not None:
                figure, caption = drawing
                plots.append(Plot(name, title, caption, to_svg(figure)))
    return plots
