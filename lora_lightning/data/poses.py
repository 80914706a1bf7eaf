"""Poses: which azimuth each picture of a folder shows.

The poses stand in ``root/labels.csv``, a row for each picture::

    item,azimuth,elevation
    source/train/car/0000.png,-31.52,17.08

`item` is relative to `root`; angles are in degrees. An azimuth is an angle on the circle, 0 where
the front looks at the viewer: 350 is taken as −10. The elevation may be missing; nothing is
learnt from it.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lora_lightning.data.tables import read_text
from lora_lightning.errors import DataError, DataNotFoundError

LABELS = "labels.csv"


class Pose(NamedTuple):
    """Where an object is seen from, in degrees; `elevation` is NaN where it is not known."""

    azimuth: float
    elevation: float = math.nan


def write_poses(root: Path, poses: Mapping[str, Pose]) -> None:
    """Write ``root/labels.csv``; keys are paths relative to `root`."""
    with (root / LABELS).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("item", *Pose._fields))
        for item, pose in poses.items():
            writer.writerow((item, *(f"{angle:.4f}" for angle in pose)))


def read_poses(root: Path) -> dict[str, Pose]:
    """The poses in ``root/labels.csv``.

    Raises:
        DataNotFoundError: there is no such file.
        DataError: a column is missing, or a value is no angle; names the line.
    """
    path = root / LABELS
    if not path.is_file():
        raise DataNotFoundError(
            f"there is no {path}: it tells the azimuth of each picture, in lines such as "
            "'day/chair/1.jpg,-30' below the header 'item,azimuth'"
        )
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    header = list(reader.fieldnames or ())
    if missing := {"item", "azimuth"} - set(header):
        raise DataError(
            f"{path} has no column {', '.join(sorted(missing))}; its header must be 'item,azimuth' "
            f"or 'item,azimuth,elevation', got {','.join(header)!r}"
        )
    return dict(_pose(row, f"{path}, line {reader.line_num}") for row in reader)


def _pose(row: Mapping[str, str | None], where: str) -> tuple[str, Pose]:
    angles = []
    for name in Pose._fields:
        text = (row.get(name) or "").strip()
        try:
            angle = float(text) if text or name == "azimuth" else math.nan
        except ValueError:
            angle = math.inf
        if math.isinf(angle) or (math.isnan(angle) and name == "azimuth"):
            raise DataError(f"{where}: {name} must be an angle in degrees, got {text!r}")
        angles.append(angle)
    return str(row["item"]), Pose(*angles)
