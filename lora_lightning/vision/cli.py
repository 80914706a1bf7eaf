"""The commands of pictures: ``adapt-images``, ``classify``, ``shift`` and ``merge``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lightning.errors import ConfigError

if TYPE_CHECKING:
    from lora_lightning.vision.image_training import ImageSettings
    from lora_lightning.vision.named_classifier import NamedClassifier

_COLUMNS = ("pictures of", "learnt\nfrom", "held\nout", "right %\nbefore", "right %\nafter")


def add_commands(commands: Any) -> None:
    """Add them to the command's parser."""
    _add_adapt(commands)
    _add_classify(commands)
    _add_shift(commands)
    merge = commands.add_parser("merge", help="write a timm model with an adapter merged in")
    merge.add_argument("--model", required=True, metavar="NAME", help="the base's name in timm")
    merge.add_argument("--checkpoint", metavar="FILE", type=Path, help="the base's weights")
    merge.add_argument("--adapter", required=True, metavar="FILE", type=Path)
    merge.add_argument("--out", required=True, metavar="FILE", type=Path, help=".safetensors")
    merge.add_argument("--num-classes", metavar="N", type=int, help="default: the adapter's own")
    merge.set_defaults(command=_merge)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="NAME",
        help="the classifier's name in timm; or hf-hub:user/name, local-dir:folder",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE",
        help="its weights: a state dict, or a training checkpoint of timm or Lightning; default: "
        "timm's own, from a hub",
    )  # fmt: skip
    parser.add_argument(
        "--prefix", help='of the network\'s names in the checkpoint, such as "model."; found if not'
    )
    parser.add_argument(
        "--classes", type=Path, metavar="FILE",
        help="names of the classes, one a line, in the order of the head",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=int, metavar="PIXELS", help="side of its pictures; default: as trained"
    )
    parser.add_argument("--accelerator", default="auto", help="cpu, gpu, mps or auto (auto)")


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
    for name, kind, default, text in (
        ("rank", int, 4, "inner dimension of the factors"),
        ("alpha", float, 8.0, "numerator of the scaling alpha/rank"),
        ("batch", int, 32, "pictures in a batch"),
        ("seed", int, 0, "of factors, order, and what is held out"),
    ):
        adapt.add_argument(f"--{name}", type=kind, default=default, help=f"{text} ({default:g})")
    for name, kind, text in (
        ("epochs", int, "passes over the pictures (4; with labels 10)"),
        ("learning-rate", float, "peak learning rate (0.002; with labels 0.004)"),
    ):
        adapt.add_argument(f"--{name}", type=kind, help=text)
    adapt.add_argument("--target-modules", default="all", help="what is adapted (all)")
    adapt.add_argument("--overwrite", action="store_true", help="adapt again where a file exists")
    adapt.set_defaults(command=_adapt)


def _add_classify(commands: Any) -> None:
    classify = commands.add_parser("classify", help="say what pictures show")
    _add_model(classify)
    classify.add_argument("--adapter", type=Path, metavar="FILE", help="of adapt-images")
    classify.add_argument("--csv", action="store_true", help="print CSV in place of a table")
    classify.add_argument("--top", type=int, default=1, help="classes for each picture (1)")
    classify.add_argument("files", nargs="+", type=Path, metavar="FILE|DIR")
    classify.set_defaults(command=_classify)


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
    shift.set_defaults(command=_shift)


def _classifier(arguments: argparse.Namespace) -> NamedClassifier:
    from lora_lightning.report.console import PlainConsole
    from lora_lightning.runner.progress import quiet_lightning
    from lora_lightning.runner.settings import RunConfig
    from lora_lightning.runner.trainer import make_trainer
    from lora_lightning.vision.named_classifier import named_classifier

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
    settings = ImageSettings(
        LoRAConfig(
            rank=arguments.rank, alpha=arguments.alpha, target_modules=arguments.target_modules
        ),
        canary=arguments.canary and labelled(arguments.canary),
        labels=arguments.labels and labelled(arguments.labels),
        statistics=arguments.source_statistics,
        seed=arguments.seed,
        accelerator=arguments.accelerator,
    )
    settings.training.batch_size = arguments.batch
    for stage in (settings.training, settings.labelled_training):
        stage.epochs = stage.epochs if arguments.epochs is None else arguments.epochs
        stage.learning_rate = arguments.learning_rate or stage.learning_rate
        if stage.epochs < 1:
            raise ConfigError(f"--epochs must be at least 1, got {stage.epochs}")
    return settings


def _adapt(arguments: argparse.Namespace) -> int:
    from lora_lightning.runner.each_target import adapter_files, shown
    from lora_lightning.runner.progress import Stages, interruptible
    from lora_lightning.vision.adapt_images import adapt_images
    from lora_lightning.vision.data.folder_targets import unlabelled_targets
    from lora_lightning.vision.image_report import report_folder, write_image_report

    targets = unlabelled_targets(arguments.images)
    files = adapter_files(arguments.out, targets, "folders")
    settings = _settings(arguments)
    if len(targets) > 1 and (settings.canary or settings.labels):
        raise ConfigError(
            f"--canary and --labels are of one target, and --images has {len(targets)}"
        )
    base = _classifier(arguments)
    with Stages() as stages, interruptible():

        def tell(found: Any, learnt: Any, far: Any, file: Path | None) -> None:
            folder = report_folder(files[found.name])
            stages.left_out(f"files of {found.name} are", found.skipped)
            write_image_report(base, found, learnt, far, settings, folder, arguments.typed)

        outcomes = adapt_images(
            base, targets, files, settings, stages.stage, tell, arguments.overwrite
        )
        code = shown(outcomes, stages, _COLUMNS)
    reports = sorted(
        {str(p / "report.html") for f in files.values() if (p := report_folder(f)).is_dir()}
    )
    _say("\n".join(f"open {path}" for path in reports))
    return code


def _say(text: str) -> None:
    from lora_lightning.report.console import PlainConsole

    PlainConsole().print(text, soft_wrap=True)


def _classify(arguments: argparse.Namespace) -> int:
    from lora_lightning.vision.classify import classified, write_csv, write_table
    from lora_lightning.vision.data.folder_targets import single_pictures

    if arguments.top < 1:
        raise ConfigError(f"--top must be at least 1, got {arguments.top}")
    paths, skipped = single_pictures(arguments.files)
    base = _classifier(arguments)
    answers = classified(base, paths, arguments.top, skipped)
    (write_csv if arguments.csv else write_table)(answers, arguments.top)
    return _left_out(skipped)


def _left_out(skipped: list[tuple[str, str]]) -> int:
    """Print what could not be read; the exit code."""
    from lora_lightning.runner.progress import Stages

    Stages().left_out("files are", skipped)
    return int(any(not reason.startswith("ending") for _, reason in skipped))


def _shift(arguments: argparse.Namespace) -> int:
    import torch

    from lora_lightning.adaptation.shift.measure import shift
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
            found[name] = shift(base.model, source, target.data(base.prepared, base.classes))
            target.pictures = {}
            stages.left_out(f"files of {name} are", target.skipped)
    console = PlainConsole()
    for name, measured in found.items():
        console.print(f"\n{name}", style="bold")
        console.print(measured.table())
    return 0


def _merge(arguments: argparse.Namespace) -> None:
    from lora_lightning.model.adapter_file.load import load_adapter
    from lora_lightning.model.switching import merge
    from lora_lightning.runner.weights import save_weights
    from lora_lightning.vision.backbones import create_backbone
    from lora_lightning.vision.named_classifier import classes_for_merging

    classes = arguments.num_classes
    if classes is None:
        classes = classes_for_merging(arguments.model, arguments.adapter, arguments.checkpoint)
    # Without a checkpoint of theirs, weights that no adapter was made for: a refusal.
    model: Any = create_backbone(arguments.model, classes, arguments.checkpoint)
    load_adapter(model, arguments.adapter)
    merge(model)
    weights = save_weights(model, arguments.out)
    _say(
        f"{arguments.out}: {arguments.model} with {model.num_classes} classes, "
        f"{len(weights)} tensors"
    )
