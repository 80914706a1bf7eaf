"""What importing costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lora_lightning

PACKAGE = Path(lora_lightning.__file__).parent

# Packages that only some modules need: whoever imports lora_lightning does not pay for them.
HEAVY = {
    "PIL", "direct", "espeakng_loader", "jiwer", "matplotlib", "omegaconf", "panda3d",
    "pyroomacoustics", "rich", "safetensors", "scipy", "sklearn", "soundfile", "timm",
    "torchaudio", "torchmetrics", "torchvision", "trimesh",
}  # fmt: skip


STAGES = {
    "the package": "import lora_lightning",
    "torch and lightning": "import torch, lightning.pytorch",
    "every public name": "from lora_lightning import *",
    "recipes": "import lora_lightning.runner.loading",
}


@pytest.fixture(scope="module")
def brought() -> dict[str, set[str]]:
    """Stage → top-level packages that it brought into a fresh process."""
    lines = ["import json, sys; t = []"]
    lines += [f"{s}; t.append(sorted(sys.modules))" for s in STAGES.values()]
    program = "\n".join([*lines, "print(json.dumps(t))"])
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], check=True, capture_output=True, text=True
    )
    found: dict[str, set[str]] = {}
    before: set[str] = set()
    for stage, names in zip(STAGES, json.loads(out.stdout.splitlines()[-1]), strict=True):
        now = {name.partition(".")[0] for name in names}
        found[stage], before = now - before, now
    return found


def test_importing_the_package_imports_next_to_nothing(brought):
    assert not brought["the package"] & (HEAVY | {"torch", "lightning"})


def test_importing_every_public_name_imports_nothing_heavy(brought):
    # What torch and lightning themselves bring along is not ours.
    assert not brought["every public name"] & HEAVY


def test_the_test_of_imports_can_fail(brought):
    assert "omegaconf" in brought["recipes"]


def test_public_names_are_sorted_and_exist():
    assert lora_lightning.__all__ == sorted(lora_lightning.__all__)
    assert sorted(lora_lightning._HOME) == lora_lightning.__all__
    for name in lora_lightning.__all__:
        assert getattr(lora_lightning, name) is not None
    assert set(lora_lightning.__all__) <= set(dir(lora_lightning))
    with pytest.raises(AttributeError, match="no attribute 'adapter'"):
        lora_lightning.adapter  # noqa: B018


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()
