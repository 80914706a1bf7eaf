"""The commands for deployment; their arguments are in `lora_lightning.deploy.cli`.

Modules that take long to import are imported by the command that needs them.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_lightning.errors import AdapterFileError, ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from lora_lightning.deploy.adapter_folder import AdapterFolder
    from lora_lightning.speech.tasks.named_recogniser import NamedRecogniser
    from lora_lightning.vision.named_classifier import NamedClassifier


KEY = "LORA_LIGHTNING_API_KEY"  # variable of the environment


def _adapted(arguments: argparse.Namespace) -> NamedClassifier | NamedRecogniser:
    """The model of these arguments, with the adapter on it."""
    from lora_lightning.deploy.bases import named

    return named(
        arguments.model,
        arguments.checkpoint,
        arguments.adapter,
        prefix=arguments.prefix,
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


def serve(arguments: argparse.Namespace) -> None:
    """Answer requests until stopped."""
    from lora_lightning.report.console import say

    try:
        from lora_lightning.deploy.server import Limits
        from lora_lightning.deploy.server import serve as served
    except ImportError as error:
        raise MissingDependencyError(
            f"serve needs {error.name}: pip install 'lora-lightning[serve]'"
        ) from error
    import torch

    from lora_lightning.deploy.adapter_folder import AdapterFolder

    torch.set_num_threads(1)  # what receives is forked, and OpenMP's threads are not
    _check(arguments)
    limits = Limits(
        round(arguments.max_mb * 1e6),
        arguments.max_batch,
        arguments.wait / 1000,
        arguments.capacity,
        arguments.timeout,
    )
    folder = AdapterFolder(arguments.adapters)
    load, intake = _base(arguments, folder)
    key = os.environ.get(KEY) or None
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    where = f"http://{host}:{arguments.port}"
    say(
        f"{arguments.model} with {len(folder.files())} adapters of {folder.path}: POST {where}"
        f"/predict?adapter=NAME, GET {where}/health and /metrics; "
        + (f"requests need the key in {KEY}" if key else f"no key is asked for ({KEY} is not set)")
    )
    served(
        load,
        intake,
        folder,
        limits,
        host=arguments.host,
        port=arguments.port,
        accelerator=arguments.accelerator,
        key=key,
    )


def _check(arguments: argparse.Namespace) -> None:
    from lora_lightning.lora.values import check_count, check_number

    check_count("--max-batch", arguments.max_batch)
    check_count("--capacity", arguments.capacity, arguments.max_batch)
    check_number("--port", arguments.port, "[1024, 65535]")
    for name in ("max_mb", "max_seconds", "wait", "timeout"):
        check_number(f"--{name.replace('_', '-')}", getattr(arguments, name), "(0, inf)")


def _base(arguments: argparse.Namespace, folder: AdapterFolder) -> tuple[Any, Any]:
    """What loads the base, and how its items are read.

    Raises:
        ConfigError: there is no such base, or the folder's first adapter takes other items.
    """
    from lora_lightning.deploy.bases import answers
    from lora_lightning.model.adapter_file.format import read
    from lora_lightning.report.console import say

    loaded = partial(
        answers,
        arguments.model,
        arguments.checkpoint,
        prefix=arguments.prefix,
        classes=arguments.classes,
        size=arguments.size,
        num_classes=arguments.num_classes,
    )
    base = loaded()
    for notice in getattr(base.base, "notices", ()):  # what was left out of a checkpoint
        say(notice)
    for file in [*folder.files().values()][:1]:
        try:
            base.told(read(file.path)[0].get("data", {}))
        except AdapterFileError:  # is said to those who ask for it
            continue
        except ConfigError as error:
            raise ConfigError(f"{file.path}: {error}") from error
    return loaded, base.intake(arguments.max_seconds)
