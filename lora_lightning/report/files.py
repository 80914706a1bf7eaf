"""`atomic_write`: files that are complete or not there; what killed runs leave is removed."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is removed there
    fcntl = None  # type: ignore[assignment]


def atomic_write(path: Path, content: bytes | str) -> Path:
    """Write a temporary file beside `path` and rename it to `path` in one step.

    Folders are made; a write that fails, or is killed, leaves the old file. The temporary files of
    killed writes of `path` are removed. Text is written as UTF-8; of names of files, bytes that are
    none are written out.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and (what := no_file(path)) not in ("", "folder"):
            # What is renamed to it would take its place, a root's /dev/null included.
            raise FileExistsError(errno.EEXIST, f"there is a {what} of this name")
        _write(path, data)
    except OSError as error:
        if error.errno is not None:  # that of the temporary file would tell nobody anything
            error.filename, error.filename2 = os.fspath(path), None
        raise
    return path


def write_plot(out: Path, name: str, svg: bytes | None) -> None:
    """Write plots/NAME.svg, or none; that of an earlier run does not stay, nor its PNG of before.

    Raises:
        OSError: it cannot be written.
    """
    (out / "plots" / f"{name}.png").unlink(missing_ok=True)
    path = out / "plots" / f"{name}.svg"
    path.unlink(missing_ok=True) if svg is None else atomic_write(path, svg)


def no_file(path: Path) -> str:
    """What is there in place of a regular file, which alone can be read to an end; "" where it is.

    Raises:
        OSError: there is nothing.
    """
    mode = path.stat().st_mode
    kinds = {"": stat.S_ISREG, "folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO}
    kinds["socket"] = stat.S_ISSOCK
    return next((name for name, is_kind in kinds.items() if is_kind(mode)), "device")


def check_writable(folder: Path) -> None:
    """Raise OSError where this folder cannot be made, or nothing be written into it."""
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    if not os.access(there, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


def _write(path: Path, content: bytes) -> None:
    prefix = f".{path.name[:40]}."
    _remove_leftovers(path.parent, prefix, ".tmp")
    handle, temporary = _held(lambda: tempfile.mkstemp(".tmp", prefix, path.parent))
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
            os.chmod(temporary, _usual_mode())  # mkstemp's files are private
            if fcntl is not None:
                os.replace(temporary, path)  # while it is locked
        if fcntl is None:  # Windows moves no file that is open
            os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """A temporary folder beside this one; those that killed runs left there are removed."""
    prefix = f".{beside.name[:40]}-"
    _remove_leftovers(beside.parent, prefix, "")

    def make() -> tuple[int, str]:
        name = tempfile.mkdtemp(prefix=prefix, dir=beside.parent)
        return -1 if fcntl is None else os.open(name, os.O_RDONLY), name

    handle, name = _held(make)
    try:
        yield Path(name)
    finally:
        shutil.rmtree(name, ignore_errors=True)
        if handle >= 0:
            os.close(handle)


def _held(make: Callable[[], tuple[int, str]]) -> tuple[int, str]:
    """A new file or folder, (handle, name), locked until the handle is closed.

    The system closes it where the process is killed, so that what nobody holds is a leftover.
    """
    while True:
        handle, name = make()
        if fcntl is not None:
            with suppress(OSError):  # file systems without locks: then nothing is removed either
                fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.lexists(name):  # else another process was faster than the lock
            return handle, name
        os.close(handle)


def _remove_leftovers(folder: Path, prefix: str, suffix: str) -> None:
    """Remove temporary files and folders of this name that no running process holds."""
    if fcntl is None:
        return
    made = re.compile(re.escape(prefix) + "[a-z0-9_]{8}" + re.escape(suffix))
    with os.scandir(folder) as entries:
        found = [entry.path for entry in entries if made.fullmatch(entry.name)]
    for path in found:
        with suppress(OSError):  # held, or removed by another process
            _remove(path)


def _remove(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
    finally:
        os.close(handle)


def _usual_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
