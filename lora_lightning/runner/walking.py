"""`files_below`: the files in a folder of the user's, and what in it cannot be read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Below(NamedTuple):
    """What lies in a folder at any depth, sorted.

    Attributes:
        files: All that is no folder: reading says why a pipe, or a link to nothing, gives nothing.
        unread: (path, why) of the folders that cannot be read.
    """

    files: list[Path]
    unread: list[tuple[Path, str]]


def files_below(folder: Path) -> Below:
    """What lies in a folder; names that begin with a dot are left out.

    Links to folders are followed, each folder once, so that links in a circle end.

    Raises:
        OSError: the folder itself cannot be read.
    """
    found = Below([], [])

    def failed(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise error
        found.unread.append((Path(error.filename), f"{error.strerror}: its files are not read"))

    seen = {os.path.realpath(folder)}
    for top, folders, names in os.walk(folder, onerror=failed, followlinks=True):
        own = {n: os.path.realpath(os.path.join(top, n)) for n in sorted(folders) if n[0] != "."}
        folders[:] = [n for n, real in own.items() if real not in seen]
        seen |= set(own.values())
        found.files.extend(Path(top, name) for name in names if name[0] != ".")
    found.files.sort()
    found.unread.sort()
    return found
