"""`Jobs`: how many tasks run at once, and where; what the engines of `run_tasks` share."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

from lora_lightning.errors import ConfigError, TaskError

ENGINES = ("processes", "ray")
Function = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Jobs:
    """How many tasks run at once, and where.

    Args:
        count: At once; 1 of processes: one after the other, in this process. None: 1, or all that
            a Ray cluster has room for.
        engine: ``"processes"`` of this machine, or ``"ray"``.
        address: Of a Ray cluster, such as ``"auto"`` or ``"10.0.0.1:6379"``; None: a local one is
            started, and ended with the tasks.

    Raises:
        ConfigError: there is no such engine, fewer than one job, or an address without Ray.
    """

    count: int | None = None
    engine: str = "processes"
    address: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(f"--engine {self.engine}: expected one of {', '.join(ENGINES)}")
        if self.count is not None and self.count < 1:
            raise ConfigError(f"--jobs must be at least 1, got {self.count}")
        if self.address is not None and self.engine != "ray":
            raise ConfigError(f"--address {self.address} is of a Ray cluster: add --engine ray")

    @property
    def serial(self) -> bool:
        """Whether the tasks run in this process."""
        return self.engine == "processes" and self.count in (None, 1)

    @property
    def threads(self) -> int:
        """Of the CPU, for each task; those that OMP_NUM_THREADS says, if it is given."""
        given = os.environ.get("OMP_NUM_THREADS", "")
        if given.isdecimal() and int(given):
            return int(given)
        return max((os.cpu_count() or 1) // (self.count or 1), 1)


SERIAL = Jobs()


@dataclass(frozen=True)
class Done:
    """A finished task.

    Attributes:
        index: Of its item.
        value: What the function returned; None if it failed.
        error: What it raised, or `TaskError`; None if it did not fail.
        said: What it printed, in another process.
    """

    index: int
    value: Any = None
    error: Exception | None = None
    said: str = ""

    def result(self) -> Any:
        """The value; raises the error."""
        if self.error is not None:
            raise self.error
        return self.value


def add_jobs(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--jobs``, ``--engine`` and ``--address`` to a command that runs many of `what`."""
    parser.add_argument("--jobs", type=int, metavar="N", help=f"{what} at once (1)")
    parser.add_argument(
        "--engine", choices=ENGINES, default="processes",
        help="what runs them: processes of this machine, or ray (a package of its own)",
    )  # fmt: skip
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="of a Ray cluster, or auto; else a local one"
    )


def given(arguments: argparse.Namespace) -> Jobs:
    """The options of `add_jobs`."""
    return Jobs(arguments.jobs, arguments.engine, arguments.address)


# ---- in another process ------------------------------------------------------------------------


def called(task: Callable[[], tuple[Function, Any]], index: int, item: bytes) -> bytes:
    """The pickled `Done` of a task, with what it printed; for engines.

    Args:
        task: Gives the function and `common`.
        index: Of the item.
        item: Pickled.
    """
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            function, common = task()
            done = Done(index, function(common, pickle.loads(item)))
        except Exception as error:
            done = Done(index, error=error)
    try:
        content = pickle.dumps(replace(done, said=said.getvalue()))
        pickle.loads(content)  # an exception may be written and not be read
    except Exception as error:
        text = f"{done.error or error!r}"
        return pickle.dumps(Done(index, error=TaskError(text), said=said.getvalue()))
    return content


def limit_threads(count: int) -> None:
    """Let this process use so many threads of the CPU."""
    os.environ["OMP_NUM_THREADS"] = str(count)  # for libraries that are not loaded yet
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
