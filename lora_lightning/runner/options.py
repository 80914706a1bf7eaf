"""Options that commands share; imported before torch is."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Option = tuple[str, Callable[[str], object], float | None, str]  # name, type, default, help


def add_options(parser: argparse.ArgumentParser, *options: Option) -> None:
    """Add options with numbers, whose help ends with the default, if there is one."""
    for name, kind, default, text in options:
        shown = text if default is None else f"{text} ({default:g})"
        parser.add_argument(f"--{name}", type=kind, default=default, help=shown)


def add_training(
    parser: argparse.ArgumentParser, rank: int, modules: str | None, text: str
) -> None:
    """Add the options of an adapter's training; its alpha is twice the rank.

    Args:
        parser: Of the command.
        rank: Default of ``--rank``.
        modules: Default of ``--target-modules``.
        text: In its help.
    """
    add_options(
        parser,
        ("rank", int, rank, "inner dimension of the factors"),
        ("alpha", float, 2.0 * rank, "numerator of the scaling alpha/rank"),
        ("seed", int, 0, "of factors, order, and what is held out"),
    )
    parser.add_argument("--target-modules", default=modules, help=f"what is adapted ({text})")
    parser.add_argument("--overwrite", action="store_true", help="adapt again where a file exists")


def add_accelerator(parser: argparse.ArgumentParser) -> None:
    """Add ``--accelerator``."""
    parser.add_argument("--accelerator", default="auto", help="cpu, gpu, mps or auto (auto)")
