"""The plots of a run, drawn without a display and without pyplot's global state.

Each module holds functions that take a run and give a matplotlib `Figure` with its caption, or
nothing where the run has no data for it; `draw` turns them into SVG. Figures are 9 inches wide:
648 px at most 940 px of a page, and on a telephone they are scrolled rather than shrunk. Text stays
text, so that the reader's own fonts draw scripts that matplotlib's font lacks.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unicodedata import east_asian_width

import matplotlib
from matplotlib.backends.backend_svg import RendererSVG
from matplotlib.figure import Figure

# In the order in which the page has them; each file registers its own.
# isort: off
from lora_lightning.report.plots import domains, ranks, speech, angles, items  # noqa: F401
from lora_lightning.report.plots import rounds, losses, spectra  # noqa: F401
# isort: on

from lora_lightning.report.plots.style import FONTS, STYLE
from lora_lightning.report.plots.style import PLOTS as PLOTS
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
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            # Measuring text in scripts that the font lacks; the reader's own fonts draw it.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            drawing = figure_of(run)
            if drawing is not None:
                figure, caption = drawing
                plots.append(Plot(name, title, caption, _svg(figure)))
    return plots


def _svg(figure: Figure) -> bytes:
    svg = io.BytesIO()
    with _wide_characters():  # the resolution is that of the pictures in it
        figure.savefig(svg, format="svg", dpi=160, metadata={"Date": None})
    return svg.getvalue().replace(b"'DejaVu Sans'", FONTS.encode())


@contextmanager
def _wide_characters() -> Iterator[None]:
    """Within the block Chinese, Japanese and Korean text is measured as wide as it is drawn.

    Matplotlib's font lacks it, and measures 0.6 em for each character, in place of 1 em.
    """
    renderer: Any = RendererSVG
    real = renderer.get_text_width_height_descent

    def measured(self: Any, s: str, prop: Any, ismath: Any) -> tuple[float, float, float]:
        width, height, descent = real(self, s, prop, ismath)
        wide = sum(east_asian_width(character) in "WF" for character in s)
        return width + 0.4 * wide * prop.get_size_in_points(), height, descent

    renderer.get_text_width_height_descent = measured
    try:
        yield
    finally:
        renderer.get_text_width_height_descent = real
