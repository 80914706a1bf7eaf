"""`made_set`: a folder of generated files, cached and checked by hash.

A set is described by its settings. It is used again where the folder holds exactly the files
of these settings, every byte as written; else it is generated again in a temporary folder, and
moved there in one step, so that a run that is killed leaves no incomplete set.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lora_lightning.errors import DataError
from lora_lightning.report.files import scratch_folder

MANIFEST = "manifest.json"
T = TypeVar("T")


def made_set(
    root: Path | str | None,
    kind: str,
    settings: Mapping[str, Any],
    files: Sequence[str],
    make: Callable[[Path], Mapping[str, Any]],
    own: Collection[str],
) -> Path:
    """The folder of a set, made where it is not there.

    Args:
        root: the folder; by default one in the cache, named by the settings
            (`$LORA_LIGHTNING_CACHE`, or else `~/.cache/lora-lightning`).
        kind: what the set is, in one word, such as "rendered".
        settings: all that decides on the content; as JSON has it.
        files: every file of the set, relative to the folder.
        make: writes the files into a new folder, and returns further facts for the manifest.
        own: names of files and folders that a set of this kind has at its top.

    Raises:
        DataError: `root` holds something else than such a set.
    """
    folder = _cache_folder(kind, settings) if root is None else Path(root)
    if _complete(folder, settings, files):
        return folder
    _refuse_foreign(folder, kind, own)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder) as scratch:
        fresh = scratch / "fresh"
        for parent in {(fresh / name).parent for name in files}:
            parent.mkdir(parents=True, exist_ok=True)
        facts = {"settings": settings, **make(fresh), "files": len(files)}
        facts["files_sha256"] = _hash_files(fresh, files)
        (fresh / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n")
        if folder.exists():  # a folder must be moved away before it is replaced
            os.replace(folder, scratch / "old")
        os.replace(fresh, folder)
    return folder


def _cache_folder(kind: str, settings: Mapping[str, Any]) -> Path:
    base = os.environ.get("LORA_LIGHTNING_CACHE") or Path.home() / ".cache" / "lora-lightning"
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return Path(base, kind, digest[:16])


def _complete(folder: Path, settings: Mapping[str, Any], files: Sequence[str]) -> bool:
    """Whether the folder holds exactly this set, every byte of every file as written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["settings"] != settings:
            return False
        found = sum(path.is_file() for path in folder.rglob("*")) - 1
        return found == len(files) and manifest["files_sha256"] == _hash_files(folder, files)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # missing or damaged


def _hash_files(folder: Path, files: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in files:
        content = (folder / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _refuse_foreign(folder: Path, kind: str, own: Collection[str]) -> None:
    """Raise DataError for a folder that is not a generated set."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: name a folder for the {kind} set")
    names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    strange = sorted(names - set(own) - {MANIFEST})
    if names and (strange or MANIFEST not in names):
        what = f"holds {strange[0]!r}" if strange else f"has no {MANIFEST}"
        raise DataError(
            f"{folder} {what}, so it is not a {kind} set and is left as it is: "
            "name an empty or a new folder, or remove it yourself"
        )


@contextmanager
def progress(items: Sequence[T], description: str, show: bool) -> Iterator[Iterable[T]]:
    """The items, with a progress bar on standard error while they are iterated over."""
    if not show:
        yield items
        return
    from rich.progress import Progress

    from lora_lightning.report.console import PlainConsole

    with Progress(console=PlainConsole(stderr=True), transient=True) as bar:
        yield bar.track(items, description=description)
