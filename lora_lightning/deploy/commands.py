"""The commands for deployment; their arguments are in `lora_lightning.deploy.cli`.

Modules that take long to import are imported by the command that needs them.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_lightning.speech.tasks.named_recogniser import NamedRecogniser
    from lora_lightning.vision.named_classifier import NamedClassifier


def _adapted(arguments: argparse.Namespace) -> NamedClassifier | NamedRecogniser:
    """The model of these arguments, with the adapter on it."""
    from lora_lightning.speech.tasks.named_recogniser import named_recogniser, names_recogniser

    name = arguments.model
    if names_recogniser(name):
        return named_recogniser(name, arguments.checkpoint, arguments.adapter)
    from lora_lightning.vision.named_classifier import named_classifier

    return named_classifier(
        name,
        arguments.checkpoint,
        prefix=arguments.prefix,
        adapter=arguments.adapter,
        num_classes=arguments.num_classes,
    )


def merge(arguments: argparse.Namespace) -> None:
    """Write a model with an adapter merged in."""
    from lora_lightning.model import switching
    from lora_lightning.report.console import say
    from lora_lightning.runner.weights import save_weights
    from lora_lightning.speech.tasks.recognisers import ConformerCTC, save_recogniser

    found = _adapted(arguments)
    switching.merge(found.model)
    if isinstance(found.model, ConformerCTC):
        save_recogniser(found.model, arguments.out, half=False)
    else:
        save_weights(found.model, arguments.out)
    say(
        f"{arguments.out}: {found.name} with {len(found.classes)} classes, "
        f"{len(found.model.state_dict())} tensors"
    )


def export(arguments: argparse.Namespace) -> None:
    """Write a model with an adapter for other programs."""
    from lora_lightning.deploy.exporting import FORMATS
    from lora_lightning.deploy.exporting import export as exported
    from lora_lightning.report.console import say

    FORMATS.get(arguments.format)  # before the model is loaded
    found = _adapted(arguments)
    done = exported(
        found.model,
        arguments.out,
        arguments.format,
        inputs=found.example(),
        merged=not arguments.unmerged,
        free=found.free,
    )
    compared = "; it was not run, as the package for it is not installed"
    if done.differences:
        worst, sizes = max(done.differences.values()), ", ".join(map(str, done.differences))
        compared = f"; outputs of batches of {sizes} differ by at most {worst:.1e} of the largest"
    say(f"{done.path}: {found.name} as {arguments.format}{compared}")
