"""Settings of every test, and fixtures that rooms share."""

from __future__ import annotations

import functools
import gc
import os

import pytest

_WARNINGS = "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"


def pytest_configure(config: pytest.Config) -> None:
    """One thread for torch, and no advice of Lightning's (workers, validation loaders, log
    intervals), which is not about our code: where tests run, as the process that hands them out to
    others needs neither package, and each takes seconds to import."""
    if config.option.dist == "no" or hasattr(config, "workerinput"):
        gc.disable()  # until all is imported, of which nothing is garbage

        import torch
        from lightning.fabric.utilities import registry

        torch.set_num_threads(1)
        # At the first backward pass autograd starts a thread for each device besides the CPU, and
        # processes forked then cannot train: torch.export and torch.compile have it count eight.
        torch.ones((), requires_grad=True).backward()
        # Each Trainer asks every package that is installed for callbacks, of which there are none.
        registry.entry_points = functools.cache(registry.entry_points)
        config.addinivalue_line("filterwarnings", _WARNINGS)


def pytest_collection_finish() -> None:
    """What is imported need not be looked through at each collection, and collections are rarer:
    of the tests' time they took an eighth."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole fast tier, of one thread each; none for a few files, for ``-s``,
    or for the slow tier, whose networks would not fit into memory side by side."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    fast = config.option.markexpr == "not slow and not cuda" and config.option.capture != "no"
    return min(2, os.cpu_count() or 1) if whole and fast else 0


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture
def fused_at_any_size():
    """Tiny inputs take the path of real ones."""
    from lora_lightning import fused

    with fused(smallest=0):
        yield


@pytest.fixture
def as_if_inputs_were_large():
    """No input is too small; backward passes go in pieces of few rows, on two threads."""
    import torch

    from lora_lightning import fused
    from lora_lightning.lora.fused import thin_matmul

    with pytest.MonkeyPatch.context() as patch, fused(smallest=0):
        patch.setattr(thin_matmul, "_PIECE", 32)
        patch.setattr(thin_matmul, "_FEWEST", 2)
        patch.setattr(thin_matmul, "_WORTH", 0)
        patch.setattr(torch, "get_num_threads", lambda: 2)
        yield


@pytest.fixture
def undrawn(monkeypatch):
    """Leave out the plots, where a test is not about them: they take most of a report's time."""
    from lora_lightning.report import plots

    monkeypatch.setattr(plots, "PLOTS", {})
