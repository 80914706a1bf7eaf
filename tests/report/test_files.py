"""`atomic_write`: a file is complete or not there (a killed write: test_adapter_file.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_lightning.report.files import atomic_write


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
