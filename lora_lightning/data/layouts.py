"""Folders of recordings in the layouts that are in use, each found as a list of `Utterance`.

`LAYOUTS` names them, in the order in which `lora_lightning.data.manifests.load_utterances` tries
them. Each is a function from a folder to its recordings; none at all: it is not laid out so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lora_lightning.data.audio import AUDIO
from lora_lightning.data.tables import read_table, read_text
from lora_lightning.data.utterances import Utterance
from lora_lightning.errors import DataError

COMMON_VOICE = (
    "validated.tsv",
    "train.tsv",
    "dev.tsv",
    "test.tsv",
)  # the first that is there is read


def visible(root: Path, pattern: str = "*") -> list[Path]:
    """Files under `root` whose names fit, sorted, without hidden ones and hidden folders."""
    return sorted(
        path
        for path in root.rglob(pattern)
        if not any(part.startswith(".") for part in path.relative_to(root).parts) and path.is_file()
    )


def recordings(root: Path) -> list[Path]:
    """Audio files under `root`, sorted."""
    return [path for path in visible(root) if path.suffix.lower() in AUDIO]


def librispeech(root: Path) -> list[Utterance]:
    """`<speaker>/<chapter>/*.trans.txt` with a line `<name> <TEXT>` for each `<name>.flac`.

    Panayotov et al., "Librispeech: an ASR corpus based on public domain audio books", 2015.
    """
    found = []
    for listing in visible(root, "*.trans.txt"):
        speaker = listing.parent.parent.name
        for number, line in enumerate(read_text(listing).split("\n"), start=1):
            name, _, text = line.strip().partition(" ")
            if not name:
                continue
            if not text:
                raise DataError(f"{listing}, line {number}: expected '<name> <TEXT>', got {line!r}")
            found.append(Utterance(listing.with_name(f"{name}.flac"), text.strip(), speaker))
    return found


def common_voice(root: Path) -> list[Utterance]:
    """`validated.tsv`, or else `train.tsv`, `dev.tsv` or `test.tsv`, beside the folder `clips`.

    Ardila et al., "Common Voice: a massively-multilingual speech corpus", 2020.
    """
    if not (root / "clips").is_dir():
        return []
    tables = [root / name for name in COMMON_VOICE if (root / name).is_file()]
    return read_table(tables[0], root / "clips") if tables else []


def vctk(root: Path) -> list[Utterance]:
    """`wav48*/<speaker>/*` with `txt/<speaker>/*.txt`; the first of two microphones is taken.

    Yamagishi et al., "CSTR VCTK corpus", 2019.
    """
    folders = [p for p in sorted(root.glob("wav48*")) if p.is_dir()]
    if not folders or not (root / "txt").is_dir():
        return []
    found: dict[str, Utterance] = {}
    for path in recordings(folders[0]):  # _mic1 is sorted before _mic2
        speaker, name = path.parent.name, path.stem.removesuffix("_mic1").removesuffix("_mic2")
        if name not in found:
            said = root / "txt" / speaker / f"{name}.txt"
            found[name] = Utterance(path, _said(said), speaker)
    return list(found.values())


def folder(root: Path) -> list[Utterance]:
    """Audio files at any depth, each with its text in a `.txt` of the same name, if there is one.

    The speaker is the first folder below `root`, if the file lies in one.
    """
    found = []
    for path in recordings(root):
        parts = path.relative_to(root).parts
        speaker = parts[0] if len(parts) > 1 else None
        found.append(Utterance(path, _said(path.with_suffix(".txt")), speaker))
    return found


def _said(path: Path) -> str | None:
    """What a file of text says, in one line; None where there is no file."""
    return " ".join(read_text(path).split()) if path.is_file() else None


LAYOUTS: dict[str, Callable[[Path], list[Utterance]]] = {
    "librispeech": librispeech,
    "commonvoice": common_voice,
    "vctk": vctk,
    "folder": folder,
}
LOOKED_FOR = {
    "manifest": "a .csv, .tsv or .jsonl file",
    "librispeech": "<speaker>/<chapter>/*.trans.txt beside *.flac",
    "commonvoice": f"{' or '.join(COMMON_VOICE)} beside clips/",
    "vctk": "wav48*/<speaker>/ and txt/<speaker>/",
    "folder": f"audio files ({' '.join(sorted(AUDIO))})",
}
