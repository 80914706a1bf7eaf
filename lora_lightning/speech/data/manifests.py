"""Manifests and folders of recordings: `load_utterances` reads them, `write_manifest` writes one.

`lora_lightning.speech.data.utterances` turns a row into an `Utterance`. No audio is opened here:
`lora_lightning.speech.data.audio.checked` does that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lora_lightning.errors import ConfigError, DataError, DataNotFoundError
from lora_lightning.registry import Registry, unknown
from lora_lightning.report.files import atomic_write
from lora_lightning.runner.tables import SUFFIXES, read_text
from lora_lightning.runner.walking import files_below
from lora_lightning.speech.data.audio import AUDIO as AUDIO  # what a folder is searched for
from lora_lightning.speech.data.utterances import Utterance, read_table

# Functions from a folder to its recordings, none where it is laid out otherwise; in the order in
# which `load_utterances` tries them.
LAYOUTS: Registry[Callable[[Path], list[Utterance]]] = Registry("layout")
COMMON_VOICE = (
    "validated.tsv",
    "train.tsv",
    "dev.tsv",
    "test.tsv",
)  # the first that exists is read


def visible(root: Path, ending: str = "") -> list[Path]:
    """Files under `root` whose names end so, sorted, without hidden files and folders.

    Raises:
        DataError: a folder in it cannot be read.
    """
    files, unread = files_below(root)
    if unread:
        raise DataError(f"{unread[0][0]}: {unread[0][1]}; move it away, or change its permissions")
    return [path for path in files if path.name.endswith(ending)]


def recordings(root: Path) -> list[Path]:
    """Audio files under `root`, sorted."""
    return [path for path in visible(root) if path.suffix.lower() in AUDIO]


@LAYOUTS.register("librispeech")
def librispeech(root: Path) -> list[Utterance]:
    """`<speaker>/<chapter>/*.trans.txt` with a line `<name> <TEXT>` for each `<name>.flac`.

    Panayotov et al., "Librispeech: an ASR corpus based on public domain audio books", 2015.
    """
    found = []
    for listing in visible(root, ".trans.txt"):
        speaker = listing.parent.parent.name
        for number, line in enumerate(read_text(listing).split("\n"), start=1):
            name, _, text = line.strip().partition(" ")
            if not name:
                continue
            if not text:
                raise DataError(f"{listing}, line {number}: expected '<name> <TEXT>', got {line!r}")
            found.append(Utterance(listing.with_name(f"{name}.flac"), text.strip(), speaker))
    return found


@LAYOUTS.register("commonvoice")
def common_voice(root: Path) -> list[Utterance]:
    """`validated.tsv`, or else `train.tsv`, `dev.tsv` or `test.tsv`, beside the folder `clips`.

    Ardila et al., "Common Voice: a massively-multilingual speech corpus", 2020.
    """
    if not (root / "clips").is_dir():
        return []
    tables = [root / name for name in COMMON_VOICE if (root / name).is_file()]
    return read_table(tables[0], root / "clips") if tables else []


@LAYOUTS.register("vctk")
def vctk(root: Path) -> list[Utterance]:
    """`wav48*/<speaker>/*` with `txt/<speaker>/*.txt`; the first of two microphones is used.

    Yamagishi et al., "CSTR VCTK corpus", 2019.
    """
    folders = [p for p in sorted(root.glob("wav48*")) if p.is_dir()]
    if not folders or not (root / "txt").is_dir():
        return []
    found: dict[str, Utterance] = {}
    for path in recordings(folders[0]):  # _mic1 is sorted before _mic2
        speaker, name = path.parent.name, path.stem.removesuffix("_mic1").removesuffix("_mic2")
        if name not in found:
            transcript = root / "txt" / speaker / f"{name}.txt"
            found[name] = Utterance(path, _transcript(transcript), speaker)
    return list(found.values())


@LAYOUTS.register("folder")
def folder(root: Path) -> list[Utterance]:
    """Audio files at any depth, each with its text in a `.txt` of the same name, if there is one.

    The speaker is the first folder below `root`, if the file lies in one.
    """
    found = []
    for path in recordings(root):
        parts = path.relative_to(root).parts
        speaker = parts[0] if len(parts) > 1 else None
        found.append(Utterance(path, _transcript(path.with_suffix(".txt")), speaker))
    return found


def _transcript(path: Path) -> str | None:
    """The content of a text file as one line; None where there is no file."""
    return " ".join(read_text(path).split()) if path.is_file() else None


LOOKED_FOR = {
    "manifest": "a .csv, .tsv or .jsonl file",
    "librispeech": "<speaker>/<chapter>/*.trans.txt beside *.flac",
    "commonvoice": f"{' or '.join(COMMON_VOICE)} beside clips/",
    "vctk": "wav48*/<speaker>/ and txt/<speaker>/",
    "folder": f"audio files ({' '.join(sorted(AUDIO))})",
}

FIELDS = ("text", "speaker", "domain", "target")  # in a row beside path and seconds


def load_utterances(source: Path | str, layout: str = "auto") -> list[Utterance]:
    """Find the recordings of a manifest or a folder; no audio is opened.

    Args:
        source: A manifest (`.csv`, `.tsv` or `.jsonl`, see `utterances.read_table`)
            or a folder.
        layout: "manifest", "librispeech", "commonvoice", "vctk" or "folder" (audio files, each
            with its text in a `.txt` beside it, or without). "auto": the first of these that fits.

    Returns:
        The recordings, in the manifest's order or sorted by path; seconds are NaN unless
        written by `write_manifest`.

    Raises:
        ConfigError: there is no such layout.
        DataError: nothing is found, or a row cannot be used; names the line.
        DataNotFoundError: `source` does not exist.
    """
    if layout not in ("auto", "manifest") and layout not in LAYOUTS:
        raise ConfigError(unknown("layout", layout, ["auto", "manifest", *LAYOUTS]))
    source = Path(source)
    if not source.exists():
        raise DataNotFoundError(f"there is no file or folder {source}")
    found = _from_folder(source, layout) if source.is_dir() else _from_file(source, layout)
    if not found:
        looked = LOOKED_FOR if layout == "auto" else {layout: LOOKED_FOR.get(layout, layout)}
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
        path: Of the manifest, ending in `.jsonl`; its folder is created if missing.
        utterances: What to write, in this order.

    Returns:
        The path.

    Raises:
        ConfigError: the path has another suffix.
    """
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        raise ConfigError(f"a manifest is written as JSON lines: name it *.jsonl, got {path.name}")
    lines = [json.dumps(_row(item, path.parent)) + "\n" for item in utterances]
    return atomic_write(path, "".join(lines))


def _row(item: Utterance, folder: Path) -> dict[str, Any]:
    below = item.path.is_relative_to(folder)
    path = item.path.relative_to(folder) if below else item.path.absolute()
    given = {name: value for name in FIELDS if (value := getattr(item, name)) is not None}
    measured = {} if math.isnan(item.seconds) else {"seconds": float(item.seconds)}
    return {"path": path.as_posix(), **given, **measured}
