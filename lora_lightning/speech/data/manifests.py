"""From a manifest or a folder to recordings, and back: `load_utterances`, `write_manifest`.

How a manifest is read is in `lora_lightning.data.tables`, how the layouts look in
`lora_lightning.data.layouts`. What is found is not looked at: `lora_lightning.data.audio.checked`
does that.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_lightning.config import unknown_key
from lora_lightning.data.audio import AUDIO as AUDIO  # what a folder is searched for
from lora_lightning.data.layouts import LAYOUTS, LOOKED_FOR
from lora_lightning.data.tables import SUFFIXES, read_table
from lora_lightning.data.utterances import Utterance
from lora_lightning.errors import ConfigError, DataError, DataNotFoundError

FIELDS = ("text", "speaker", "domain", "target")  # in a row beside path and seconds


def load_utterances(source: Path | str, layout: str = "auto") -> list[Utterance]:
    """Find the recordings of a manifest or a folder; no audio is opened.

    Args:
        source: A manifest (`.csv`, `.tsv` or `.jsonl`, see `lora_lightning.data.tables.read_table`)
            or a folder.
        layout: "manifest", "librispeech", "commonvoice", "vctk" or "folder" (audio files, each
            with its text in a `.txt` beside it, or without). "auto": the first of these that fits.

    Returns:
        The recordings, in the manifest's order or sorted by path; their seconds are NaN unless
        `write_manifest` wrote them.

    Raises:
        ConfigError: there is no such layout.
        DataError: nothing is found, or a row cannot be used; names the line.
        DataNotFoundError: `source` does not exist.
    """
    known = ["auto", *LOOKED_FOR]
    if layout not in known:
        raise ConfigError(unknown_key(layout, known).replace("key", "layout"))
    source = Path(source)
    if not source.exists():
        raise DataNotFoundError(f"there is no file or folder {source}")
    found = _from_folder(source, layout) if source.is_dir() else _from_file(source, layout)
    if not found:
        looked = LOOKED_FOR if layout == "auto" else {layout: LOOKED_FOR[layout]}
        lines = "\n".join(f"  {name}: {what}" for name, what in looked.items())
        raise DataError(f"no recordings in {source}; looked for\n{lines}")
    return found


def _from_folder(source: Path, layout: str) -> list[Utterance]:
    names = LAYOUTS if layout == "auto" else {layout} & set(LAYOUTS)
    return next((found for name in names if (found := LAYOUTS[name](source))), [])


def _from_file(source: Path, layout: str) -> list[Utterance]:
    suffix, clips = source.suffix.lower(), source.parent / "clips"
    if suffix == ".tsv" and layout in ("auto", "commonvoice") and clips.is_dir():
        found = read_table(source, clips)
        if layout == "commonvoice" or found[0].path.is_file():
            return found
    return read_table(source) if suffix in SUFFIXES and layout in ("auto", "manifest") else []


def write_manifest(path: Path | str, utterances: Iterable[Utterance]) -> Path:
    """Write recordings as JSON lines; `load_utterances` gives the same ones back.

    A path is written relative to the manifest's folder where it lies below that, else in full.
    The file appears complete or not at all.

    Args:
        path: Of the manifest, ending in `.jsonl`; its folder is made if need be.
        utterances: What to write, in this order.

    Returns:
        The path.

    Raises:
        ConfigError: the path ends in something else.
    """
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        raise ConfigError(f"a manifest is written as JSON lines: name it *.jsonl, got {path.name}")
    lines = [json.dumps(_row(item, path.parent)) + "\n" for item in utterances]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text("".join(lines), encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def _row(item: Utterance, folder: Path) -> dict[str, Any]:
    below = item.path.is_relative_to(folder)
    path = item.path.relative_to(folder) if below else item.path.absolute()
    given = {name: value for name in FIELDS if (value := getattr(item, name)) is not None}
    measured = {} if math.isnan(item.seconds) else {"seconds": float(item.seconds)}
    return {"path": path.as_posix(), **given, **measured}
