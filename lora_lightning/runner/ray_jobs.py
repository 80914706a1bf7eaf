"""`on_ray`: the tasks of `lora_lightning.runner.tasks` on a Ray cluster.

https://docs.ray.io; the extra ``ray``. All machines of a cluster must have this package installed,
and see the same files under the same paths.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

from lora_lightning.errors import ConfigError, MissingDependencyError, TaskError, first_line
from lora_lightning.runner.jobs import Done, Jobs, called, limit_threads
from lora_lightning.runner.memory import keep_freed_memory

_STORE = 100_000_000  # bytes of a local cluster's object store, beside what all tasks share
_held: dict[str, Any] = {}  # of a worker: the function and what all tasks share, by their object


def on_ray(common: bytes, numbered: Iterator[tuple[int, Any]], jobs: Jobs) -> Iterator[Done]:
    """See `run_tasks`; `common` is the pickled function with what all tasks share."""
    ray = _ray()
    with _cluster(ray, jobs, 2 * len(common) + _STORE):
        count = jobs.count or max(int(ray.cluster_resources().get("CPU", 1)), 1)
        threads = replace(jobs, count=count).threads
        store = ray.put(common)
        del common
        call = ray.remote(num_cpus=1, max_retries=1)(_called)
        busy: dict[Any, int] = {}

        def begin(number: int) -> None:
            for index, item in islice(numbered, number):
                packed = pickle.dumps(item)
                # The object in a list: it is fetched once by a process, not for each task.
                sent = call.remote([store], store.hex(), index, packed, threads)
                busy[sent] = index

        begin(count)
        while busy:
            ready, _ = ray.wait(list(busy), num_returns=1)
            for ref in ready:
                index = busy.pop(ref)
                done = _answer(ray, ref, index)
                begin(1)
                yield done


def _answer(ray: Any, ref: Any, index: int) -> Done:
    try:
        done: Done = pickle.loads(ray.get(ref))
    except ray.exceptions.RayError as error:  # its process died twice, or its machine did
        said = f"its process ended, and so did a second one: {first_line(error)}"
        return Done(index, error=TaskError(said))
    return done


def _called(store: list[Any], key: str, index: int, item: bytes, threads: int) -> bytes:
    """A task, in one of Ray's processes."""
    import ray

    def task() -> Any:
        if key not in _held:
            _held.clear()
            keep_freed_memory()
            limit_threads(threads)
            _held[key] = pickle.loads(ray.get(store[0]))
            limit_threads(threads)
        return _held[key]

    return called(task, index, item)


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            '--engine ray needs Ray: pip install "lora-lightning[ray]"; or leave it out, and '
            "--jobs N takes processes of this machine"
        ) from error
    return ray


@contextmanager
def _cluster(ray: Any, jobs: Jobs, store: int) -> Iterator[None]:
    """Within the block Ray is connected; a cluster that is connected already is used, and stays."""
    if ray.is_initialized():
        yield
        return
    own = {} if jobs.address else {"num_cpus": jobs.count, "object_store_memory": store}
    try:
        ray.init(
            jobs.address or "local",
            include_dashboard=None if jobs.address else False,
            log_to_driver=False,
            logging_level="ERROR",
            **own,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"--address {jobs.address}: {first_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()
