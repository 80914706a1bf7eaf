"""Units of metrics, whether lower is better, and short numbers and names."""

from __future__ import annotations

from dataclasses import dataclass

AZIMUTH_ERROR = "azimuth error"
LOWER_IS_BETTER = frozenset(("WER", "CER", "MAE", "MSE", AZIMUTH_ERROR))


@dataclass(frozen=True)
class Unit:
    """How a metric is shown: the value times `scale`, followed by `symbol`."""

    name: str
    symbol: str
    scale: float

    def number(self, value: float) -> str:
        """The number alone, with one decimal."""
        return f"{self.scale * value:.1f}"

    def text(self, value: float) -> str:
        """The number with its unit."""
        return self.number(value) + self.symbol


PERCENT, DEGREES = Unit("%", " %", 100), Unit("degrees", "°", 1)
# A metric that is not named here is a fraction, and shown in percent.
UNITS = {AZIMUTH_ERROR: DEGREES}
CLOSE = 15.0  # degrees: an angle as near as this counts as right


def angle_between(one: float, other: float) -> float:
    """How far two angles lie apart on the circle, in degrees, 0 to 180."""
    return abs((one - other + 180) % 360 - 180)


# Numbers and names in few characters.


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
