"""Settings of every test, and fixtures that rooms share."""

from __future__ import annotations

import functools
import gc
import os
import sys
import warnings
from pathlib import Path

import pytest

# What is imported step by step, and the modules that were there after each: for test_imports.py.
STAGES = {
    "pytest": "",
    "the package": "import lora_lightning",
    "torch and lightning": "import torch, lightning.pytorch",
    "every public name": "from lora_lightning import *",
    "recipes": "import lora_lightning.runner.loading",
}
there: dict[str, set[str]] = {}
_WARNINGS = "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"


def pytest_configure(config: pytest.Config) -> None:
    """One thread for torch, and no advice of Lightning's (workers, validation loaders, log
    intervals), which is not about our code: where tests run, as the process that hands them out to
    others needs neither package, and each takes seconds to import."""
    if config.option.dist == "no" or hasattr(config, "workerinput"):
        gc.disable()  # until all is imported, of which nothing is garbage
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for stage, line in STAGES.items():
                exec(line, {})
                there[stage] = {name.partition(".")[0] for name in sys.modules}

        import timm
        import torch
        from lightning.fabric.utilities import registry

        torch.set_num_threads(1)
        # At the first backward pass autograd starts a thread for each device besides the CPU, and
        # processes forked then cannot train: torch.export and torch.compile have it count eight.
        torch.ones((), requires_grad=True).backward()
        # Each Trainer asks every package that is installed for callbacks, of which there are none.
        registry.entry_points = functools.cache(registry.entry_points)
        # Seeds for devices that are not there are queued, with a stack trace each: 1 ms a seed.
        if not torch.accelerator.is_available():
            for queue in (torch.cuda.random, torch.xpu.random, torch.mtia):
                queue._lazy_call = lambda *_, **__: None
        # Its blocks are alike: two show what six would.
        known = timm.models._registry._model_entrypoints
        known["test_vit"] = functools.partial(known["test_vit"], depth=2)
        config.addinivalue_line("filterwarnings", _WARNINGS)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What needs a GPU is not even imported where it is left out."""
    return (collection_path.name == "cuda" and "not cuda" in config.option.markexpr) or None


# Tests of these files share runs and sets that take seconds.
_SHARING = (
    "speech/test_recipe.py", "text/test_recipe.py", "runner/test_loading.py",
    "speech/test_speakers.py", "vision/test_pose_regressor.py", "vision/test_scene.py",
    "adaptation/test_measure.py", "adaptation/test_resume.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is shared comes first: of two processes one takes over what the other has left at the
    end, and would make it again."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(_SHARING))


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

    os.environ.pop("PL_GLOBAL_SEED", None)  # a run leaves it, and forked fits would start from it
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
