"""What every kind of run needs: a quiet trainer, threads, checks of the plan, versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Protocol

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer

from lora_lightning.errors import ConfigError
from lora_lightning.registry import unknown
from lora_lightning.runner.sweep import rank_of


class RunConfig(Protocol):
    """What `make_trainer` reads of a run's configuration."""

    accelerator: str
    out: str


def make_trainer(
    config: RunConfig,
    callbacks: Sequence[Callback] = (),
    max_epochs: int = 0,
    max_steps: int = -1,
    **settings: Any,
) -> Trainer:
    """A trainer that shows nothing and writes nothing by itself.

    Raises:
        ConfigError: there is no such accelerator, or not here.
    """
    try:
        return Trainer(
            max_epochs=max_epochs,
            max_steps=max_steps,
            accelerator=config.accelerator,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
            default_root_dir=config.out,
            **settings,
        )
    except (MisconfigurationException, ValueError) as error:
        raise ConfigError(
            f"accelerator={config.accelerator} cannot be used here ({error}); try cpu or auto"
        ) from error


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Within the block torch uses so many threads of the CPU; None: as many as it would."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(max(count, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_plan(methods: Sequence[str], seeds: Sequence[int], known: Collection[str]) -> None:
    """Raise ConfigError for a method that is not known, or seeds that cannot be used."""
    for name in methods:
        if name not in known and (rank_of(name) is None or "lora" not in known):
            raise ConfigError(f"methods: {unknown('method', name, known)}")
    if not seeds or not methods:
        raise ConfigError("seeds and methods must not be empty")
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds must be different and 0 or more, got {list(seeds)}")


def versions(*packages: str) -> dict[str, str]:
    """Name → version of what a run depends on; `packages` are further ones. Hardware last."""
    found = {"lora-lightning": version("lora-lightning"), "python": platform.python_version()}
    found["torch"] = torch.__version__
    found |= {name: version(name) for name in ("lightning", *packages)}
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {**found, "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores{gpu}"}
