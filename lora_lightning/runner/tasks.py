"""`run_tasks`: a function of many items, in this process, in several, or on a Ray cluster.

A task is one call ``function(common, item)``. `common`, such as the base model, is sent once to
each process, or put once into Ray's object store. A function that raises, and a process that dies,
cost that task alone. What a task leaves behind are the files that it writes itself.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from typing import Any

from lora_lightning.errors import ConfigError, first_line
from lora_lightning.runner.jobs import SERIAL, Done, Function, Jobs
from lora_lightning.runner.process_jobs import in_processes
from lora_lightning.runner.ray_jobs import on_ray


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
        ConfigError: Ray's cluster cannot be reached, or `common` cannot be pickled.
        MissingDependencyError: Ray is not installed.
    """
    numbered = enumerate(items)
    if jobs.serial:
        return (_in_this_process(function, common, *each) for each in numbered)
    try:
        packed = pickle.dumps((function, common))
    except Exception as error:  # whatever an object makes of it
        raise ConfigError(
            f"what all tasks share cannot be sent to another process ({first_line(error)}): leave "
            "--jobs and --engine out"
        ) from error
    return (on_ray if jobs.engine == "ray" else in_processes)(packed, numbered, jobs)


def _in_this_process(function: Function, common: Any, index: int, item: Any) -> Done:
    try:
        return Done(index, function(common, item))
    except Exception as error:
        return Done(index, error=error)
