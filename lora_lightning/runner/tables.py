"""Manifests: tables with a recording in each row, as CSV, TSV or JSON lines."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_lightning.errors import DataError, DataNotFoundError
from lora_lightning.speech.data.utterances import Utterance

# What each column may be called; the first that is there is taken.
PATH = ("path", "audio", "file", "audio_filepath", "filename")
TEXT = ("text", "transcript", "transcription", "sentence")
SPEAKER = ("speaker", "speaker_id", "client_id")
DOMAIN = ("domain", "environment")
SUFFIXES = (".csv", ".tsv", ".jsonl")

Row = tuple[int, dict[str, Any]]  # number of its line, and its cells by name


def read_text(path: Path) -> str:
    """A file of UTF-8, with or without a byte order mark.

    Raises:
        DataError: it is in another encoding; names the line.
        DataNotFoundError: there is no such file.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataNotFoundError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error


def read_table(path: Path, root: Path | None = None) -> list[Utterance]:
    """Every row of a manifest.

    A row holds a path (`PATH` has the names that its column may have) and, as far as they are
    known, a text, a speaker, a domain, and a `target` or a `label`. A label is a class, a target
    either that or a number. Other columns, such as a duration, are ignored.

    In CSV and TSV an empty cell is what is not known, and targets are numbers if all of them
    are; in TSV, quotation marks are part of the text, as Common Voice has them.

    Args:
        path: The manifest; its suffix, `.csv`, `.tsv` or `.jsonl`, decides on the format.
        root: What the paths in it are relative to; by default its folder.

    Raises:
        DataError: the encoding, the header or a row is wrong; names the line.
        DataNotFoundError: there is no such file.
    """
    given = read_rows(path, PATH)
    rows = given if path.suffix.lower() == ".jsonl" else _numbered(given)
    found = [_utterance(row, f"{path}, line {n}", root or path.parent) for n, row in rows]
    if not found:
        raise DataError(f"{path} has no rows")
    return found


def read_rows(path: Path, needed: Sequence[str]) -> Iterator[Row]:
    """The rows of a table, whatever stands in them.

    Args:
        path: TSV, CSV, or JSON lines by its suffix.
        needed: Columns of which one must be there.
    """
    return _json_rows(path) if path.suffix.lower() == ".jsonl" else _cell_rows(path, needed)


def _json_rows(path: Path) -> Iterator[Row]:
    # Not splitlines(), which would break a line within a text at U+2028.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object {{…}}, got {line[:40]!r}")
        yield number, row


def _cell_rows(path: Path, needed: Sequence[str]) -> Iterator[Row]:
    tabs = path.suffix.lower() == ".tsv"
    reader = csv.reader(
        io.StringIO(read_text(path), newline=""),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=True,
    )
    try:
        header = [name.strip() for name in next(reader, [])]
        if not set(header) & set(needed):
            raise DataError(f"{path}, line 1: no column {_or(needed)}, only {_or(header)}")
        for cells in reader:
            if len(cells) not in (0, len(header)):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, but {len(header)} columns"
                )
            row = {name: cell for name, cell in zip(header, cells, strict=False) if cell}
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _utterance(row: dict[str, Any], where: str, root: Path) -> Utterance:
    path = _first(row, PATH)
    if not isinstance(path, str) or not path or "\0" in path:
        raise DataError(f"{where}: no file: {_or(PATH)} must be a path, got {path!r}")
    return Utterance(
        root / path,
        text=_string(row, TEXT, where),
        speaker=_string(row, SPEAKER, where),
        domain=_string(row, DOMAIN, where),
        target=_target(row, where),
        seconds=_seconds(row.get("seconds")),
    )


def _target(row: dict[str, Any], where: str) -> str | float | None:
    """A class from the column `label`, or from `target` what that holds."""
    target = row.get("target")
    if target is None:
        return _string(row, ("label",), where)
    if isinstance(target, bool) or not isinstance(target, (str, int, float)):
        raise DataError(f"{where}: 'target' must be a name or a number, got {target!r}")
    return target if isinstance(target, str) else float(target)


def _seconds(value: Any) -> float:
    """A length that `write_manifest` wrote, which was measured; NaN for anything else."""
    measured = isinstance(value, float) and 0 < value < math.inf
    return value if measured else math.nan


def _first(row: dict[str, Any], names: Sequence[str]) -> Any:
    """The cell of the first of these columns that has one."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def _string(row: dict[str, Any], names: Sequence[str], where: str) -> str | None:
    value = _first(row, names)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # the number of a speaker
    raise DataError(f"{where}: {_or(names)} must be text, got {value!r}")


def _numbered(rows: Iterable[Row]) -> list[Row]:
    """The rows, with targets as numbers if every one is a number."""
    found = list(rows)
    try:
        numbers = {n: float(row["target"]) for n, row in found if "target" in row}
    except ValueError:
        return found
    return [(n, {**row, "target": numbers[n]} if n in numbers else row) for n, row in found]


def _or(names: Iterable[str]) -> str:
    return " or ".join(map(repr, names))
