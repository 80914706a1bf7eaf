"""`to_svg`: text stays text, so that the reader's fonts draw what matplotlib's font lacks."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unicodedata import east_asian_width

import matplotlib
from matplotlib.backends.backend_svg import RendererSVG
from matplotlib.figure import Figure

from lora_lightning.report.plots.style import FONTS, STYLE


@contextmanager
def styled() -> Iterator[None]:
    """Within the block figures are drawn in the style of all plots."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # Measuring text in scripts that the font lacks; the reader's own fonts draw it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG, the same for the same figure; drawn and saved within `styled`."""
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
