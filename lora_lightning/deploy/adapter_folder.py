"""`AdapterFolder`: the adapter files in a folder by name, looked at again every second."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_lightning.errors import AdapterFileError

_ENDING = ".safetensors"


@dataclass(frozen=True)
class AdapterFile:
    """A file, and what changes with its contents: time, size and inode."""

    path: Path
    version: tuple[int, int, int]


class AdapterFolder:
    """Name → adapter file; the names are those that the folder lists, without their ending.

    Args:
        path: The folder; it may be empty, and change while it is served.
        seconds: For so long what it listed is believed.

    Raises:
        AdapterFileError: there is no such folder.
    """

    def __init__(self, path: Path, seconds: float = 1.0):
        if not path.is_dir():
            raise AdapterFileError(f"{path} is no folder; give one, for adapter files")
        self.path, self.seconds = path, seconds
        self._files: dict[str, AdapterFile] = {}
        self._until = 0.0

    def files(self, now: bool = False) -> Mapping[str, AdapterFile]:
        """The files by name; `now`: listed at once."""
        if now or time.monotonic() >= self._until:
            self._files = _listed(self.path)
            self._until = time.monotonic() + self.seconds
        return self._files


def _listed(folder: Path) -> dict[str, AdapterFile]:
    try:
        with os.scandir(folder) as entries:
            visible = [e for e in entries if not e.name.startswith(".")]
    except OSError:  # removed, or not mounted for now: it holds no adapters
        return {}
    found = {}
    for entry in visible:
        name = entry.name.removesuffix(_ENDING)
        if name != entry.name and (version := _version(entry)) is not None:
            found[name] = AdapterFile(folder / entry.name, version)
    return found


def _version(entry: os.DirEntry[str]) -> tuple[int, int, int] | None:
    try:
        told = entry.stat()
    except OSError:  # removed since it was listed
        return None
    regular = stat.S_ISREG(told.st_mode)
    return (told.st_mtime_ns, told.st_size, told.st_ino) if regular else None
