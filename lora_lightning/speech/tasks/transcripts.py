"""Transcripts in a recogniser's symbols: what is rewritten, counted; numbers spelt out."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_lightning.errors import ConfigError, DataError, MissingDependencyError

if TYPE_CHECKING:
    from lora_lightning.speech.data.utterances import Utterance

APOSTROPHES = "’ʼ＇‛′´`"
# Letters that Unicode does not decompose.
FOLDED = {"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th"}
_QUOTED = re.compile(r"(?<!\w)‘(.+?)’(?!\w)")
_NUMBER = re.compile(r"\d+(?:[.,]\d{3})*(?:[.,]\d+)?")


def normalised(text: str, known: Container[str], changes: Counter[str] | None = None) -> str:
    """A text, in the recogniser's case, in its symbols, with single spaces.

    NFC first. ’ and ʼ become apostrophes. An accent that is no symbol is folded (é to e, ß to ss);
    other characters that are none, such as hyphens and punctuation, become a space between two
    letters, so that no words are joined, and are left out elsewhere.

    Raises:
        DataError: it holds digits, and these are no symbols.
    """
    count = Counter[str]() if changes is None else changes
    text = unicodedata.normalize("NFC", text)
    if "‘" not in known:
        text, quotes = _QUOTED.subn(r"\1", text)
        count.update({"‘…’ left out": quotes} if quotes else {})
    kept = [_written(text, i, known, count) for i in range(len(text))]
    return " ".join("".join(kept).split())


def _written(text: str, i: int, known: Container[str], count: Counter[str]) -> str:
    """What becomes of a character."""
    c = text[i]
    if c in known or c.isspace():
        return c if c in known else " "
    kind = unicodedata.category(c)[0]
    if kind == "N":
        raise DataError(
            f"{text!r} holds digits, which the recogniser cannot write: write them as words, or "
            "have them spelt out: data.numbers=en in a recipe, --numbers en on the command line, "
            "spelt_out(recordings, 'en') in Python"
        )
    new = _folded(c, known) if kind in "LM" else _mark(text, i, known)
    count[f"{c} {'left out' if not new else 'as a space' if new == ' ' else f'as {new}'}"] += 1
    return new


def _folded(letter: str, known: Container[str]) -> str:
    """A letter without its accent; "" where that is no symbol either."""
    low = letter.lower()
    parts = unicodedata.normalize("NFKD", low)
    plain = FOLDED.get(low) or "".join(c for c in parts if not unicodedata.combining(c))
    new = plain.upper() if letter != low else plain
    return new if all(c in known for c in new) else ""


def _mark(text: str, i: int, known: Container[str]) -> str:
    """An apostrophe; a space between two letters; else nothing."""
    if text[i] == "'" or text[i] in APOSTROPHES:
        return "'" if "'" in known else ""
    within = 0 < i < len(text) - 1 and text[i - 1].isalnum() and text[i + 1].isalnum()
    return " " if within else ""


def told(changes: Counter[str]) -> str:
    """What was rewritten, the most frequent first, as a sentence; "" for nothing."""
    if not changes:
        return ""
    shown = ", ".join(f"{what} × {n}" for what, n in changes.most_common(8))
    more = f", and {len(changes) - 8} more" if len(changes) > 8 else ""
    return f"The transcripts are written in the recogniser's symbols: {shown}{more}."


def spelt_out(utterances: Iterable[Utterance], language: str) -> list[Utterance]:
    """Recordings whose transcripts have numbers as words, by the library num2words.

    Args:
        utterances: The recordings.
        language: Of the words, as num2words names it: "en", "de", "fr", "pt_BR".

    Raises:
        ConfigError: num2words has no such language.
        MissingDependencyError: num2words is not installed.
    """
    found = list(utterances)
    if not any(u.text and _NUMBER.search(u.text) for u in found):
        return found
    try:
        from num2words import num2words
    except ImportError as error:
        raise MissingDependencyError(
            "numbers are spelt out by num2words, which is not installed: "
            'pip install "lora-lightning[numbers]"'
        ) from error

    def words(match: re.Match[str]) -> str:
        number = _value(match[0])
        try:
            return f" {num2words(number, lang=language)} "
        except NotImplementedError as error:
            raise ConfigError(f"num2words has no language {language!r}") from error

    texts = [u.text and " ".join(_NUMBER.sub(words, u.text).split()) for u in found]
    return [replace(u, text=text) for u, text in zip(found, texts, strict=True)]


def _value(written: str) -> int | float:
    """1,000 and 1.000 are a thousand; 1,5 and 1.5 one and a half."""
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+|\d{1,3}(?:\.\d{3})+|\d+", written):
        return int(re.sub("[.,]", "", written))
    *whole, part = re.split("[.,]", written)
    return float(f"{''.join(whole)}.{part}")
