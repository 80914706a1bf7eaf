"""The commands of pictures; their arguments are in `lora_lightning.vision.cli`.

Modules that take long to import are imported by the command that needs them.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import SEEDS, check_count, check_number

if TYPE_CHECKING:
    from lora_lightning.vision.image_training import ImageSettings
    from lora_lightning.vision.named_classifier import NamedClassifier

_COLUMNS = ("pictures of", "learnt\nfrom", "held\nout", "right %\nbefore", "right %\nafter")


def _classifier(arguments: argparse.Namespace) -> NamedClassifier:
    from lora_lightning.report.console import PlainConsole
    from lora_lightning.runner.progress import quiet_lightning
    from lora_lightning.runner.settings import RunConfig
    from lora_lightning.runner.trainer import make_trainer
    from lora_lightning.vision.named_classifier import named_classifier

    if arguments.size is not None:
        check_count("--size", arguments.size)
    found = named_classifier(
        arguments.model,
        arguments.checkpoint,
        prefix=arguments.prefix,
        classes=arguments.classes,
        size=arguments.size,
        adapter=getattr(arguments, "adapter", None),
    )
    for notice in found.notices:
        PlainConsole(stderr=True).print(notice, style="yellow", soft_wrap=True)
    with quiet_lightning():
        trainer = make_trainer(RunConfig(accelerator=arguments.accelerator))
    found.model.to(trainer.strategy.root_device)
    return found


def _settings(arguments: argparse.Namespace) -> ImageSettings:
    from lora_lightning.lora.config import LoRAConfig
    from lora_lightning.vision.data.folder_targets import labelled
    from lora_lightning.vision.image_training import ImageSettings

    if arguments.canary and arguments.labels:
        raise ConfigError(
            "give --canary or --labels: of labelled pictures to learn from, some are held out"
        )
    check_number("--seed", arguments.seed, SEEDS)
    targets = arguments.target_modules
    settings = ImageSettings(
        LoRAConfig(rank=arguments.rank, alpha=arguments.alpha, target_modules=targets or "all"),
        canary=arguments.canary and labelled(arguments.canary),
        labels=arguments.labels and labelled(arguments.labels),
        statistics=arguments.source_statistics,
        seed=arguments.seed,
        accelerator=arguments.accelerator,
    )
    settings.training.batch_size = arguments.batch
    settings.training.batch_norm = arguments.batch_norm
    settings.training.target_modules = targets or settings.training.target_modules
    for stage in (settings.training, settings.labelled_training):
        if arguments.epochs is not None:  # as said, also where a target is small
            stage.epochs, stage.least_steps = arguments.epochs, 0
        if arguments.learning_rate is not None:
            stage.learning_rate = arguments.learning_rate
        check_count("--epochs", stage.epochs)
    return settings


def adapt(arguments: argparse.Namespace) -> int:
    """An adapter for each target of pictures; the exit code."""
    from lora_lightning.report.console import say
    from lora_lightning.runner.each_target import adapter_files, each_apart, shown
    from lora_lightning.runner.jobs import given
    from lora_lightning.runner.progress import Stages, interruptible
    from lora_lightning.vision.adapt_images import adapt_images, job
    from lora_lightning.vision.data.folder_targets import unlabelled_targets
    from lora_lightning.vision.image_report import report_folder, reporter

    targets = unlabelled_targets(arguments.images)
    files = adapter_files(arguments.out, targets, "folders")
    settings = _settings(arguments)
    if len(targets) > 1 and (settings.canary or settings.labels):
        raise ConfigError(
            f"--canary and --labels are of one target, and --images has {len(targets)}"
        )
    jobs, again = given(arguments), arguments.overwrite
    base = _classifier(arguments)
    with Stages() as stages, interruptible():
        if jobs.serial or len(targets) == 1:
            tell = reporter(base, settings, files, arguments.typed, stages)
            outcomes = adapt_images(base, targets, files, settings, stages.stage, tell, again)
        else:
            items = {name: (found, files[name]) for name, found in targets.items()}
            common = base, settings, arguments.typed
            outcomes = each_apart(base.model, files, job, items, common, jobs, stages, again)
        code = shown(outcomes, stages, _COLUMNS, files)
    reports = sorted(
        {str(p / "report.html") for f in files.values() if (p := report_folder(f)).is_dir()}
    )
    say("\n".join(f"open {path}" for path in reports))
    return code


def classify(arguments: argparse.Namespace) -> int:
    """Print what pictures show; the exit code."""
    from lora_lightning.vision.classify import classified, write_csv, write_table
    from lora_lightning.vision.data.folder_targets import single_pictures

    check_count("--top", arguments.top)
    paths, skipped = single_pictures(arguments.files)
    base = _classifier(arguments)
    top = min(arguments.top, len(base.classes))
    answers = classified(base, paths, top, skipped)
    (write_csv if arguments.csv else write_table)(answers, top)
    return _left_out(skipped)


def _left_out(skipped: list[tuple[str, str]]) -> int:
    """Print what could not be read; the exit code."""
    from lora_lightning.runner.progress import Stages

    Stages().left_out("files are", skipped)
    return int(any(not reason.startswith("ending") for _, reason in skipped))


def shift(arguments: argparse.Namespace) -> int:
    """Print how far pictures are from the source."""
    import torch

    from lora_lightning.adaptation.shift.measure import shift as measured
    from lora_lightning.adaptation.shift.source_statistics import SourceStatistics
    from lora_lightning.model.switching import adapters, disabled
    from lora_lightning.report.console import PlainConsole
    from lora_lightning.runner.progress import Stages
    from lora_lightning.vision.data.folder_targets import labelled, unlabelled_targets

    targets = unlabelled_targets(arguments.images)
    base = _classifier(arguments)
    with Stages() as stages:
        if arguments.source.is_dir():
            own = labelled(arguments.source)
            base.check_labels(own.items, "source")
            own.read(base.prepared, stages.stage("reading the source", "pictures"))
            data = own.data(base.prepared, base.classes)
            labels = torch.tensor([data.index[i.class_name] for i in own.items])
            with disabled(base.model) if adapters(base.model) else torch.no_grad():
                source = SourceStatistics.of(base.model, data, labels)
        else:
            source = SourceStatistics.load(arguments.source)
        if arguments.save is not None:
            source.save(arguments.save)
        found = {}
        for name, target in targets.items():
            target.read(base.prepared, stages.stage(f"reading {name}", "pictures"))
            found[name] = measured(base.model, source, target.data(base.prepared, base.classes))
            target.pictures = {}
            stages.left_out(f"files of {name} are", target.skipped)
    console = PlainConsole()
    for name, result in found.items():
        console.print(f"\n{name}", style="bold")
        console.print(result.table())
    return 0
