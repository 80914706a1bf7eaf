"""The command ``merge``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_lightning.errors import AdapterFileError


def add_commands(commands: Any) -> None:
    """Add it to the command's parser."""
    merge = commands.add_parser("merge", help="write a timm model with an adapter merged in")
    merge.add_argument("--model", required=True, metavar="NAME", help="the base's name in timm")
    merge.add_argument("--checkpoint", metavar="FILE", type=Path, help="the base's weights")
    merge.add_argument("--adapter", required=True, metavar="FILE", type=Path)
    merge.add_argument("--out", required=True, metavar="FILE", type=Path, help=".safetensors")
    merge.add_argument("--num-classes", metavar="N", type=int, help="default: the adapter's own")
    merge.set_defaults(command=_merge)


def _merge(arguments: argparse.Namespace) -> None:
    from lora_lightning.model.adapter_file.format import read
    from lora_lightning.model.adapter_file.load import load_adapter
    from lora_lightning.model.introspection import classifier_modules
    from lora_lightning.model.switching import merge
    from lora_lightning.report.console import PlainConsole
    from lora_lightning.runner.weights import save_weights
    from lora_lightning.vision.backbones import create_backbone

    _, tensors = read(arguments.adapter)
    classes = arguments.num_classes
    if classes is None:
        heads = classifier_modules(create_backbone(arguments.model, 2))
        sizes = [tensors[f"{h}.weight"].shape[0] for h in heads if f"{h}.weight" in tensors]
        if not sizes:
            raise AdapterFileError(f"{arguments.adapter} holds no classifier: give --num-classes")
        classes = sizes[0]
    model = create_backbone(arguments.model, classes, arguments.checkpoint)
    load_adapter(model, arguments.adapter)
    merge(model)
    weights = save_weights(model, arguments.out)
    PlainConsole().print(
        f"{arguments.out}: {arguments.model} with {classes} classes, {len(weights)} tensors",
        soft_wrap=True,
    )
