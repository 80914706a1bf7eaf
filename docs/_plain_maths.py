"""Shows the LaTeX of docstrings as plain text: the site loads no script that would typeset it."""

from __future__ import annotations

import re
from typing import Any

import griffe

_SYMBOLS = {
    r"\Delta": "Δ", r"\alpha": "α", r"\cdot": "·", r"\in": "∈", r"\lVert": "‖", r"\odot": "⊙",
    r"\pm": "±", r"\qquad": "    ", r"\rVert": "‖", r"\sqrt": "√", r"\sum": "Σ", r"\times": "×",
    r"\,": " ", r"\ ": " ",
}  # fmt: skip
_INLINE = re.compile(r":math:`([^`]+)`")
_BLOCK = re.compile(r"^\.\. math:: *(.+(?:\n[ \t]+\S.*)*)", re.MULTILINE)


def plain(latex: str) -> str:
    """``W' = W + s\\,B A`` as ``W' = W + s B A``."""
    text = re.sub(r"\s*\n\s*", " ", latex)
    for command, symbol in sorted(_SYMBOLS.items(), key=lambda pair: -len(pair[0])):
        text = text.replace(command, symbol)
    text = re.sub(r"\^\{([^{}]*)\}", r"^(\1)", text)
    return re.sub(r"[{}]", "", text).strip()


class PlainMaths(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Inline formulae become code, displayed ones a code block."""
        if obj.docstring is None or "math:" not in obj.docstring.value:
            return
        text = _INLINE.sub(lambda m: f"`{plain(m[1])}`", obj.docstring.value)
        obj.docstring.value = _BLOCK.sub(lambda m: f"    {plain(m[1])}", text)
