"""`run_tasks`: a function of many items, in this process, in several, or on a Ray cluster.

A task is one call ``function(common, item)``. `common`, such as the base model, is sent once to
each process, or put once into Ray's object store. A function that raises, and a process that dies,
cost that task alone. What a task leaves behind are the files that it writes itself.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from lora_lightning.errors import ConfigError, TaskError
from lora_lightning.report.files import scratch_folder

ENGINES = ("processes", "ray")
Function = Callable[[Any, Any], Any]
_END = object()


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


def add_options(parser: argparse.ArgumentParser, what: str) -> None:
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
    """The options of `add_options`."""
    return Jobs(arguments.jobs, arguments.engine, arguments.address)


def run_tasks(
    function: Function, items: Iterable[Any], common: Any = None, jobs: Jobs = SERIAL
) -> Iterator[Done]:
    """Call ``function(common, item)`` for each item.

    Args:
        function: Of a module that can be imported, unless all runs in this process.
        items: Read one by one, as there is room.
        common: The same for all. Other processes have a copy, which they keep from task to task.
        jobs: How many at once, and where.

    Yields:
        Each task as it ends; a failure is a value. A task whose process dies is run once more.

    Raises:
        ConfigError: Ray's cluster cannot be reached.
        MissingDependencyError: Ray is not installed.
    """
    numbered = enumerate(items)
    if jobs.serial:
        return (_in_this_process(function, common, *each) for each in numbered)
    if jobs.engine == "ray":
        from lora_lightning.runner.ray_jobs import on_ray

        return on_ray(pickle.dumps((function, common)), numbered, jobs)
    return _in_processes(pickle.dumps((function, common)), numbered, jobs)


def _in_this_process(function: Function, common: Any, index: int, item: Any) -> Done:
    try:
        return Done(index, function(common, item))
    except Exception as error:
        return Done(index, error=error)


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


def _serve(pipe: connection.Connection, path: str, threads: int) -> None:
    """A process: calls the function for each item that comes through the pipe, until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which ends this process
    threading.Thread(target=_end_with_driver, daemon=True).start()
    limit_threads(threads)
    held: list[Any] = []

    def task() -> Any:
        if not held:
            held.append(pickle.loads(Path(path).read_bytes()))
            limit_threads(threads)
        return held[0]

    while True:
        try:
            index, item = pickle.loads(pipe.recv_bytes())
            pipe.send_bytes(called(task, index, item))
        except (EOFError, ConnectionError):
            return


def _end_with_driver() -> None:
    """End at once where the driver was killed: a second run of the command may be at work."""
    driver = parent_process()
    assert driver is not None
    driver.join()
    os._exit(1)


class _Worker:
    """A process with a pipe to it."""

    def __init__(self, path: str, threads: int):
        context = get_context("spawn")  # a fork would copy locks that torch's threads hold
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, path, threads))
        self.process.start()
        theirs.close()

    def begin(self, index: int, item: bytes) -> None:
        """Send a task; a process that is dead already is found when it is waited for."""
        with suppress(ConnectionError):
            self.pipe.send_bytes(pickle.dumps((index, item)))

    def end(self) -> int:
        """Kill the process, unless it is dead; the code with which it ended."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return self.process.exitcode or 0


def _in_processes(common: bytes, numbered: Iterator[tuple[int, Any]], jobs: Jobs) -> Iterator[Done]:
    with scratch_folder(Path(gettempdir(), "lora-lightning-jobs")) as folder:
        path = folder / "common"
        path.write_bytes(common)
        del common
        # Pipe → its process, the task (index, pickled item) that it is at, and whether again.
        busy: dict[Any, tuple[_Worker, tuple[int, bytes], bool]] = {}

        def begin(worker: _Worker | None, task: Any, again: bool = False) -> None:
            if task is _END:
                if worker is not None:
                    worker.end()
                return
            worker = worker or _Worker(str(path), jobs.threads)
            packed = task if again else (task[0], pickle.dumps(task[1]))
            busy[worker.pipe] = worker, packed, again
            worker.begin(*packed)

        try:
            for task in islice(numbered, jobs.count):
                begin(None, task)
            while busy:
                for pipe in connection.wait(list(busy)):
                    worker, task, again = busy.pop(pipe)
                    done = _answer(worker)
                    if isinstance(done, Done):
                        begin(worker, next(numbered, _END))
                        yield done
                    elif again:
                        begin(None, next(numbered, _END))
                        yield Done(task[0], error=TaskError(done))
                    else:
                        begin(None, task, again=True)
        finally:
            for worker, _, _ in busy.values():
                worker.end()


def _answer(worker: _Worker) -> Done | str:
    """The task that a process has finished, or how it died."""
    try:
        done: Done = pickle.loads(worker.pipe.recv_bytes())
    except (EOFError, ConnectionError):
        worker.process.join()
        return died(worker.end())
    return done


def died(code: int) -> str:
    """How a process ended, in words."""
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    memory = ", as where the memory is full: take fewer --jobs" if code == -9 else ""
    return f"its process ended {how}, and so did a second one{memory}"
