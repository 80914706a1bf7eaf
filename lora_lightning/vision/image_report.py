"""The report of `adapt_images` on one target: page, predictions.csv, how far it is."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lora_lightning.adaptation.shift.verdicts import Shift
from lora_lightning.report.evidence import of_mean
from lora_lightning.report.results import Prediction, Row, Run
from lora_lightning.report.versions import hardware, versions
from lora_lightning.report.write import write_report
from lora_lightning.runner.progress import Stages
from lora_lightning.vision.classifier import likeliest
from lora_lightning.vision.data.folder_targets import Found
from lora_lightning.vision.image_training import ImageSettings, Learnt
from lora_lightning.vision.named_classifier import NamedClassifier

Tell = Callable[[Found, Learnt, Shift | None, Path | None], None]


def report_folder(file: Path) -> Path:
    """The folder of a report, beside the adapter file that it is about."""
    return file.with_name(f"{file.stem}-report")


def reporter(
    base: NamedClassifier,
    settings: ImageSettings,
    files: Mapping[str, Path],
    command: str,
    stages: Stages,
) -> Tell:
    """A function that writes the report of a target, and says what was left out of it."""

    def tell(found: Found, learnt: Learnt, far: Shift | None, file: Path | None) -> None:
        folder = report_folder(files[found.name])
        stages.left_out(f"files of {found.name} are", found.skipped)
        write_image_report(base, found, learnt, far, settings, file, folder, command)

    return tell


def write_image_report(
    base: NamedClassifier,
    found: Found,
    learnt: Learnt,
    far: Shift | None,
    settings: ImageSettings,
    file: Path | None,
    folder: Path,
    command: str,
) -> None:
    """Write it."""
    seed = settings.seed
    kept = "The adapter is kept" if learnt.kept else "The source model is kept, without adapter"
    notes = [*base.notices]
    if not base.named:
        notes.append("Nothing named the classes: they are called by their numbers.")
    if far is not None:
        notes.append(far.sentence())
    run = Run(
        name="adapt-images",
        title=f"{base.name} on {found.name}",
        metric="accuracy",
        rows=list(_rows(found, learnt, file, seed)),
        predictions=list(_predictions(base, found, learnt, seed)),
        classes=base.classes,
        spectra={},
        config={"command": shlex.split(command), "lora": settings.lora.to_dict()},
        data_root=found.root,
        versions={**versions("torch", "lightning", "timm"), "hardware": hardware()},
        skipped=found.skipped,
        notes=notes,
        command=command,
        rounds={seed: [vars(r) for r in learnt.rounds]} if learnt.rounds else {},
        shifts={seed: {found.name: far.as_dict()}} if far else {},
        verdict=f"{kept}: {learnt.verdict}.",
    )
    for row, right in zip(run.rows, learnt.right, strict=False):
        run.scores[row.method, row.domain, seed] = of_mean(right)
        row.tested = len(right)
    write_report(run, folder)


def _rows(found: Found, learnt: Learnt, file: Path | None, seed: int) -> Iterator[Row]:
    if learnt.accuracies is None:
        return
    before, after = learnt.accuracies
    yield Row("source only", found.name, seed, "accuracy", before, 0, 0.0)
    size = file.stat().st_size if file else None
    # Labelled items are counted where they were learnt from.
    costs = learnt.parameters, learnt.seconds, size, None if learnt.rounds else learnt.learnt
    yield Row(learnt.method, found.name, seed, "accuracy", after, *costs)


def _predictions(
    base: NamedClassifier, found: Found, learnt: Learnt, seed: int
) -> Iterator[Prediction]:
    changed = learnt.changed_in or [None] * len(found.items)
    rows = zip(found.items, learnt.before, learnt.after, changed, strict=True)
    for item, old, new, when in rows:
        said = *likeliest(old, base.classes), *likeliest(new, base.classes)
        name, label = found.told(item), item.class_name
        yield Prediction(name, found.name, label, *said, seed, "target", learnt.method, when)
