"""Standard output and error of the command line, which may be a closed pipe or on a full disk."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

_MISSING = (AttributeError, ValueError, io.UnsupportedOperation)  # none, closed, or no file


def prepare() -> None:
    """Let names in scripts that a stream's encoding lacks be written out."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Print what is still to be printed.

    Raises:
        OSError: it cannot be; what is left goes nowhere, of which Python would complain at its end.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            with suppress(*_MISSING):
                stream.flush()
        except OSError:
            discard()
            raise


def discard() -> None:
    """Let all that is still to be printed go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(*_MISSING):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
