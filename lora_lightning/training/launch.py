"""Processes that Lightning starts itself (``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``).

No hook of a callback runs in the process that starts them, and after a fit that process takes over
the weights which its own module has a place for: the adapter must be there before they start.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import wraps
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn

from lora_lightning.errors import ConfigError


class LaunchedCallback(Callback):
    """A callback that knows of the process which starts the others.

    Its public attributes that end with an underscore are brought back there from the first of them.
    """

    def before_launch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called there, before they start."""


class _Function:
    """A Trainer's function, as the others run it: what callbacks hold at its end is returned too.

    As bytes, which Lightning does not look into.
    """

    def __init__(self, function: Callable[..., Any], trainer: Trainer):
        self.function, self.trainer = function, trainer

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, bytes]:
        result = self.function(*args, **kwargs)
        return result, pickle.dumps([_held(c) for c in launched(self.trainer)])


def launched(trainer: Trainer) -> list[LaunchedCallback]:
    """The trainer's callbacks of this kind."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if isinstance(c, LaunchedCallback)]


def _held(callback: Callback) -> dict[str, Any]:
    return {k: v for k, v in vars(callback).items() if k.endswith("_") and not k.startswith("_")}


_lightnings = _MultiProcessingLauncher.launch


@wraps(_lightnings)
def _launch(
    self: Any, function: Any, *args: Any, trainer: Trainer | None = None, **kwargs: Any
) -> Any:
    if trainer is None or not (own := launched(trainer)):
        return _lightnings(self, function, *args, trainer=trainer, **kwargs)
    for callback in own:
        callback.before_launch(trainer, trainer.lightning_module)
    whole = _Function(function, trainer)
    result, held = _lightnings(self, whole, *args, trainer=trainer, **kwargs)
    for callback, values in zip(own, pickle.loads(held), strict=True):  # of our own process
        vars(callback).update(values)
    return result


# Lightning has no hook there; trainers without a callback of ours are left alone.
_MultiProcessingLauncher.launch = _launch  # type: ignore[method-assign]


def check_returned(trainer: Trainer, backbone: str) -> None:
    """Refuse to train an adapter that the process which started this one would not get back.

    Raises:
        ConfigError: this process was started by the trainer, before the adapter was there.
    """
    starts = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
    if starts and trainer.state.fn == TrainerFn.FITTING:
        raise ConfigError(
            f"the processes that this strategy starts give weights back to the module as it was "
            f"before, which has no backbone={backbone!r} to adapt then: build the network in its "
            '__init__, or use strategy="ddp"'
        )
