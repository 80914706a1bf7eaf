"""One adapter for each of several targets of pictures, the base loaded once.

The implementation of ``lora-lightning adapt-images``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning.pytorch import seed_everything

from lora_lightning.adaptation.shift.measure import shift
from lora_lightning.model.adapter_file.save import save_adapter
from lora_lightning.model.switching import adapters, remove
from lora_lightning.runner.each_target import (
    ADAPTED,
    KEPT,
    Outcome,
    Tick,
    attempted,
    each_target,
)
from lora_lightning.runner.file_names import adapter_name
from lora_lightning.runner.progress import Stages, quiet_lightning
from lora_lightning.runner.settings import RunConfig
from lora_lightning.vision.data.folder_targets import Found
from lora_lightning.vision.image_report import Tell, reporter
from lora_lightning.vision.image_training import (
    Fit,
    ImageSettings,
    from_labels,
    without_labels,
)
from lora_lightning.vision.named_classifier import NamedClassifier


def adapt_images(
    base: NamedClassifier,
    targets: Mapping[str, Found],
    files: Mapping[str, Path],
    settings: ImageSettings,
    stage: Callable[[str, str], Tick],
    tell: Tell,
    overwrite: bool = False,
) -> Iterator[Outcome]:
    """Adapt to each target in turn; each adapter file is written when its target is done."""
    for extra, what in ((settings.canary, "canary"), (settings.labels, "labels")):
        if extra is not None:
            base.check_labels(extra.items, what)
            extra.read(base.prepared, stage(f"reading {what}", "pictures"))

    def one(name: str) -> Outcome:
        return _read_one(base, targets[name], files[name], settings, stage, tell)

    return each_target(base.model, {name: files[name] for name in targets}, one, overwrite)


def job(common: tuple[NamedClassifier, ImageSettings, str], item: tuple[Found, Path]) -> Outcome:
    """A target of `each_apart`: the classifier, settings and command; pictures and file."""
    (base, settings, command), (found, path) = common, item
    with Stages() as stages:
        tell = reporter(base, settings, {found.name: path}, command, stages)
        return attempted(
            found.name,
            lambda name: _read_one(base, found, path, settings, stages.stage, tell),
        )


def _read_one(
    base: NamedClassifier,
    found: Found,
    path: Path,
    settings: ImageSettings,
    stage: Callable[[str, str], Tick],
    tell: Tell,
) -> Outcome:
    found.read(base.prepared, stage(f"reading {found.name}", "pictures"))
    # As `Classifier` has it: on a CPU a training takes a quarter less time.
    base.model.to(memory_format=torch.channels_last)
    try:
        return _one(base, found, path, settings, stage(found.name, "batches"), tell)
    finally:
        found.pictures = {}


def _one(
    base: NamedClassifier,
    found: Found,
    path: Path,
    settings: ImageSettings,
    tick: Tick,
    tell: Tell,
) -> Outcome:
    seed_everything(settings.seed, verbose=False)
    adapter, model = adapter_name(found.name), base.model
    far = None
    if settings.statistics is not None:
        far = shift(model, settings.statistics, found.data(base.prepared, base.classes), repeats=20)
    learn = without_labels if settings.labels is None else from_labels
    try:
        with TemporaryDirectory() as folder, quiet_lightning():
            config = RunConfig(accelerator=settings.accelerator, out=folder)
            learnt = learn(base, found, settings, Fit(config, adapter, tick))
        file = None
        if learnt.kept:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = save_adapter(model, path)
    finally:
        if adapter in adapters(model):
            remove(model)
        model.eval()
    if len(learnt.rounds) == 1:  # no batch was trained
        tick(1, 1)
    tell(found, learnt, far, file)
    before, after = learnt.accuracies or (None, None)
    status = ADAPTED if learnt.kept else KEPT
    said = f"{learnt.verdict}. {far.verdict.capitalize()}" if far else learnt.verdict
    return Outcome(found.name, status, learnt.learnt, learnt.items, before, after, file, said)
