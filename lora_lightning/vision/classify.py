"""Answers of a classifier to pictures, batch by batch, as a table or as CSV."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from lora_lightning.errors import DataError
from lora_lightning.report.cells import cell
from lora_lightning.vision.named_classifier import NamedClassifier

BATCH = 32
Answer = tuple[Path, list[tuple[str, float]]]  # a picture, and its likeliest classes


def classified(
    base: NamedClassifier, paths: Sequence[Path], top: int, skipped: list[tuple[str, str]]
) -> Iterator[Answer]:
    """The likeliest classes of each picture."""
    for start in range(0, len(paths), BATCH):
        read: list[tuple[Path, Tensor]] = []
        for path in paths[start : start + BATCH]:
            try:
                read.append((path, base.prepared.read(path)))
            except DataError as error:
                skipped.append((str(path), str(error)))
        if read:
            found = base.probabilities(torch.stack([picture for _, picture in read]))
            best = found.topk(min(top, found.shape[1]), dim=1)
            for (path, _), values, indices in zip(read, *best, strict=True):
                names = [base.classes[i] for i in indices.tolist()]
                yield path, list(zip(names, values.tolist(), strict=True))


def write_csv(answers: Iterable[Answer], top: int) -> None:
    """Print a line for each picture: path, class, probability, the next likely class, …"""
    names = ["path", *chain.from_iterable(_heads(i) for i in range(top))]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(names)
    for path, best in answers:
        values = chain.from_iterable((name, f"{p:.4f}") for name, p in best)
        writer.writerow([cell(str(path)), *map(cell, values)])


def _heads(place: int) -> tuple[str, str]:
    mark = "" if place == 0 else f"_{place + 1}"
    return f"class{mark}", f"probability{mark}"


def write_table(answers: Iterable[Answer], top: int) -> None:
    """Print a table of pictures, classes and probabilities in percent."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from lora_lightning.report.console import PlainConsole

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("picture", overflow="fold")
    for place in range(top):
        table.add_column("class" if place == 0 else f"{place + 1}.", overflow="fold")
        table.add_column("%", justify="right", no_wrap=True)
    for path, best in answers:
        cells = chain.from_iterable((name, f"{100 * p:.1f}") for name, p in best)
        table.add_row(*map(Text, (str(path), *cells)))
    if table.row_count:
        PlainConsole().print(table)
