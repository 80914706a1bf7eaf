"""A recipe over a grid of settings, as ``lora-lightning sweep`` runs it.

    lora-lightning sweep lighting lora.rank=1,2,4 train.lora.learning_rate=1e-3,1e-2

Each combination is a run of its own in ``out/cells``, with its own report; ``out`` has a table of
all, and a plot.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_lightning.errors import ConfigError
from lora_lightning.report.files import atomic_write
from lora_lightning.report.sentences import failure
from lora_lightning.runner.file_names import file_names
from lora_lightning.runner.grid_results import Cell, Line, Sweep, lines_of
from lora_lightning.runner.loading import apply_overrides, experiment_of, load_recipe

STAGES = ("label_free", "lora", "full")  # methods, each with its settings in train.<name>
RESULT = "cell.json"
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
        tell: Called with a line of text before each cell.

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
    sources: Any = {} if all(key.startswith(_AFTER_SOURCE) for key in axes) else None
    try:
        for number, (cell, config) in enumerate(zip(cells, configs, strict=True), 1):
            tell(f"cell {number} of {len(cells)}: {cell.name}")
            settings = [*fixed, *cell.settings, f"out={cell.folder}"]
            command = shlex.join(["lora-lightning", "run", str(name), *settings])
            _one(cell, config, command, config.title != recipe.title, sources)
            sweep.check()
            sweep.write(out)
    finally:  # of those there are, where it is interrupted
        sweep.draw(out)
    return sweep


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


def _one(cell: Cell, config: DictConfig, command: str, titled: bool, sources: Any) -> None:
    """Run a cell, unless its results are there."""
    from lora_lightning.runner.runner import run

    plain = {**OmegaConf.to_container(config, resolve=True), "out": ""}  # type: ignore[dict-item]
    plain = json.loads(json.dumps(plain))
    path = cell.folder / RESULT
    if (found := _there(path, plain)) is not None:
        cell.lines = found
        return
    try:
        done = run(experiment_of(config), config, command, titled, sources=sources)
        cell.lines = lines_of(done)
    except Exception as error:
        cell.reason = failure(error)
        return
    held = {"config": plain, "lines": [asdict(line) for line in cell.lines]}
    atomic_write(path, json.dumps(held, indent=1))


def _there(path: Path, config: dict[str, Any]) -> list[Line] | None:
    """The results of an earlier run with these settings, if it was finished."""
    try:
        held = json.loads(path.read_bytes())
        return [Line(**line) for line in held["lines"]] if held["config"] == config else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
