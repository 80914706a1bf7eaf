"""`Labels`: the symbols of a recogniser's classes; encodes and decodes texts."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lora_lightning.errors import ConfigError
from lora_lightning.speech.tasks.transcripts import normalised


class Labels:
    """The symbols of a recogniser's classes.

    Args:
        symbols: One for each class; single characters, except the blank's.
        blank: Class of the blank.
        separator: The symbol between words.

    Raises:
        ConfigError: a symbol occurs twice, the separator is missing, or `blank` is no class.
    """

    def __init__(self, symbols: Sequence[str], blank: int = 0, separator: str = " "):
        self.symbols = tuple(symbols)
        self.blank, self.separator = blank, separator
        if not 0 <= blank < len(self.symbols):
            raise ConfigError(f"blank must be a class of 0 to {len(symbols) - 1}, got {blank}")
        used = [s for i, s in enumerate(self.symbols) if i != blank]
        if len(set(used)) < len(used):
            twice = sorted({s for s in used if used.count(s) > 1})
            raise ConfigError(f"each symbol may occur once; these occur again: {twice}")
        if separator not in used:
            raise ConfigError(f"the separator of words, {separator!r}, is none of the symbols")
        self._classes = {s: i for i, s in enumerate(self.symbols) if i != blank and len(s) == 1}
        letters = [s for s in self._classes if s != separator]
        self._upper = any(s.isupper() for s in letters) and not any(s.islower() for s in letters)
        self._lower = any(s.islower() for s in letters) and not any(s.isupper() for s in letters)

    def __len__(self) -> int:
        return len(self.symbols)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Labels({list(self.symbols)!r}, blank={self.blank}, separator={self.separator!r})"

    def spelt(self) -> dict[str, Any]:
        """The arguments of these labels, as JSON."""
        return {"symbols": list(self.symbols), "blank": self.blank, "separator": self.separator}

    def describe(self, model: nn.Module, sample_rate: int) -> None:
        """Tell a recogniser of these labels, so that files of its adapters say them."""
        said: Any = {"labels": self.spelt(), "sample_rate": sample_rate}
        model.pretrained_cfg = said

    def must_fit(self, classes: int, model: str) -> None:
        """Check that a model has a class for each symbol, and no more.

        Args:
            classes: How many the model has.
            model: Its name, for the message.

        Raises:
            ConfigError: there are more or fewer.
        """
        if classes != len(self):
            raise ConfigError(
                f"{model} has {classes} classes, the labels are {len(self)}; give the symbols that "
                "it was trained with, in their order, the blank among them"
            )

    def normalise(self, text: str, changes: Counter[str] | None = None) -> str:
        """The text in the recogniser's case and symbols, with single spaces, see `normalised`.

        Args:
            text: The text.
            changes: Counts what was rewritten; `transcripts.told` says it.

        Raises:
            DataError: it holds digits, and these are no symbols.
        """
        text = text.upper() if self._upper else text.lower() if self._lower else text
        kept = normalised(text, self._classes, changes)
        return " ".join(kept.replace(self.separator, " ").split())

    def changes(self, texts: Iterable[str | None]) -> Counter[str]:
        """What `normalise` rewrites in these texts, counted."""
        found = Counter[str]()
        for text in texts:
            self.normalise(text or "", found)
        return found

    def encode(self, text: str) -> list[int]:
        """The classes of a text, normalised first; characters that are no symbol are dropped."""
        return [self._classes[self.separator if c == " " else c] for c in self.normalise(text)]

    def decode(self, classes: Iterable[int]) -> str:
        """The text of classes (repetitions removed before)."""
        text = "".join(self.symbols[c] for c in classes if c != self.blank)
        return " ".join(text.replace(self.separator, " ").split())

    @classmethod
    def english(cls) -> Labels:
        """Blank, space, apostrophe and the 26 letters, in lower case."""
        return cls(["-", " ", "'", *string.ascii_lowercase])

    def _key(self) -> tuple[tuple[str, ...], int, str]:
        return self.symbols, self.blank, self.separator
