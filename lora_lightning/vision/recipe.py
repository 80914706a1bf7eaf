"""A run of adaptation between image domains: data, source model, methods, report.

Reading order: `run`, then `lora_lightning.vision.methods`, where each line of the table is a
function. `run_kind` is what other kinds of runs over pictures share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import nn

from lora_lightning.adaptation.shift.measure import shift
from lora_lightning.adaptation.shift.source_statistics import FEWEST, SourceStatistics
from lora_lightning.adaptation.shift.verdicts import NAMES, Shift
from lora_lightning.errors import ConfigError
from lora_lightning.report.results import Prediction, Row, Run
from lora_lightning.report.write import write_report
from lora_lightning.runner.progress import Stages, interruptible, quiet_lightning
from lora_lightning.runner.sweep import method_of
from lora_lightning.runner.trainer import check_plan, make_trainer, versions
from lora_lightning.training.lora_callback import LoRACallback
from lora_lightning.vision import methods as label_free
from lora_lightning.vision.backbones import create_backbone
from lora_lightning.vision.data.image_domains import ImageDomains
from lora_lightning.vision.experiment import Context
from lora_lightning.vision.methods import METHODS
from lora_lightning.vision.settings import Config, DataSettings

# How far each target of a run lies from its source, and the file to ask it of other targets by.


REPEATS = 20  # of the bootstrap


def measure_shifts(context: Context) -> None:
    """Save the source's statistics beside the source model, and measure every target by them.

    The source is looked at on held-out pictures, each target on its training pictures, without
    labels.
    """
    data = context.data.on(test=[context.data.source])
    items = data.held_out()
    if len(items) < FEWEST:
        context.run.notes.append(
            f"The source has {len(items)} held-out pictures: with fewer than {FEWEST} it is not "
            "measured how far the targets are."
        )
        return
    model = context.fresh()
    pictures = data.predict_dataloader().dataset
    size = 2 * data.batch_size
    source = SourceStatistics.of(model, pictures, context.labels(items), batch_size=size)
    source.save(Path(context.config.out) / f"{context.named('source_statistics')}.safetensors")
    tick = context.stages.stage("how far are the targets?", "domains")
    found = {}
    for done, domain in enumerate(data.target, start=1):
        target = data.on(train=[domain]).unlabelled()
        found[domain] = shift(model, source, target, batch_size=size, repeats=REPEATS)
        tick(done, len(data.target))
    context.run.shifts[context.seed] = {name: s.as_dict() for name, s in found.items()}
    if far := {name: s for name, s in found.items() if s.verdict == NAMES[-1]}:
        _warn(context, far)


def _warn(context: Context, far: dict[str, Shift]) -> None:
    where = "" if context.first else f" (seed {context.seed})"
    text = (
        f"May be too far to adapt to without labels{where}: {', '.join(far)}. Label some items, or "
        f"do not answer there. {next(iter(far.values())).caveat}"
    )
    context.run.notes.append(text)
    context.stages.console.print(text, style="yellow", markup=False)


# The adapted model that the predictions show: the last of these that was run.
SHOWN = ("BatchNorm statistics", label_free.NAME, "full, target labels", "LoRA, target labels")


@dataclass(frozen=True)
class Kind:
    """What tells a kind of run over pictures from another.

    Attributes:
        data: reads the pictures.
        context: trains, measures, and says what a label is.
        methods: name → a function from the context to rows, in the order of the table.
        check: raises ConfigError for a value of `train.label_free` that cannot be.
        shifts: measures how far the targets are; None where that needs classes.
    """

    data: type[ImageDomains]
    context: type[Context]
    methods: Mapping[str, Callable[[Any], list[Row]]]
    check: Callable[[Any], None]
    shifts: Callable[[Any], None] | None = None


CLASSIFICATION = Kind(ImageDomains, Context, METHODS, label_free.check, measure_shifts)


def run(given: DictConfig) -> Run:
    """Run a classification, see `run_kind`."""
    return run_kind(given, CLASSIFICATION)


def run_kind(given: DictConfig, kind: Kind) -> Run:
    """Run every stage for every seed; the results lie in ``config.out`` afterwards.

    Raises:
        ConfigError: a value that no type could catch, before anything is rendered or trained.
        DataError: the pictures cannot be used.
    """
    with quiet_lightning(), interruptible():
        config = _checked(given, kind)
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(given, out / "config.yaml")
        return _run(config, given, kind)


def _run(config: Config, given: DictConfig, kind: Kind) -> Run:
    root = Path(config.data.root) if config.data.root else _render(config.data)
    with Stages() as stages:
        # The backbone first: a mistake in its name should not cost the reading of the pictures.
        normalisation = _normalisation(_backbone(config, 2, []))
        data = _pictures(kind.data, config.data, root, normalisation, stages)
        result = _empty(config, given, data, kind.context.metric)
        for seed in config.seeds:
            stages.console.print(f"[bold]seed {seed}[/bold]") if len(config.seeds) > 1 else None
            _one_seed(config, data, seed, stages, result, kind)
            write_report(result, Path(config.out))
    return result


def _one_seed(
    config: Config, data: ImageDomains, seed: int, stages: Stages, result: Run, kind: Kind
) -> None:
    seed_everything(seed, verbose=False)
    notices: list[str] = []
    source = _backbone(config, kind.context.outputs(data), notices)
    result.notes += [n for n in notices if n not in result.notes]
    context = kind.context(config, data, source, seed, stages, result)
    context.fit(source, config.train.source, [data.source], "training the source model")
    # The adapter is of use together with the model that it was made for only.
    weights = {k: v.detach().clone().contiguous() for k, v in source.state_dict().items()}
    save_file(weights, Path(config.out) / f"{context.named('source')}.safetensors")
    if kind.shifts is not None:
        kind.shifts(context)
    for name in config.methods:
        result.rows += method_of(name, kind.methods)(context)
    result.predictions += _predictions(context)


def _predictions(context: Context) -> list[Prediction]:
    """The held-out target pictures before and after adaptation."""
    before = context.answers.get("source only")
    shown = [m for m in SHOWN if m in context.answers]
    if before is None or not shown:
        return []
    after = context.answers[shown[-1]]
    data = context.data
    items = data.on(test=[data.source, *data.target]).held_out()
    return [
        Prediction(
            item.path.relative_to(data.root).as_posix(),
            item.domain,
            context.label(item),
            *context.said(old),
            *context.said(new),
            context.seed,
        )
        for item, old, new in zip(items, before, after, strict=True)
        if item.domain != data.source
    ]


def _checked(given: DictConfig, kind: Kind) -> Config:
    config: Any = OmegaConf.to_object(given)
    assert isinstance(config, Config)
    check_plan(config.methods, config.seeds, kind.methods)
    stages = config.train
    for name, stage in (("source", stages.source), ("lora", stages.lora), ("full", stages.full)):
        if stage.epochs < 1:
            raise ConfigError(f"train.{name}.epochs must be at least 1, got {stage.epochs}")
        kind.context.module(nn.Identity(), stage)
    kind.check(stages.label_free)
    for key in ("size", "batch_size"):
        if getattr(config.data, key) < 2:
            raise ConfigError(f"data.{key} must be at least 2, got {getattr(config.data, key)}")
    # Both check what they are given; better now than after the source model's training.
    LoRACallback(config.lora, batch_norm=config.batch_norm)
    make_trainer(config)
    return config


def _render(data: DataSettings) -> Path:
    """The rendered set that the settings describe, from the cache where it is there."""
    from lora_lightning.vision.data.synthetic.rendered import render_domains, worlds_of

    number = data.render
    source = {"train": number.source_train, "test": number.source_test}
    target = {"train": number.target_train, "test": number.target_test}
    wanted = (
        [d for d in worlds_of(number.shift) if d != data.source]
        if data.target is None
        else data.target
    )
    domains = {data.source: source, **{name: target for name in wanted if name != data.source}}
    side = ImageDomains(".", size=data.size).stored_side
    return render_domains(number.cache, domains, shift=number.shift, size=side, seed=data.seed)


def _backbone(config: Config, num_classes: int, notices: list[str]) -> nn.Module:
    m = config.model
    return create_backbone(m.name, num_classes, m.checkpoint, m.pretrained, m.imagenet, notices)


def _normalisation(model: nn.Module) -> dict[str, Any]:
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    return {key: known[key] for key in ("mean", "std") if key in known}


def _pictures(
    domains: type[ImageDomains],
    settings: DataSettings,
    root: Path,
    normalisation: dict[str, Any],
    stages: Stages,
) -> ImageDomains:
    data = domains(
        root,
        settings.source,
        settings.target,
        classes=settings.classes,
        size=settings.size,
        test_fraction=settings.test_fraction,
        seed=settings.seed,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        cache_mb=settings.cache_mb,
        horizontal_flip=settings.horizontal_flip,
        tick=stages.stage("reading pictures", "pictures"),
        **normalisation,
    )
    data.setup()
    if data.skipped:
        stages.console.print(
            f"[yellow]{len(data.skipped)} pictures cannot be read and are left out:"
        )
        for path, reason in data.skipped[:5]:
            stages.console.print(f"  {path}: {reason}", markup=False)
    return data


def _empty(config: Config, given: DictConfig, data: ImageDomains, metric: str) -> Run:
    plain: Any = OmegaConf.to_container(given)
    counts = {s: sum(i.split == s for i in data.items) for s in ("train", "test")}
    notes = [
        f"One adapter for all target domains together; {len(data.classes)} classes, "
        f"{counts['train']} training and {counts['test']} held-out pictures.",
        "Every method starts from the same source model and is measured on the same held-out "
        "pictures, which no training sees.",
    ]
    return Run(
        name=config.name,
        title=config.title,
        metric=metric,
        rows=[],
        predictions=[],
        classes=data.classes,
        spectra={},
        config=plain,
        data_root=data.root,
        versions=versions("timm"),
        skipped=data.skipped,
        notes=notes,
    )
