"""The console of the command line: what it is given is printed, never interpreted.

Names come from files that others wrote. Rich would take ``[/]`` in one for markup and ``:cat:`` for
a picture; a terminal obeys the escape sequences in it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

# Control characters but tab and newline, marks that turn the direction of text, and lone
# surrogates, which stand for bytes that are no UTF-8.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""The text with control characters written out, such as ``\x1b``."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class PlainConsole(Console):
    """Rich's console without markup, emoji and highlighting, and with `visible` text."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def on_broken_pipe(self) -> None:
        """Leave it to the command, where rich would end the program with another's exit code."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def render(self, renderable: Any, *options: Any, **named: Any) -> Iterable[Segment]:
        """As rich does, with control characters written out; its own stay."""
        if isinstance(renderable, Text) and _CONTROL.search(renderable.plain):
            # Before it is broken into lines, at whose end it would be cut off.
            layout = {k: getattr(renderable, k) for k in ("justify", "overflow", "no_wrap", "end")}
            renderable = Text(visible(renderable.plain), renderable.style, **layout)
        for segment in super().render(renderable, *options, **named):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def say(text: str) -> None:
    """Print lines that are not broken, such as paths."""
    PlainConsole().print(text, soft_wrap=True)
