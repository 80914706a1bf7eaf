"""What the values of a file's header may be, checked before anything is made of them.

SCHEMA = Record({"rank": whole(1, 4096), "shape": Listed(whole(), most=8)})
check(SCHEMA, header, "the header", path)
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lora_lightning.errors import AdapterFileError
from lora_lightning.lora.values import is_real, is_whole

SIZE = 2**31  # of a dimension, at most
_SHOWN = 4  # mistakes in a message, at most


class Kind(Protocol):
    """A set of values."""

    def fits(self, value: Any) -> bool:
        """Whether this is one of them."""

    def wrong(self, value: Any, place: str) -> Iterator[str]:
        """What is wrong with a value that is not, and where."""


@dataclass(frozen=True)
class Leaf:
    """Values without parts."""

    expected: str
    fits: Callable[[Any], bool]

    def wrong(self, value: Any, place: str) -> Iterator[str]:
        """See `Kind`."""
        if not self.fits(value):
            yield f"{place} (expected {self.expected}, got {reprlib.repr(value)})"


@dataclass(frozen=True)
class Listed:
    """Lists of at most `most` values of one kind, or of exactly `most`."""

    each: Kind
    most: int
    exactly: bool = False

    def _is_list(self, value: Any) -> bool:
        if not isinstance(value, list):
            return False
        return len(value) == self.most if self.exactly else len(value) <= self.most

    def fits(self, value: Any) -> bool:
        """See `Kind`."""
        return self._is_list(value) and all(map(self.each.fits, value))

    def wrong(self, value: Any, place: str) -> Iterator[str]:
        """See `Kind`."""
        if not self._is_list(value):
            many = f"{'' if self.exactly else 'at most '}{self.most}"
            yield f"{place} (expected a list of {many}, got {_told(value)})"
            return
        for i, each in enumerate(value):
            yield from self.each.wrong(each, f"{place}[{i}]")


@dataclass(frozen=True)
class Record:
    """Mappings with these fields.

    Attributes:
        required: Name → kind of the fields that there must be.
        optional: Those that there may be.
        others: Of all further fields; ``None``: whatever they are, nothing reads them.
    """

    required: Mapping[str, Kind]
    optional: Mapping[str, Kind] = field(default_factory=dict)
    others: Kind | None = None

    def _pairs(self, value: dict[Any, Any]) -> Iterator[tuple[str, Kind]]:
        for key in value:
            kind = self.required.get(key) or self.optional.get(key) or self.others
            if kind is not None:
                yield key, kind

    def fits(self, value: Any) -> bool:
        """See `Kind`."""
        return (
            isinstance(value, dict)
            and self.required.keys() <= value.keys()
            and all(kind.fits(value[key]) for key, kind in self._pairs(value))
        )

    def wrong(self, value: Any, place: str) -> Iterator[str]:
        """See `Kind`."""
        if not isinstance(value, dict):
            yield f"{place or 'all of it'} (expected a mapping, got {_told(value)})"
            return
        prefix = f"{place}." if place else ""
        for key in self.required.keys() - value.keys():
            yield f"{prefix}{key} (missing)"
        for key, kind in self._pairs(value):
            yield from kind.wrong(value[key], f"{prefix}{reprlib.repr(key)[1:-1]}")


def text(most: int = 1000, least: int = 1) -> Leaf:
    """Printable texts: no control characters, nothing that a terminal would obey."""
    expected = f"a printable text of {least} to {most} characters"
    return Leaf(
        expected, lambda v: isinstance(v, str) and least <= len(v) <= most and v.isprintable()
    )


def whole(low: int = 0, high: int = SIZE) -> Leaf:
    """Whole numbers in this range."""
    return Leaf(f"a whole number from {low} to {high}", lambda v: is_whole(v) and low <= v <= high)


def real(low: float, high: float) -> Leaf:
    """Numbers in this range, its ends included; they are finite."""
    return Leaf(
        f"a number from {low:g} to {high:g}",
        lambda v: is_real(v) and low <= v <= high and math.isfinite(v),
    )


def one_of(*values: Any) -> Leaf:
    """These values."""
    return Leaf(
        " or ".join(map(repr, values)),
        lambda v: any(type(v) is type(value) and v == value for value in values),
    )


FLAG = one_of(True, False)


def check(schema: Kind, value: Any, what: str, path: Path) -> None:
    """Check the values in a file.

    Raises:
        AdapterFileError: one of them cannot be; names it, what was expected, what is there.
    """
    if not schema.fits(value):
        wrong = [mistake for mistake, _ in zip(schema.wrong(value, ""), range(_SHOWN + 1))]  # noqa: B905
        more = " …" if len(wrong) > _SHOWN else ""
        raise AdapterFileError(f"{path}: {what} lacks or garbles {', '.join(wrong[:_SHOWN])}{more}")


def _told(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return reprlib.repr(value)
