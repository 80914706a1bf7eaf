"""Schemas of the values in a file's header, checked before anything is made of them.

SCHEMA = Record({"rank": whole(1, 4096), "shape": Listed(whole(), most=8)})
check(SCHEMA, header, "the header", path)
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from lora_lightning.errors import AdapterFileError
from lora_lightning.lora.values import is_plain, is_real, is_whole

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
    """Mappings with these fields."""

    required: Mapping[str, Kind]  # name → kind of the fields that there must be
    optional: Mapping[str, Kind] = field(default_factory=dict)  # those that there may be
    # Of all further fields; ``None``: whatever they are, nothing reads them
    others: Kind | None = None

    def fits(self, value: Any) -> bool:
        """See `Kind`."""
        if not isinstance(value, dict) or not self.required.keys() <= value.keys():
            return False
        kinds, others = self._kinds, self.others
        for key, each in value.items():
            kind = kinds.get(key, others)
            if kind is not None and not kind.fits(each):
                return False
        return True

    @cached_property
    def _kinds(self) -> Mapping[str, Kind]:
        return {**self.required, **self.optional}

    def wrong(self, value: Any, place: str) -> Iterator[str]:
        """See `Kind`."""
        if not isinstance(value, dict):
            yield f"{place or 'all of it'} (expected a mapping, got {_told(value)})"
            return
        prefix = f"{place}." if place else ""
        for key in self.required.keys() - value.keys():
            yield f"{prefix}{key} (missing)"
        for key, each in value.items():
            if (kind := self._kinds.get(key, self.others)) is not None:
                yield from kind.wrong(each, f"{prefix}{reprlib.repr(key)[1:-1]}")


def text(most: int = 1000, least: int = 1) -> Leaf:
    """Printable texts: no control characters, nothing that a terminal would obey."""
    return Leaf(
        f"a printable text of {least} to {most} characters",
        lambda v: isinstance(v, str) and least <= len(v) <= most and v.isprintable(),
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


FLAG = Leaf("true or false", lambda v: v is True or v is False)


PLAIN = Leaf("finite numbers, printable texts, lists and mappings of them", is_plain)


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
