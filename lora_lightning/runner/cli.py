"""The commands of recipes, ``run``, ``sweep``, ``list`` and ``copy``, and ``inspect``."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lightning.errors import ConfigError
from lora_lightning.runner.jobs import add_jobs, given

if TYPE_CHECKING:
    from lora_lightning.report.console import PlainConsole
    from lora_lightning.report.results import Run

RANKS = (1, 2, 4, 8, 16, 32)


def add_commands(commands: Any) -> None:
    """Add them to the command's parser."""
    run = commands.add_parser("run", help="run a recipe, from data to report", add_help=False)
    run.add_argument("name", nargs="?", metavar="NAME", help="a recipe's name, folder or file")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="settings, over its own")
    run.add_argument("--quick", action="store_true", help="a first, rougher table")
    add_jobs(run, "seeds")
    run.add_argument("-h", "--help", action="store_true", help="list the recipe's settings")
    run.set_defaults(command=_run, parser=run)

    sweep = commands.add_parser(
        "sweep", help="compare settings: a recipe at each of several values"
    )
    sweep.add_argument("name", metavar="NAME", help="a recipe's name, folder or file")
    sweep.add_argument(
        "overrides", nargs="*", metavar="key=value[,value...]",
        help="settings, over its own; several values of a key: every combination is run",
    )  # fmt: skip
    sweep.add_argument(
        "--ranks", nargs="+", type=_rank, metavar="RANK",
        help="where no key has several values: ranks to compare in one run, numbers and rules; "
        f"default: {' '.join(map(str, RANKS))}",
    )  # fmt: skip
    sweep.add_argument(
        "--by", metavar="MEASURE",
        help="what chooses the best combination: source, its held-out items (the default); target, "
        "or a target's name: then labels of the target choose",
    )  # fmt: skip
    add_jobs(sweep, "cells or ranks")
    sweep.set_defaults(command=_sweep)

    commands.add_parser("list", help="list the recipes").set_defaults(command=_list)

    copy = commands.add_parser("copy", help="copy a recipe's files, to edit them")
    copy.add_argument("name", metavar="NAME", help="a recipe's name")
    copy.add_argument("folder", metavar="DIR", type=Path, help="where the folder NAME is made")
    copy.set_defaults(command=_copy)

    inspect = commands.add_parser("inspect", help="show what an adapter file holds")
    inspect.add_argument("adapter", metavar="ADAPTER.safetensors", type=Path)
    inspect.set_defaults(command=_inspect)


def _console(stderr: bool = False) -> PlainConsole:
    from lora_lightning.report.console import PlainConsole

    return PlainConsole(stderr=stderr)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.help or arguments.name is None:
        return _help(arguments)
    from lora_lightning.runner.loading import run_recipe

    done = run_recipe(
        arguments.name, arguments.overrides, quick=arguments.quick, jobs=given(arguments)
    )
    _show(done)
    return None


def _sweep(arguments: argparse.Namespace) -> int:
    from lora_lightning.runner.grid import is_grid, sweep_grid
    from lora_lightning.runner.loading import sweep_recipe

    grid, jobs = is_grid(arguments.overrides), given(arguments)
    if arguments.by and not grid:
        raise ConfigError("--by chooses among settings with several values: lora.rank=1,2,4")
    if not grid:
        ranks = arguments.ranks or [*RANKS]
        _show(sweep_recipe(arguments.name, ranks, arguments.overrides, jobs))
        return 0
    if arguments.ranks:
        raise ConfigError("give either --ranks, or lora.rank=1,2,4 among the other settings")
    console, told = _console(), _console(stderr=True)
    say = partial(told.print, style="bold")
    sweep = sweep_grid(arguments.name, arguments.overrides, arguments.by, say, jobs)
    console.print(sweep.table())
    console.print(f"\n{sweep.verdict()}", markup=False)
    return int(bool(sweep.failed))


def _rank(text: str) -> int | str:
    from lora_lightning.lora.config import LoRAConfig

    return int(text) if text.isdigit() else LoRAConfig(rank=text).rank


def _show(result: Run) -> None:
    """Print the table of a run, and the paths of its files."""
    from lora_lightning.report.write import print_table

    print_table(result, _console())
    out = Path(str(result.config["out"]))
    _console().print(f"\nopen {out / 'report.html'}; all results are in {out}/", soft_wrap=True)


def _help(arguments: argparse.Namespace) -> None:
    """``run --help`` shows the usage; ``run NAME --help`` also every setting of that recipe."""
    console = _console()
    arguments.parser.print_help()
    if arguments.name is None:
        console.print("\nrecipes:")
        return _list(arguments)
    from rich.padding import Padding
    from rich.text import Text

    from lora_lightning.runner.adapter_facts import as_typed
    from lora_lightning.runner.comments import comments
    from lora_lightning.runner.loading import apply_overrides, load_recipe, settings

    config = apply_overrides(load_recipe(arguments.name), arguments.overrides)
    said = comments(arguments.name)
    console.print(f"\nsettings of {arguments.name}, with their values:")
    for key, value in settings(config).items():
        console.print(Text.assemble("  ", (key, "bold"), f"={as_typed(value)}"))
        if key in said:
            console.print(Padding(Text(said[key], style="dim"), (0, 0, 0, 6)))
    return None


def _list(arguments: argparse.Namespace) -> None:
    from rich.table import Table

    from lora_lightning.runner.loading import list_recipes, load_recipe

    table = Table(box=None, show_header=False, pad_edge=False)
    for name in list_recipes():
        table.add_row(f"  {name}", str(load_recipe(name).title))
    _console().print(table)


def _copy(arguments: argparse.Namespace) -> None:
    import shutil

    from lora_lightning.runner.loading import find_recipe

    source = find_recipe(arguments.name).parent
    target: Path = arguments.folder / source.name
    if target.exists():
        raise ConfigError(f"{target} exists already; choose another folder, or remove it first")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    here = "" if target.is_absolute() else "./"
    edited = f"edit {target / 'recipe.yaml'}, then:\n  lora-lightning run {here}{target}"
    _console().print(edited, soft_wrap=True)


def _inspect(arguments: argparse.Namespace) -> None:
    from lora_lightning.runner.adapter_facts import print_facts

    print_facts(arguments.adapter, _console())
