"""What holds for every test, and fixtures that rooms share."""

from __future__ import annotations

import os

import pytest
import torch

from lora_lightning import fused
from lora_lightning.lora.fused import thin_matmul

torch.set_num_threads(1)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole fast tier, of one thread each; none for a few files, for ``-s``,
    or for the slow tier, whose networks would not fit into memory side by side."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    fast = config.option.markexpr == "not slow and not cuda" and config.option.capture != "no"
    return min(2, os.cpu_count() or 1) if whole and fast else 0


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def fused_at_any_size():
    """Tiny inputs take the path of real ones."""
    with fused(smallest=0):
        yield


@pytest.fixture
def as_if_inputs_were_large():
    """No input is too small; backward passes go in pieces of few rows, on two threads."""
    with pytest.MonkeyPatch.context() as patch, fused(smallest=0):
        patch.setattr(thin_matmul, "_PIECE", 32)
        patch.setattr(thin_matmul, "_FEWEST", 2)
        patch.setattr(thin_matmul, "_WORTH", 0)
        patch.setattr(torch, "get_num_threads", lambda: 2)
        yield
