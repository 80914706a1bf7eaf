"""Progress bars of a run's stages, and filters for Lightning's messages."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column
from torch import Tensor

from lora_lightning.report.console import PlainConsole
from lora_lightning.report.metrics import shorten
from lora_lightning.report.sentences import by_reason
from lora_lightning.runner.counted_warnings import counted_warnings

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


def _cut() -> Column:
    return Column(no_wrap=True, overflow="ellipsis")


class Stage:
    """A stage's line: called with (done, total) it shows how far it is."""

    def __init__(self, bars: Progress, name: str, unit: str, total: float):
        self._bars, self.name, self._said = bars, name, ""
        self._task = bars.add_task(name, total=total, unit=unit, said="")

    def __call__(self, done: int, total: int) -> None:
        """Show so many of a total."""
        self._bars.update(self._task, completed=done, total=total)

    def say(self, text: str) -> None:
        """Show how it stands in the stage's own line, in place of what was said before."""
        self._said = text
        self._bars.update(self._task, said=shorten(text, 24))  # for 80 columns

    @property
    def finished(self) -> bool:
        """Whether all is done."""
        return bool(self._state.finished)

    @property
    def _state(self) -> Any:
        return next(task for task in self._bars.tasks if task.id == self._task)

    def end(self) -> str:
        """Take the line away; returns it as text."""
        task, said = self._state, f", {self._said}" if self._said else ""
        self._bars.remove_task(self._task)
        counted = f"{task.completed:.0f}/{task.total:.0f} {task.fields['unit']}"
        return f"✓ {self.name}: {counted}, {task.finished_time or 0:.1f} s{said}"


class Stages:
    """Progress bars of the stages at work; a finished one becomes a line of text above them.

    On a terminal a line is replaced in place while its stage is at work; elsewhere there is its
    last state alone. Warnings are counted, and listed once at the end. The bars are shown from the
    first stage on, so that earlier output is not disturbed.
    """

    def __init__(self, console: PlainConsole | None = None):
        self.console = console or PlainConsole(stderr=True)
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description}", markup=False, table_column=_cut()),
            BarColumn(bar_width=8),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[said]}", markup=False, table_column=_cut()),
            console=self.console,
        )
        self._counting = counted_warnings(self.console)
        self._stages: list[Stage] = []
        self.current: Stage | None = None

    def __enter__(self) -> Stages:
        self._counting.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._counting.__exit__(None, None, None)

    def stop(self) -> None:
        """Stop the bars as they are; later output is printed below them."""
        self.settle()
        self._bars.stop()

    def stage(self, name: str, unit: str, total: float = 1) -> Stage:
        """Begin a stage; returns a function of (done, total)."""
        self.settle()
        self._bars.start()
        self.current = Stage(self._bars, name, unit, total)
        self._stages.append(self.current)
        return self.current

    def line(self, text: str, style: str | None = None) -> None:
        """Print a line above the bars, cut to the console's width."""
        self.console.print(text, style=style, no_wrap=True, overflow="ellipsis")

    def settle(self) -> None:
        """Print the finished stages as lines: their bars would soon fill the screen.

        Parts of a stage, whose names are indented, leave none.
        """
        for stage in [s for s in self._stages if s.finished]:
            self._stages.remove(stage)
            text = stage.end()
            if not stage.name.startswith(" "):
                self.line(text)

    def left_out(self, what: str, skipped: Sequence[tuple[str, str]]) -> None:
        """Print the inputs that are left out, counted by reason: (path, reason) of each."""
        if skipped:
            count = by_reason(skipped)
            told = ", ".join(f"{reason} × {number}" for reason, number in count.most_common())
            self.console.print(f"{len(skipped)} {what} left out ({told}):", style="yellow")
            for path, reason in skipped[:5]:
                self.console.print(f"  {path}: {reason}")


class Says(Callback):
    """Shows how a training stands, such as after each of its rounds, by a function of a text."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say


class Ticks(Says):
    """Updates a stage's bar with the number of finished batches, and with what is said."""

    def __init__(self, tick: Callable[[int, int], None]):
        super().__init__(getattr(tick, "say", lambda text: None))
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

    def found(self) -> list[tuple[int, float]]:
        """(step, loss), each the mean of as many steps as leave `MOST_LOSSES` points."""
        if not self._kept:
            return []
        values = torch.stack(self._kept).double().cpu()
        width = -(-len(values) // MOST_LOSSES)
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
