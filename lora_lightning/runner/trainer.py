"""`make_trainer`: a quiet Trainer from a run's settings; torch's threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from lightning.pytorch.utilities import rank_zero_only

from lora_lightning.errors import ConfigError, MissingDependencyError
from lora_lightning.registry import Registry
from lora_lightning.runner.settings import RunConfig

LOGS = "logs"  # folder of a run's logs, in its own
PROJECT = "lora-lightning"  # of W&B, and MLflow's experiment
# Name → a logger that writes into this folder; the name is that of the extra which brings it, too.
LOGGERS: Registry[Callable[[str], Logger]] = Registry("logger")


@LOGGERS.register("csv")
def _csv(folder: str) -> Logger:
    return CSVLogger(folder, name=LOGS)


@LOGGERS.register("tensorboard")
def _tensorboard(folder: str) -> Logger:
    return TensorBoardLogger(folder, name=LOGS)


@LOGGERS.register("wandb")
def _wandb(folder: str) -> Logger:
    quiet = {"quiet": True, "console": "off"}  # thirty lines a training, among the bars
    if os.environ.get("WANDB_MODE") == "offline":
        quiet["silent"] = True  # without an address, what is left says nothing
    return _OneTraining(project=PROJECT, save_dir=_made(folder), settings=quiet)


@LOGGERS.register("mlflow")
def _mlflow(folder: str) -> Logger:
    # A database, as MLflow 3.13 refuses plain files; a server where the environment names one.
    logs = _made(folder)
    where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{logs / 'mlflow.db'}"
    return _Explained(PROJECT, tracking_uri=where)


def _made(folder: str) -> Path:
    logs = Path(folder, LOGS).absolute()
    logs.mkdir(parents=True, exist_ok=True)
    return logs


class _Explained(MLFlowLogger):
    """Says what to do where its server does not answer."""

    @property
    def experiment(self) -> Any:
        with _explained("mlflow", "unset MLFLOW_TRACKING_URI to log"):
            return super().experiment


class _OneTraining(WandbLogger):
    """Ends its run with the training: the next one of this process would log into it too."""

    @property
    def experiment(self) -> Any:
        with _explained("wandb", "set WANDB_MODE=offline to log"):
            return super().experiment

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(status != "success"))


@contextmanager
def _explained(name: str, instead: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of many kinds: no key, no server, no right to write
        raise ConfigError(
            f"logger={name} cannot log ({error}); {instead} into the run's folder alone"
        ) from error


def _logger(name: str, folder: str) -> Logger:
    make = LOGGERS.get(name)
    try:
        return make(folder)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"logger={name} needs a package that is not installed: pip install "
            f'"lora-lightning[{name}]", or take logger=csv'
        ) from error


MOST_DEVICES = 1024  # of one machine; Lightning makes a list of them


def make_trainer(
    config: RunConfig,
    callbacks: Sequence[Callback] = (),
    max_epochs: int = 0,
    max_steps: int = -1,
    **settings: Any,
) -> Trainer:
    """A trainer without output, which logs only by `config.logger`.

    Without epochs or steps it predicts: on one device, so that no item is missing or doubled.

    Raises:
        ConfigError: there is no such accelerator, or not here; no such logger; too many devices.
        MissingDependencyError: the logger's package is not installed.
    """
    if not 1 <= config.devices <= MOST_DEVICES:
        raise ConfigError(f"devices={config.devices} is out of range: from 1 to {MOST_DEVICES}")
    trains = max_epochs != 0 or max_steps > 0
    logger = _logger(config.logger, config.out) if trains and config.logger else False
    if logger:
        settings["log_every_n_steps"] = 1  # a target has few batches
    try:
        return Trainer(
            max_epochs=max_epochs,
            max_steps=max_steps,
            accelerator=config.accelerator,
            devices=config.devices if trains else 1,
            logger=logger,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
            default_root_dir=config.out,
            **settings,
        )
    except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
        raise ConfigError(
            f"accelerator={config.accelerator} cannot be used here ({error}); try cpu or auto"
        ) from error


def in_rounds(steps: int) -> dict[str, int]:
    """Trainer arguments for a callback that changes the training items in every round."""
    return {"max_epochs": -1, "max_steps": steps, "reload_dataloaders_every_n_epochs": 1}


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Within the block torch uses this number of CPU threads; None: its default."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(max(count, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
