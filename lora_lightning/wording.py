"""Numbers and names in few characters."""

from __future__ import annotations


def si(number: float, unit: str = "") -> str:
    """3.4 M for 3,400,000: three digits at most, an SI prefix and the unit."""
    prefixes = iter(" kMGT")
    prefix = next(prefixes)
    while number >= 999.5:
        number, prefix = number / 1000, next(prefixes)
    digits = 1 if prefix != " " and number < 9.95 else 0
    return f"{number:.{digits}f} {prefix.strip()}{unit}".strip()


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, the last an ellipsis where some are missing."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
