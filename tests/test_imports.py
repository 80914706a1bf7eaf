"""Cost of importing, names in the faces of the rooms, and refused imports."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import lora_lightning
from tests.conftest import STAGES, there

PACKAGE = Path(lora_lightning.__file__).parent
FACES = sorted(PACKAGE.rglob("__init__.pyi"))

# Packages that only some modules need: whoever imports lora_lightning does not pay for them.
HEAVY = {
    "PIL", "direct", "espeakng_loader", "jiwer", "matplotlib", "omegaconf", "panda3d",
    "pyroomacoustics", "rich", "safetensors", "scipy", "sklearn", "soundfile", "timm",
    "torchaudio", "torchmetrics", "torchvision", "trimesh",
}  # fmt: skip


def brought(stage: str) -> set[str]:
    """Top-level packages that a stage of `tests.conftest` brought into this process."""
    before = list(STAGES)[list(STAGES).index(stage) - 1]
    return there[stage] - there[before]


def test_importing_the_package_imports_next_to_nothing():
    assert not brought("the package") & (HEAVY | {"torch", "lightning"})


def test_importing_every_public_name_imports_nothing_heavy():
    # What torch and lightning themselves bring along is not ours.
    assert not brought("every public name") & HEAVY


def test_the_tests_of_imports_can_fail():
    assert not there["pytest"] & (HEAVY | {"torch", "lightning"}), "pytest or a plugin has it"
    assert "omegaconf" in brought("recipes")


# ---- faces ---------------------------------------------------------------------------------


def name_of(stub: Path) -> str:
    return ".".join(stub.parent.relative_to(PACKAGE.parent).parts)


@pytest.mark.parametrize("stub", FACES, ids=name_of)
def test_public_names_are_sorted_and_exist(stub):
    face = importlib.import_module(name_of(stub))
    assert face.__all__ == sorted(face.__all__)
    for name in face.__all__:
        assert getattr(face, name) is not None
    assert set(face.__all__) <= set(dir(face))
    with pytest.raises(AttributeError, match=r"attribute '?adapter\b"):
        face.adapter  # noqa: B018


@pytest.mark.parametrize("stub", FACES, ids=name_of)
def test_each_name_is_told_once_and_typed(stub):
    face = importlib.import_module(name_of(stub))
    # `from .file import name as name`: only this form counts as public for a type checker.
    told = [
        (alias.name, alias.asname)
        for line in ast.parse(stub.read_text()).body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    ]
    assert sorted(told) == [(name, name) for name in face.__all__]
    beside = {path.stem for path in stub.parent.iterdir()}
    assert not beside & set(face.__all__), "a file takes the place of a name, once imported"


def test_the_public_names_are_these_and_the_version():
    assert len(lora_lightning.__all__) == 31
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", lora_lightning.__version__)
    with pytest.raises(AttributeError, match="no attribute 'adapter'"):
        lora_lightning.adapter  # noqa: B018


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()


# ---- the rule of imports -------------------------------------------------------------------


def test_an_import_from_a_floor_above_is_found(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PACKAGE.parent / "pyproject.toml", tmp_path)
    with (tmp_path / PACKAGE.name / "linalg/decompose.py").open("a") as file:
        file.write("from lora_lightning.training import lora_callback\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [shutil.which("lint-imports") or "lint-imports", "--no-cache"]
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert out.returncode == 1, out.stdout + out.stderr
    said = " ".join(out.stdout.split())
    assert "Rooms import lower floors only BROKEN" in said
    assert "lora_lightning.linalg.decompose -> lora_lightning.training.lora_callback" in said
