"""The commands ``merge`` and ``export``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_lightning.deploy import commands as run
from lora_lightning.vision.cli import add_weights


def add_commands(commands: Any) -> None:
    """Add them to the command's parser."""
    merge = commands.add_parser("merge", help="write a model with an adapter merged in")
    _add_model(merge)
    merge.add_argument("--adapter", required=True, metavar="FILE", type=Path)
    merge.add_argument("--out", required=True, metavar="FILE", type=Path, help=".safetensors")
    merge.set_defaults(command=run.merge)

    export = commands.add_parser("export", help="write a model with an adapter for other programs")
    export.add_argument(
        "--format", required=True, help="timm, peft, onnx or torch-export", metavar="FORMAT"
    )
    _add_model(export)
    export.add_argument(
        "--out", required=True, metavar="FILE|DIR", type=Path,
        help="a folder for timm and peft, a file for the others",
    )  # fmt: skip
    export.add_argument("--unmerged", action="store_true", help="with the factors in the graph")
    export.add_argument("adapter", metavar="ADAPTER", type=Path)
    export.set_defaults(command=run.export)


def _add_model(parser: argparse.ArgumentParser) -> None:
    add_weights(parser, "the base: its name in timm, or that of a recogniser as in transcribe")
    parser.add_argument(
        "--num-classes", metavar="N", type=int, help="default: the adapter's own, or the base's"
    )
