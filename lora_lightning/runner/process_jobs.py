"""`in_processes`: the tasks of `lora_lightning.runner.tasks` in processes of this machine."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from lora_lightning.errors import TaskError
from lora_lightning.report.files import scratch_folder
from lora_lightning.runner.jobs import Done, Jobs, called, limit_threads
from lora_lightning.runner.memory import keep_freed_memory

_END = object()


def _serve(pipe: connection.Connection, path: str, threads: int) -> None:
    """A process: calls the function for each item that comes through the pipe, until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which ends this process
    threading.Thread(target=_end_with_driver, daemon=True).start()
    keep_freed_memory()
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


def in_processes(common: bytes, numbered: Iterator[tuple[int, Any]], jobs: Jobs) -> Iterator[Done]:
    """See `run_tasks`; `common` is the pickled function with what all tasks share."""
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
