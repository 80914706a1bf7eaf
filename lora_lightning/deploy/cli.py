"""The commands ``merge``, ``export`` and ``serve``."""

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
    _add_serve(commands)


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser("serve", help="answer requests, each by the adapter it names")
    _add_model(serve)
    serve.add_argument(
        "--adapters", required=True, metavar="DIR", type=Path,
        help="a folder of adapter files, each served under its name; it is followed as it changes",
    )  # fmt: skip
    serve.add_argument(
        "--classes", type=Path, metavar="FILE",
        help="names of the classes of a classifier, one a line, in the order of its head",
    )  # fmt: skip
    serve.add_argument("--size", type=int, metavar="PIXELS", help="side of its pictures")
    serve.add_argument(
        "--host", default="127.0.0.1", choices=("127.0.0.1", "0.0.0.0", "::"),
        help="address to listen at; 0.0.0.0 and ::, any (127.0.0.1: this machine alone)",
    )  # fmt: skip
    serve.add_argument("--accelerator", default="auto", help="cpu, cuda, mps or auto (auto)")
    for name, default, text in (
        ("port", 8000, "to listen at"),
        ("max-batch", 16, "requests answered together, at most"),
        ("capacity", 256, "adapters kept in memory"),
        ("wait", 5.0, "milliseconds that a batch waits for more requests"),
        ("timeout", 30.0, "seconds after which a request that waits is answered 504"),
        ("max-mb", 16.0, "megabytes of a body, at most"),
        ("max-seconds", 30.0, "seconds of a recording, at most"),
    ):
        serve.add_argument(
            f"--{name}", default=default, type=type(default), help=f"{text} ({default:g})"
        )
    serve.set_defaults(command=run.serve)


def _add_model(parser: argparse.ArgumentParser) -> None:
    add_weights(parser, "the base: its name in timm, or that of a recogniser as in transcribe")
    parser.add_argument(
        "--num-classes", metavar="N", type=int, help="default: the adapter's own, or the base's"
    )
