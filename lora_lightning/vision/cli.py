"""The commands of pictures: ``adapt-images``, ``classify`` and ``shift``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_lightning.runner.jobs import add_jobs
from lora_lightning.runner.options import add_accelerator, add_options, add_training
from lora_lightning.vision import commands as run


def add_commands(commands: Any) -> None:
    """Add them to the command's parser."""
    _add_adapt(commands)
    _add_classify(commands)
    _add_shift(commands)


def add_weights(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the options that name a model and its weights; what: the model, for the help."""
    parser.add_argument("--model", required=True, metavar="NAME", help=what)
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE",
        help="its weights: a state dict, or a training checkpoint of timm or Lightning; default: "
        "timm's own, from a hub",
    )  # fmt: skip
    parser.add_argument(
        "--prefix", help='of the network\'s names in the checkpoint, such as "model."; found if not'
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    add_weights(parser, "the classifier's name in timm; or hf-hub:user/name, local-dir:folder")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE",
        help="names of the classes, one a line, in the order of the head",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=int, metavar="PIXELS", help="side of its pictures; default: as trained"
    )
    add_accelerator(parser)


def _add_adapt(commands: Any) -> None:
    adapt = commands.add_parser("adapt-images", help="learn an adapter for a folder of pictures")
    _add_model(adapt)
    adapt.add_argument(
        "--images", required=True, nargs="+", type=Path, metavar="DIR|MANIFEST",
        help="pictures without labels: folders, flat or nested, an adapter for each; or a .csv, "
        ".tsv or .jsonl with the columns path and, for several adapters, domain",
    )  # fmt: skip
    adapt.add_argument(
        "--out", required=True, type=Path, metavar="FILE|DIR",
        help="the adapter file (.safetensors); a folder for several. The report is beside it",
    )  # fmt: skip
    adapt.add_argument(
        "--canary", type=Path, metavar="DIR|CSV",
        help="a few labelled pictures, in folders of their classes: an adapter that does worse on "
        "them than the source is not kept; nothing is learnt from them",
    )  # fmt: skip
    adapt.add_argument(
        "--labels", type=Path, metavar="DIR|CSV",
        help="labelled pictures to learn from, in folders of their classes, or a table with the "
        "columns path and label",
    )  # fmt: skip
    adapt.add_argument(
        "--source-statistics", type=Path, metavar="FILE",
        help="of a recipe or of the command shift: tells how far each folder is",
    )  # fmt: skip
    add_training(adapt, 4, None, "auto; with labels all")
    add_options(
        adapt,
        ("batch", int, 32, "pictures in a batch"),
        ("epochs", int, None, "passes over the pictures (4; with labels 10)"),
        ("learning-rate", float, None, "peak learning rate (0.002; with labels 0.004)"),
    )
    adapt.add_argument(
        "--batch-norm",
        choices=("auto", "source", "target"),
        default="auto",
        help="statistics while it trains without labels (auto: the target's if they help)",
    )
    add_jobs(adapt, "folders")
    adapt.set_defaults(command=run.adapt)


def _add_classify(commands: Any) -> None:
    classify = commands.add_parser("classify", help="say what pictures show")
    _add_model(classify)
    classify.add_argument("--adapter", type=Path, metavar="FILE", help="of adapt-images")
    classify.add_argument("--csv", action="store_true", help="print CSV in place of a table")
    classify.add_argument("--top", type=int, default=1, help="classes for each picture (1)")
    classify.add_argument("files", nargs="+", type=Path, metavar="FILE|DIR")
    classify.set_defaults(command=run.classify)


def _add_shift(commands: Any) -> None:
    shift = commands.add_parser("shift", help="tell how far pictures are from a model's source")
    _add_model(shift)
    shift.add_argument("--adapter", type=Path, metavar="FILE", help="measured as well")
    shift.add_argument(
        "--source", required=True, type=Path, metavar="FILE|DIR",
        help="the source's statistics, of a recipe or of --save; or pictures of it that the model "
        "was not trained on, in folders of their classes",
    )  # fmt: skip
    shift.add_argument("--save", type=Path, metavar="FILE", help="write the source's statistics")
    shift.add_argument("--images", required=True, nargs="+", type=Path, metavar="DIR|MANIFEST")
    shift.set_defaults(command=run.shift)
