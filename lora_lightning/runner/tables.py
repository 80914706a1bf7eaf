"""Reading tables as CSV, TSV or JSON lines: rows with line numbers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_lightning.errors import DataError, DataNotFoundError
from lora_lightning.report.files import no_file

SUFFIXES = (".csv", ".tsv", ".jsonl")
Row = tuple[int, dict[str, Any]]  # number of its line, and its cells by name


def read_text(path: Path) -> str:
    """A file of UTF-8, with or without a byte order mark.

    Raises:
        DataError: it is in another encoding (names the line), or a folder, pipe or device.
        DataNotFoundError: there is no such file.
    """
    try:
        if what := no_file(path):
            raise DataError(f"{path} is a {what}; expected a file of text")
        raw = path.read_bytes()
    except OSError as error:
        raise DataNotFoundError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error


def read_rows(path: Path, needed: Sequence[str]) -> Iterator[Row]:
    """The rows of a table, unchecked.

    Args:
        path: TSV, CSV, or JSON lines by its suffix.
        needed: Columns of which at least one must exist.
    """
    return _json_rows(path) if path.suffix.lower() == ".jsonl" else _cell_rows(path, needed)


def _json_rows(path: Path) -> Iterator[Row]:
    # Not splitlines(), which would break a line within a text at U+2028.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
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
            raise DataError(f"{path}, line 1: no column {either(needed)}, only {either(header)}")
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


def either(names: Iterable[str]) -> str:
    """Names for a sentence: 'a' or 'b'."""
    return " or ".join(map(repr, names))
