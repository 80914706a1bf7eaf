"""Processes that Lightning starts itself (``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``).

No hook of a callback runs in the process that starts them, and after a fit that process takes over
the weights which its own module has a place for: the adapter must be there before they start.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn

from lora_lightning.errors import ConfigError


class LaunchedCallback(Callback):
    """A callback that knows of the process which starts the others.

    Its public attributes that end with an underscore are brought back there from the first of them.
    """

    _known_there = False  # in the process that starts the others

    def before_launch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called there, before they start."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to begin in a process whose results would be lost.

        Raises:
            ConfigError: the process which started this one does not know of the callback.
        """
        if _is_launched_fit(trainer) and not self._known_there:
            raise ConfigError(
                f"{type(self).__name__} comes from configure_callbacks, which is called in the "
                "processes that this strategy starts, so that what it finds would be lost with "
                'them: give it to Trainer(callbacks=[...]), or use strategy="ddp"'
            )

    def held(self) -> dict[str, Any]:
        """What is brought back, called in the first of them at the end; it must be picklable."""
        own = vars(self).items()
        return {k: v for k, v in own if k.endswith("_") and not k.startswith("_")}

    def take(self, trainer: Trainer, pl_module: LightningModule, held: dict[str, Any]) -> None:
        """Take what `held` gave, in the process that started them, before the weights come."""
        vars(self).update(held)


class _Results(NamedTuple):
    """What a started process gives back.

    What callbacks hold is in a file: the process cannot end before all that it returns is read,
    and is not read before it has ended, so that more than a pipe holds (64 kB) would block both.
    """

    result: Any
    held: Path


class _Function:
    """A Trainer's function, as the others run it: what callbacks hold at its end comes with it."""

    def __init__(
        self, function: Callable[..., Any], callbacks: Sequence[LaunchedCallback], file: Path
    ):
        self.function, self.callbacks, self.file = function, callbacks, file

    def __call__(self, *args: Any, **kwargs: Any) -> _Results:
        result = self.function(*args, **kwargs)
        if os.environ["LOCAL_RANK"] == "0":  # as Lightning has set it
            self.file.write_bytes(pickle.dumps([c.held() for c in self.callbacks]))
        return _Results(result, self.file)


def launched(trainer: Trainer) -> list[LaunchedCallback]:
    """The trainer's callbacks of this kind, and the one that a task keeps and adds itself."""
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    course = vars(trainer.lightning_module).get(COURSE)
    return [c for c in [*callbacks, course] if isinstance(c, LaunchedCallback)]


def _is_launched_fit(trainer: Trainer) -> bool:
    starts = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
    return starts and trainer.state.fn == TrainerFn.FITTING


COURSE = "_course"  # a task's attribute
_lightnings = _MultiProcessingLauncher.launch
_lightnings_recover = _MultiProcessingLauncher._recover_results_in_main_process


@wraps(_lightnings)
def _launch(
    self: Any, function: Any, *args: Any, trainer: Trainer | None = None, **kwargs: Any
) -> Any:
    if trainer is None or not (own := launched(trainer)):
        return _lightnings(self, function, *args, trainer=trainer, **kwargs)
    for callback in own:
        callback._known_there = True
        callback.before_launch(trainer, trainer.lightning_module)
    with TemporaryDirectory() as folder:
        wrapped = _Function(function, own, Path(folder, "held.pkl"))
        return _lightnings(self, wrapped, *args, trainer=trainer, **kwargs).result


@wraps(_lightnings_recover)
def _recover(self: Any, output: Any, trainer: Trainer) -> None:
    if isinstance(found := output.trainer_results, _Results):
        module = trainer.lightning_module
        module.trainer = trainer  # as where no process is started
        values = pickle.loads(found.held.read_bytes())  # of our own process
        for callback, held in zip(launched(trainer), values, strict=True):
            callback.take(trainer, module, held)
    _lightnings_recover(self, output, trainer)


# Lightning has no hooks there; trainers without a callback of ours are left alone.
_MultiProcessingLauncher.launch = _launch  # type: ignore[method-assign]
_MultiProcessingLauncher._recover_results_in_main_process = _recover  # type: ignore


def check_returned(trainer: Trainer, backbone: str) -> None:
    """Refuse to train an adapter that the process which started this one would not get back.

    Raises:
        ConfigError: this process was started by the trainer, before the adapter was there.
    """
    if _is_launched_fit(trainer):
        raise ConfigError(
            f"the processes that this strategy starts give weights back to the module as it was "
            f"before, which has no backbone={backbone!r} to adapt then: build the network in its "
            '__init__, or use strategy="ddp"'
        )
