"""Cells of CSV files, for programs that take some for formulas."""

from __future__ import annotations

from typing import Any

_BEGINS = tuple("=+-@\t\r\n＝＋－＠")


def cell(value: Any) -> Any:
    """A value as a cell, with an apostrophe before a text that Excel or Calc would compute.

    See OWASP, "CSV injection". Numbers stay what they are, also in text.
    """
    if not isinstance(value, str) or not value.lstrip(" ").startswith(_BEGINS) or _number(value):
        return value
    return f"'{value}"


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
