"""A run of adaptation of a translator: pairs, source model, methods, report.

Reading order: `run`, then `lora_lightning.text.methods`, where each line of the
table is a function.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.registry import unknown
from lora_lightning.report.results import Run, Transcript
from lora_lightning.report.write import write_report
from lora_lightning.runner.progress import Stages, Ticks, interruptible, quiet_lightning
from lora_lightning.runner.sweep import method_of
from lora_lightning.runner.trainer import check_plan, make_trainer, threads, versions
from lora_lightning.text.experiment import Context, Domain, translation
from lora_lightning.text.methods import METHODS
from lora_lightning.text.parallel import Pair, ParallelData, held_out, read_pairs
from lora_lightning.text.self_training import check_rounds
from lora_lightning.text.settings import Config, PairSettings
from lora_lightning.text.subwords import Subwords
from lora_lightning.text.synthetic.register_words import SOURCE
from lora_lightning.text.synthetic.registers import DOMAINS, registers
from lora_lightning.text.translation import Translation
from lora_lightning.text.translation_memory import check_memory
from lora_lightning.text.translators import Translator, load_translator, save_translator
from lora_lightning.training.lora_callback import LoRACallback

# The adapted model that the translations show: the last of these that was run.
SHOWN = ("LoRA, no labels", "full, target labels", "LoRA, target labels")


def run(given: DictConfig) -> Run:
    """Run every stage for every seed; the results lie in ``config.out`` afterwards.

    Raises:
        ConfigError: a value that no type could catch, before anything is trained.
        DataError: the pairs cannot be used.
    """
    with quiet_lightning(), interruptible(), threads(given.threads):
        config = _checked(given)
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(given, out / "config.yaml")
        return _run(config, given)


def _run(config: Config, given: DictConfig) -> Run:
    everyday, *targets = _domains(config)
    with Stages() as stages:
        checkpoint = config.model.checkpoint
        source = load_translator(checkpoint) if checkpoint else _trained(config, everyday, stages)
        # An adapter is of use together with the model that it was made for only.
        save_translator(source, Path(config.out, "source.safetensors"))
        result = _empty(config, given, everyday, targets)
        for seed in config.seeds:
            stages.console.print(f"[bold]seed {seed}[/bold]") if len(config.seeds) > 1 else None
            context = Context(config, everyday, targets, source, seed, stages, result)
            for name in config.methods:
                result.rows += method_of(name, METHODS)(context)
            result.transcripts += _translations(context)
            write_report(result, Path(config.out))
    return result


def _domains(config: Config) -> list[Domain]:
    """The source domain, and the others."""
    pairs = _pairs(config.data)
    names, source = list(dict.fromkeys(p.domain for p in pairs)), config.data.source
    others = [n for n in names if n != source]
    wanted = others if config.data.target is None else list(config.data.target)
    for key, name, known in (("source", source, names), *(("target", w, others) for w in wanted)):
        if name not in known:
            raise DataError(f"data.{key}: {unknown('domain', name, known)}")
    if not wanted:
        raise DataError(f"there is no target domain beside {source!r}")
    found = []
    for name in (source, *wanted):
        own = [p for p in pairs if p.domain == name]
        sides = ([p for p in own if p.split == split] for split in ("train", "test"))
        found.append(Domain(name, *sides))
    for domain in found[1:]:
        if len(domain.train) < config.labelled:
            raise DataError(
                f"{domain.name} has {len(domain.train)} training pairs, but labelled="
                f"{config.labelled}"
            )
    return found


def _pairs(data: PairSettings) -> list[Pair]:
    if data.pairs is not None:
        return held_out(read_pairs(data.pairs), data.test, data.seed)
    if data.source != SOURCE:
        raise ConfigError(f"data.source must be {SOURCE} without data.pairs, got {data.source!r}")
    number = data.registers
    wanted = DOMAINS if data.target is None else tuple(data.target)
    return registers(number.source_train, number.target_train, data.test, data.seed, wanted)


def _trained(config: Config, everyday: Domain, stages: Stages) -> Translator:
    """A source model, trained on the source domain."""
    seed, m, settings = config.data.seed, config.model, config.train.source
    seed_everything(seed, verbose=False)
    texts = [text for p in everyday.train for text in (p.source, p.target)]
    model = Translator(
        Subwords.learn(texts, m.merges),
        dim=m.dim,
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        ffn_dim=m.ffn_dim,
        dropout=m.dropout,
    )
    size = config.data.batch_size
    data = ParallelData(model.subwords, everyday.train, batch_size=size, seed=seed)
    tick = stages.stage("training the source model", "batches")
    trainer = make_trainer(config, [Ticks(tick)], settings.epochs, gradient_clip_val=1.0)
    trainer.fit(translation(model, settings), datamodule=data)
    return model.eval()


def _translations(context: Context) -> list[Transcript]:
    """The held-out sentences before and after adaptation."""
    known = {method for method, _ in context.written}
    shown = next((m for m in reversed(SHOWN) if m in known), None)
    if shown is None or "source only" not in known:
        return []
    found = []
    for domain in context.targets:
        before, after = (context.written[m, domain.name] for m in ("source only", shown))
        for pair, old, new in zip(domain.test, before, after, strict=True):
            found.append(Transcript(pair.source, domain.name, pair.target, old, new, context.seed))
    return found


def _checked(given: DictConfig) -> Config:
    config: Any = OmegaConf.to_object(given)
    assert isinstance(config, Config)
    check_plan(config.methods, config.seeds, METHODS)
    numbers = {
        "labelled": config.labelled,
        "unlabelled": config.unlabelled,
        "data.test": config.data.test,
        "data.batch_size": config.data.batch_size,
        "data.target_batch_size": config.data.target_batch_size,
        "data.registers.source_train": config.data.registers.source_train,
        "train.source.epochs": config.train.source.epochs,
        "train.lora.epochs": config.train.lora.epochs,
        "train.full.epochs": config.train.full.epochs,
    }
    for key, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{key} must be at least 1, got {number}")
    # All of these check what they are given; better now than after the source model's training.
    tiny = Translator(Subwords.learn(["a"]), dim=2, num_layers=1, num_heads=1, ffn_dim=2)
    for stage in (config.train.source, config.train.lora, config.train.full):
        translation(tiny, stage)
    check_memory(**vars(config.memory))
    own = config.train.label_free
    check_rounds(own.keep, own.dropped)
    if own.steps < len(own.keep):
        raise ConfigError(
            f"train.label_free.steps must be a step for each of the {len(own.keep)} rounds of "
            f"keep, at least; got {own.steps}"
        )
    Translation(tiny, own.learning_rate, own.weight_decay, own.label_smoothing, own.schedule)
    LoRACallback(config.lora)
    make_trainer(config)
    return config


def _empty(config: Config, given: DictConfig, everyday: Domain, targets: list[Domain]) -> Run:
    plain: Any = OmegaConf.to_container(given)
    notes = [
        f"One adapter for each of {len(targets)} target domains, from {config.labelled} labelled "
        f"pairs of it; {len(everyday.test)} held-out pairs of each domain, which no training sees.",
        "Every method starts from the same source model, with the same pairs. In the column of the "
        "source domain is the mean over all adapters: what is lost there was forgotten.",
    ]
    return Run(
        name=config.name,
        title=config.title,
        metric="BLEU",
        rows=[],
        predictions=[],
        classes=[],
        spectra={},
        config=plain,
        data_root=Path(config.data.pairs or config.out),
        versions=versions("torchmetrics"),
        skipped=[],
        notes=notes,
        texts="translations",
    )
