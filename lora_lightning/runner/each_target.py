"""One adapter for each of several targets, the base loaded once: what the commands for it share.

A command gives the targets' names, the function that adapts to one, and the columns of its table.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_lightning.errors import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    MissingDependencyError,
    TargetError,
)
from lora_lightning.model.adapter_file.checks import check_base
from lora_lightning.model.adapter_file.save import read_header
from lora_lightning.report.files import check_writable
from lora_lightning.report.sentences import failure
from lora_lightning.runner.file_names import file_names
from lora_lightning.runner.jobs import Done, Jobs
from lora_lightning.runner.tasks import run_tasks

if TYPE_CHECKING:
    from rich.table import Table

    from lora_lightning.runner.progress import Stages

ADAPTED, KEPT, THERE, FAILED = "adapted", "kept source", "already there", "failed"
Tick = Callable[[int, int], None]
# Of the output's folder, or of the whole file system.
_NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass
class Outcome:
    """The result of adapting to a target: a speaker, a folder of pictures."""

    name: str  # of the target
    # ``"adapted"``, ``"kept source"`` (the adapter did harm on the held-out items, or the guard
    # accepted no round: no file), ``"already there"`` (an earlier run's file) or ``"failed"``
    status: str
    learnt: int = 0  # number of training items
    held_out: int = 0  # number of labelled items that decided whether the adapter is kept
    before: float | None = None  # the source's metric on those; None without any
    after: float | None = None  # the adapter's metric on those
    path: Path | None = None  # the file
    reason: str = ""  # of a failure, why the source is kept, or how the training ended


def each_target(
    model: nn.Module,
    files: Mapping[str, Path],
    adapt: Callable[[str], Outcome],
    overwrite: bool = False,
) -> Iterator[Outcome]:
    """Adapt to each target in turn.

    Args:
        model: The base, as it is before and after each.
        files: Name → adapter file to write.
        adapt: From a name to its outcome; writes the file.
        overwrite: Adapt again where a file exists. Otherwise a file of the same base is kept, so
            that an interrupted run is resumed.

    Yields:
        The outcome of each; one that fails does not stop the others.
    """
    for name, path in files.items():
        if not overwrite and path.exists():
            yield _there(model, name, path)
            continue
        yield attempted(name, adapt)


def each_apart(
    model: nn.Module,
    files: Mapping[str, Path],
    task: Callable[[Any, Any], Outcome],
    items: Mapping[str, Any],
    common: Any,
    jobs: Jobs,
    stages: Stages,
    overwrite: bool = False,
) -> Iterator[Outcome]:
    """As `each_target`, several at once, in other processes; one bar counts them.

    Args:
        model: See `each_target`, as for `files` and `overwrite`.
        files: Name → adapter file.
        task: From `common` and a target's item to its outcome; see `run_tasks`.
        items: Name → what the task is given.
        common: What all tasks are given, with the base.
        jobs: How many at once, and where.
        stages: Shows the bar, and what each task says.
        overwrite: Adapt again where a file exists.

    Yields:
        The outcome of each, in the order in which they end.
    """
    due = [name for name, path in files.items() if overwrite or not path.exists()]
    for name in files.keys() - set(due):
        yield _there(model, name, files[name])
    for done in counted(run_tasks(task, map(items.get, due), common, jobs), stages, len(due)):
        if done.error is None:
            yield done.value
        else:
            yield Outcome(due[done.index], FAILED, reason=_reason(done.error))


def counted(tasks: Iterable[Done], stages: Stages, total: int) -> Iterator[Done]:
    """Tasks of other processes as they end, with a bar; what they said is printed above it."""
    stage = stages.stage("all", "done", max(total, 1))
    for number, done in enumerate(tasks, 1):
        for line in filter(str.strip, done.said.splitlines()):
            stages.line(line)
        stage(number, total)
        yield done


def attempted(name: str, adapt: Callable[[str], Outcome]) -> Outcome:
    """The outcome of adapting to a target; raises what the next one would fail for as well."""
    try:
        return adapt(name)
    except Exception as error:
        return Outcome(name, FAILED, reason=_reason(error))


def _reason(error: Exception) -> str:
    """Why a target failed; raises what the next one would fail for as well."""
    if isinstance(error, ConfigError | TargetError | MissingDependencyError) or (
        isinstance(error, OSError) and error.errno in _NO_WRITING
    ):
        raise error
    return failure(error)


def _there(model: nn.Module, name: str, path: Path) -> Outcome:
    """The outcome of an earlier run's file, or of what is there instead.

    Raises:
        BaseMismatchError: another base's, as those of the other targets will be.
    """
    hint = "The file was there before: give another --out, or --overwrite"
    try:
        check_base(model, read_header(path), "weights", path)
    except BaseMismatchError as error:
        raise BaseMismatchError(f"{error}. {hint}") from error
    except AdapterFileError as error:
        return Outcome(name, FAILED, reason=f"{error}. {hint}")
    return Outcome(name, THERE, path=path)


def adapter_files(out: Path, names: Collection[str], what: str) -> dict[str, Path]:
    """Name → adapter file: `out`, or for several one each in the folder `out`.

    Args:
        out: A .safetensors file, or a folder.
        names: Of the targets.
        what: They are, in the plural, for messages.

    Raises:
        ConfigError: several for one file, or a folder for a file.
        OSError: nothing can be written there.
    """
    check_writable(out.parent)  # before minutes of training
    if out.suffix == ".safetensors":
        if out.is_dir():
            raise ConfigError(f"{out} is a folder: give a file, or a folder of another ending")
        if len(names) > 1:
            raise ConfigError(
                f"{len(names)} {what} need a file each: give a folder as --out, not {out}"
            )
        return dict.fromkeys(names, out)
    if out.is_file():
        raise ConfigError(f"{out} is a file; --out takes a .safetensors file or a folder")
    check_writable(out)
    return {name: out / f"{stem}.safetensors" for name, stem in file_names(names).items()}


def shown(
    outcomes: Iterable[Outcome], stages: Stages, columns: Sequence[str], order: Iterable[str]
) -> int:
    """Go through outcomes, and print a table of those there are, also where one is interrupted.

    Returns:
        The exit code: 1 where one failed.
    """
    from lora_lightning.report.console import PlainConsole

    found: list[Outcome] = []
    try:
        for outcome in outcomes:
            found.append(outcome)
    finally:
        stages.stop()
        if found:
            place = {name: number for number, name in enumerate(order)}
            notes = _notes(found)
            console = PlainConsole()
            console.print(_table(sorted(found, key=lambda o: place[o.name]), columns, notes))
            for reason, mark in notes.items():
                console.print(f"{mark} {reason}")
    return int(any(o.status == FAILED for o in found))


def _notes(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """The reasons that several targets share, with the marks that stand for them in the table."""
    counts = Counter(o.reason for o in outcomes if o.reason)
    shared = [reason for reason, count in counts.items() if count > 1]
    return {reason: f"[{number}]" for number, reason in enumerate(shared, 1)}


def _table(outcomes: Sequence[Outcome], columns: Sequence[str], notes: Mapping[str, str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(columns[0], overflow="fold")
    for name in columns[1:]:
        table.add_column(name, justify="right")
    table.add_column("result", overflow="fold")
    for o in outcomes:
        rates = ["–" if r is None else f"{100 * r:.1f}" for r in (o.before, o.after)]
        file = "" if o.path is None else f"{o.path} ({o.path.stat().st_size / 1000:.0f} kB)"
        result = ": ".join(part for part in (o.status, file, o.reason) if part not in ("", *notes))
        result += f" {notes[o.reason]}" if o.reason in notes else ""
        counts = [str(n) if n else "–" for n in (o.learnt, o.held_out)]
        table.add_row(*map(Text, (o.name, *counts, *rates, result)))
    return table
