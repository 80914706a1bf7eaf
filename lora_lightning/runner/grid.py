"""A recipe over a grid of settings, as ``lora-lightning sweep`` runs it.

    lora-lightning sweep lighting lora.rank=1,2,4 train.lora.learning_rate=1e-3,1e-2

Each combination is a run of its own in ``out/cells``, with its own report; ``out`` has a table of
all, and a plot.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_lightning.errors import ConfigError
from lora_lightning.report.files import atomic_write
from lora_lightning.report.sentences import failure
from lora_lightning.runner.each_target import counted
from lora_lightning.runner.file_names import file_names
from lora_lightning.runner.grid_results import Cell, Line, Sweep, lines_of
from lora_lightning.runner.jobs import SERIAL, Jobs
from lora_lightning.runner.loading import apply_overrides, experiment_of, load_recipe
from lora_lightning.runner.progress import Stages, interruptible
from lora_lightning.runner.tasks import run_tasks

STAGES = ("label_free", "lora", "full")  # methods, each with its settings in train.<name>
RESULT = "cell.json"
_Task = tuple[Cell, DictConfig, str, bool]  # a cell, its run's settings and command, if titled
_OPEN, _CLOSED = "[{(", "]})"
# What these keys change comes after the source model.
_AFTER_SOURCE = ("lora.", "batch_norm", *(f"train.{stage}." for stage in STAGES))


def split(override: str) -> list[str]:
    """``["k=1", "k=2"]`` of ``k=1,2``; commas within brackets or quotes separate nothing."""
    key, equals, value = override.partition("=")
    parts, depth, quote = [""], 0, ""
    for character in value:
        if quote or character in "'\"":
            quote = "" if character == quote else quote or character
        depth += (character in _OPEN) - (character in _CLOSED) if not quote else 0
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [f"{key}{equals}{part.strip()}" for part in parts]


def is_grid(overrides: Sequence[str]) -> bool:
    """Whether one of these has several values."""
    return any(len(split(override)) > 1 for override in overrides)


def sweep_grid(
    name: str | Path,
    overrides: Sequence[str],
    by: str | None = None,
    tell: Callable[[str], None] = lambda said: None,
    jobs: Jobs = SERIAL,
) -> Sweep:
    """Run a recipe with every combination of settings; results are written to its output folder.

    A cell whose results are there already, of the same settings, is not run again: an interrupted
    sweep is resumed, and one with more values runs the new cells alone. A cell that fails is listed
    and does not end the sweep. Cells that differ in nothing before the source model share it.

    Args:
        name: See `run_recipe`.
        overrides: ``key=value``, or ``key=value,value`` for several.
        by: What chooses the best cell: ``"source"``, the metric on the source's held-out items (the
            default); ``"target"``, or a target's name: then labels of the target choose.
        tell: Called with a line of text before each cell that runs in this process.
        jobs: How many cells at once, and where.

    Raises:
        ConfigError: an unknown key or bad value in any cell, before anything is run; a `by` that is
            not measured, after the first.
    """
    lists = [split(override) for override in overrides]
    axes = _axes([values for values in lists if len(values) > 1])
    fixed = [values[0] for values in lists if len(values) == 1]
    if twice := axes.keys() & {override.partition("=")[0] for override in fixed}:
        raise ConfigError(f"{min(twice)} is given twice: once with several values, once with one")
    recipe = load_recipe(name)
    if not any(override.startswith("methods=") for override in fixed):
        fixed.append(f"methods=[{','.join(_methods(axes))}]")
    out = Path(apply_overrides(recipe, fixed).out)
    every = itertools.product(*axes.values())
    cells = [Cell(dict(zip(axes, values, strict=True)), Path()) for values in every]
    folders = file_names([",".join(cell.settings) for cell in cells])
    configs = []
    for cell, folder in zip(cells, folders.values(), strict=True):
        cell.folder = out / "cells" / folder
        configs.append(apply_overrides(recipe, [*fixed, *cell.settings]))
        configs[-1].out = str(cell.folder)
    sweep = Sweep(axes, cells, experiment_of(recipe).metric, by)
    sources: Any = {} if _shares_source(axes) else None
    kind = experiment_of(recipe)
    try:
        todo = list[_Task]()
        for number, (cell, config) in enumerate(zip(cells, configs, strict=True), 1):
            settings = [*fixed, *cell.settings, f"out={cell.folder}"]
            command = shlex.join(["lora-lightning", "run", str(name), *settings])
            task = cell, config, command, config.title != recipe.title
            # The first one that trains the source model of all is done before the others.
            if not jobs.serial and sources != {}:
                todo.append(task)
                continue
            tell(f"cell {number} of {len(cells)}: {cell.name}")
            _one((kind, sources), task)
            sweep.check()
            sweep.write(out)
        for _ in _apart(kind, sources, todo, jobs):
            sweep.check()
            sweep.write(out)
    finally:  # of those there are, where it is interrupted
        sweep.draw(out)
    return sweep


def _apart(kind: Any, sources: Any, todo: Sequence[_Task], jobs: Jobs) -> Iterator[None]:
    """Run cells in other processes; yields as each ends."""
    due = []
    for task in todo:
        cell, config, *_ = task
        if (found := _there(cell.folder / RESULT, _settings(config))) is None:
            due.append(task)
        else:
            cell.lines = found
            yield
    if not due:
        return
    with interruptible(), Stages() as stages:
        for done in counted(run_tasks(_one, due, (kind, sources), jobs), stages, len(due)):
            cell = due[done.index][0]
            if done.error is None:
                cell.lines, cell.reason = done.value
            else:
                cell.reason = failure(done.error)
            yield


def _axes(lists: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    axes: dict[str, list[str]] = {}
    for values in lists:
        key = values[0].partition("=")[0]
        given = [value.partition("=")[2] for value in values]
        if key in axes or "" in given or len(set(given)) < len(given):
            raise ConfigError(f"{key}: expected different values, once; got {', '.join(given)}")
        if key in ("out", "kind", "name", "title"):
            raise ConfigError(
                f"{key} is the same for all cells: give it one value, in quotes where it has commas"
            )
        axes[key] = given
    return axes


def _methods(axes: dict[str, list[str]]) -> list[str]:
    """The source model, and the methods whose training the keys change; else the adapter's."""
    changed = [s for s in STAGES if any(key.startswith(f"train.{s}.") for key in axes)]
    return ["source_only", *(changed or ["lora"])]


def _shares_source(axes: dict[str, list[str]]) -> bool:
    return all(key.startswith(_AFTER_SOURCE) for key in axes)


def _one(common: tuple[Any, Any], task: _Task) -> tuple[list[Line], str]:
    """Run a cell, unless its results are there; returns them, and why it failed."""
    from lora_lightning.runner.runner import run

    (kind, sources), (cell, config, command, titled) = common, task
    plain, path = _settings(config), cell.folder / RESULT
    if (found := _there(path, plain)) is not None:
        cell.lines = found
        return found, ""
    try:
        cell.lines = lines_of(run(kind, config, command, titled, sources=sources))
    except Exception as error:
        cell.reason = failure(error)
        return [], cell.reason
    held = {"config": plain, "lines": [asdict(line) for line in cell.lines]}
    atomic_write(path, json.dumps(held, indent=1))
    return cell.lines, ""


def _settings(config: DictConfig) -> dict[str, Any]:
    """Those that decide on a cell's results, as JSON has them."""
    plain = {**OmegaConf.to_container(config, resolve=True), "out": ""}  # type: ignore[dict-item]
    found: dict[str, Any] = json.loads(json.dumps(plain))
    return found


def _there(path: Path, config: dict[str, Any]) -> list[Line] | None:
    """The results of an earlier run with these settings, if it was finished."""
    try:
        held = json.loads(path.read_bytes())
        return [Line(**line) for line in held["lines"]] if held["config"] == config else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
