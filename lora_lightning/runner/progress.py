"""Progress bars of a run's stages, and filters for Lightning's messages."""

from __future__ import annotations

import logging
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from lora_lightning.report.console import PlainConsole

# Warnings of Lightning about deliberate choices: loaders that load in this process
# (small data are in memory), no validation, and logging less often than there are batches.
_CHOSEN = (
    r".*does not have many workers.*",
    r".*number of training batches .* is smaller than the logging interval.*",
    r".*GPU available but not used.*",
    r".*MPS available but not used.*",
    r".*defined a `validation_step` but have no `val_dataloader`.*",
    # Lightning's own use of a class that torch deprecates.
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
)


MOST_LOSSES = 200  # points of a curve


class Stages:
    """Progress bars, one below the other; finished ones stay on the screen.

    They are shown from the first stage on, so that earlier output is not disturbed.
    """

    def __init__(self, console: PlainConsole | None = None):
        self.console = console or PlainConsole(stderr=True)
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
            TimeElapsedColumn(),
            console=self.console,
        )

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the bars as they are; later output is printed below them."""
        self._bars.stop()

    def stage(self, name: str, unit: str, total: float = 1) -> Callable[[int, int], None]:
        """Begin a stage; returns a function of (done, total)."""
        self._bars.start()
        task = self._bars.add_task(name, total=total, unit=unit)

        def tick(done: int, total: int) -> None:
            self._bars.update(task, completed=done, total=total)

        return tick

    def left_out(self, what: str, skipped: Sequence[tuple[str, str]]) -> None:
        """Print the inputs that are left out, counted by reason: (path, reason) of each."""
        if skipped:
            count = Counter(reason.partition(":")[0] for _, reason in skipped)
            told = ", ".join(f"{reason} × {number}" for reason, number in count.most_common())
            self.console.print(f"{len(skipped)} {what} left out ({told}):", style="yellow")
            for path, reason in skipped[:5]:
                self.console.print(f"  {path}: {reason}")


class Ticks(Callback):
    """Updates a stage's bar with the number of finished batches."""

    def __init__(self, tick: Callable[[int, int], None]):
        self.tick = tick

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Counts a training batch."""
        self.tick(trainer.global_step, int(trainer.estimated_stepping_batches))

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        """Ends the bar, also of a training that stops early."""
        done = max(trainer.global_step, 1)
        self.tick(done, done)

    def on_predict_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Counts a batch of predictions."""
        self.tick(batch_idx + 1, int(sum(trainer.num_predict_batches)))


class Losses(Callback):
    """Keeps the loss of each training batch."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """Keeps it where it is: a copy to the CPU would wait for the device."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._kept.append(loss.detach().reshape(()))

    def found(self, most: int = MOST_LOSSES) -> list[tuple[int, float]]:
        """(step, loss), each the mean of as many steps as leave `most` points."""
        if not self._kept:
            return []
        values = torch.stack(self._kept).double().cpu()
        width = -(-len(values) // most)
        return [
            (min(first + width, len(values)), float(values[first : first + width].mean()))
            for first in range(0, len(values), width)
        ]


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Within the block Lightning logs only problems."""
    loggers = [logging.getLogger(n) for n in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in _CHOSEN:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block Ctrl-C is a KeyboardInterrupt, also while Lightning trains.

    Lightning turns it into an exit with code 1, and leaves the signal ignored. A SIGTERM it
    turns into an exit with code 0, as if the run were complete.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None
