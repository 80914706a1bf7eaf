"""`atomic_write`: a file is complete or not there (a killed write: test_adapter_file.py)."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from lora_lightning.report.cells import cell
from lora_lightning.report.files import atomic_write, check_writable, scratch_folder


def test_a_file_is_replaced_and_readable_by_those_whom_the_umask_allows(tmp_path: Path) -> None:
    path = tmp_path / "made" / "here" / f"{'x' * 200}.json"
    assert atomic_write(path, b"old") == path
    before = os.umask(0o027)
    try:
        atomic_write(path, b"new")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = atomic_write(tmp_path / "a.json", b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_runs_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """Of the same file or set, and of no process that still runs."""
    dead, of_another = tmp_path / ".a.json.abcd_123.tmp", tmp_path / ".b.json.abcd_123.tmp"
    for path in (dead, of_another, tmp_path / ".a.json.mine.tmp"):
        path.touch()
    (tmp_path / ".s3-abcd_123" / "fresh").mkdir(parents=True)
    with scratch_folder(tmp_path / "s3") as first, scratch_folder(tmp_path / "s3") as second:
        assert not (tmp_path / ".s3-abcd_123").exists()
        assert first.is_dir()
        assert second.is_dir()
        handle = os.open(held := tmp_path / ".a.json.held_123.tmp", os.O_CREAT | os.O_WRONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        atomic_write(tmp_path / "a.json", b"new")
        assert held.exists()
        os.close(handle)
    atomic_write(tmp_path / "a.json", b"new")
    left = {".a.json.mine.tmp", of_another.name, "a.json"}
    assert {p.name for p in tmp_path.iterdir()} == left


def test_a_failed_write_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.json", tmp_path / ("x" * 300)):
        with pytest.raises(OSError, match=r"file|long") as caught:
            atomic_write(path, b"")
        assert caught.value.filename == str(path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "file" / "more", tmp_path / "loop" / "more"):
        with pytest.raises(NotADirectoryError):
            check_writable(path)
    check_writable(tmp_path / "made" / "later")


def test_a_pipe_or_device_is_not_replaced(tmp_path: Path) -> None:
    """A root's ``--out /dev/null`` would take it from everybody."""
    os.mkfifo(pipe := tmp_path / "pipe")
    (link := tmp_path / "link").symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(FileExistsError, match="there is a pipe of this name"):
            atomic_write(path, b"")
    assert {p.name for p in tmp_path.iterdir()} == {"pipe", "link"}
    assert pipe.is_fifo()


def test_text_holds_names_that_are_no_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(b"n\xffght \xc3\xa9")
    assert atomic_write(tmp_path / "a.csv", name).read_bytes() == b"n\\udcffght \xc3\xa9"


@pytest.mark.parametrize("text", ["=1+1", "+a", "-a", "@x", "\t=1", "\r=1", " =1", "＝1"])
def test_cells_are_no_formulas(text: str) -> None:
    assert cell(text) == f"'{text}"
    assert cell(f"a{text}") == f"a{text}"


@pytest.mark.parametrize("value", ["-5.25", "+3", "", -4.0, None, 3])
def test_numbers_stay_numbers(value: object) -> None:
    assert cell(value) == value
