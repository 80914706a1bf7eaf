"""Shows the LaTeX of docstrings as MathML, which browsers draw without a script."""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

_INLINE = re.compile(r":math:`([^`]+)`")
_BLOCK = re.compile(r"^\.\. math:: *(.+(?:\n[ \t]+\S.*)*)", re.MULTILINE)
_TEXT = re.compile(r"(?<=>)[^<]+(?=<)")


def mathml(latex: str, display: str) -> str:
    """``\\frac{a}{b}`` as ``<math>…</math>`` in one line, safe from Markdown's own marks."""
    latex = re.sub(r"\s*\n\s*", " ", latex).replace(r"\arg\max", r"\operatorname*{argmax}")
    found = convert(latex, display=display)
    if "\\" in found:
        raise ValueError(f"latex2mathml does not know a command in {latex!r}: {found}")
    # What Markdown would take for emphasis, links or code, by number; entities stay as they are.
    return _TEXT.sub(lambda m: re.sub(r"[*_`\[\]|]", lambda c: f"&#{ord(c[0])};", m[0]), found)


class MathML(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Inline formulae stand in the line, displayed ones in a line of their own."""
        if obj.docstring is None or "math:" not in obj.docstring.value:
            return
        text = _INLINE.sub(lambda m: mathml(m[1], "inline"), obj.docstring.value)
        obj.docstring.value = _BLOCK.sub(lambda m: mathml(m[1], "block"), text)
