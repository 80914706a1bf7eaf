"""The methods that a speech run compares, each a function from `Context` to rows.

A method with labels is run once for each target and each size of the enrolment. A further
method is one more function and one more entry in `METHODS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch import nn

from lora_lightning.errors import ConfigError
from lora_lightning.linalg.decompose import spectrum
from lora_lightning.model.state import named_factors
from lora_lightning.model.switching import merge
from lora_lightning.model.targets import without_head
from lora_lightning.report.results import Row, Transcript
from lora_lightning.runner.sweep import Rank, at_rank
from lora_lightning.runner.trainer import make_trainer
from lora_lightning.speech.data.utterances import Utterance
from lora_lightning.speech.domains import Domain
from lora_lightning.speech.experiment import Context
from lora_lightning.speech.self_training import PseudoTranscriptCallback
from lora_lightning.speech.settings import Config
from lora_lightning.speech.tasks.ctc import CTCRecognition, spec_augment
from lora_lightning.speech.tasks.lexicon import Lexicon
from lora_lightning.training.lora_callback import LoRACallback

# The methods of a speech run that hear the target's recordings and read no transcript.


NAME = "LoRA, no labels"


def lexicon_only(context: Context) -> list[Row]:
    """The source model as it is, that may write the lexicon's words only."""
    lexicon = context.lexicon()
    if lexicon is None:
        context.run.notes.append("There is no lexicon (data.lexicon): no row with one.")
        return []
    tick = context.stages.stage("lexicon only", "targets")
    rows, model, domains = [], context.fresh(), context.recordings.domains
    for done, domain in enumerate(domains, 1):
        start = time.perf_counter()
        found = context.understood(model, domain, lexicon)
        rows += context.score("lexicon only", found, domain, time.perf_counter() - start)
        tick(done, len(domains))
    return rows


def label_free(context: Context) -> list[Row]:
    """Low-rank factors, trained on transcripts that the recogniser writes itself."""
    lexicon, rows = context.lexicon(), []
    domains = context.recordings.domains
    for seconds in context.config.unlabelled:
        tick = context.stages.stage(f"{NAME}, {seconds} s", "targets")
        for done, domain in enumerate(domains, 1):
            rows += _adapted(context, domain, seconds, lexicon)
            tick(done, len(domains))
    return rows


def _adapted(context: Context, domain: Domain, seconds: int, lexicon: Lexicon | None) -> list[Row]:
    config, model = context.config, context.fresh()
    settings = config.train.label_free
    recordings = domain.unlabelled(seconds, context.seed)
    pseudo = PseudoTranscriptCallback(
        recordings,
        lexicon,
        keep=settings.keep,
        teacher_decay=settings.teacher_decay,
        sample_rate=model.sample_rate,
        max_batch=settings.batch,
        transform=domain.transform,
        seed=context.seed,
    )
    lora = LoRACallback(
        without_head(config.lora, model),
        name=context.named(domain, f"{seconds}s-no-labels"),
        batch_norm=settings.batch_norm,
        output_dir=Path(config.out, "adapters"),
    )
    model.augment = spec_augment() if settings.spec_augment else None
    module = CTCRecognition(
        model.train(),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        schedule=settings.schedule,
    )
    trainer = make_trainer(
        config,
        [lora, pseudo],
        max_epochs=-1,
        max_steps=settings.steps,
        gradient_clip_val=5.0,
        reload_dataloaders_every_n_epochs=1,
    )
    start = time.perf_counter()
    trainer.fit(module, datamodule=pseudo.data)
    passed = time.perf_counter() - start
    assert lora.report_ is not None
    assert lora.adapter_path_ is not None
    if seconds == max(config.unlabelled):
        context.run.transcripts += _own(context, domain, recordings, pseudo)
    merge(model)
    costs = passed, lora.report_.trainable_parameters, lora.adapter_path_.stat().st_size
    rows = context.measure(f"{NAME}, {seconds} s", model, domain, *costs)
    if lexicon is not None:
        name = f"{NAME}, {seconds} s, lexicon"
        rows += context.measure(name, model, domain, *costs, lexicon=lexicon)
    return rows


def _own(
    context: Context,
    domain: Domain,
    recordings: Sequence[Utterance],
    pseudo: PseudoTranscriptCallback,
) -> list[Transcript]:
    """What the recordings that were learnt from were taken for, before and after."""
    found = []
    for item in recordings:
        before, after = (x.get(str(item.path)) for x in (pseudo.source_, pseudo.transcripts_))
        if before is None or after is None:
            continue
        found.append(
            Transcript(
                item=item.path.name,
                domain=domain.name,
                reference=context.source.labels.normalise(item.text or ""),
                source=before.label,
                adapted=after.label,
                seed=context.seed,
                split="target",
                confidence=round(1 - after.distance, 4),
                round=pseudo.changed_in_.get(str(item.path), 0),
            )
        )
    return found


def check(config: Config) -> None:
    """Raise ConfigError for a value that cannot be."""
    settings = config.train.label_free
    if settings.steps < len(settings.keep):
        raise ConfigError(
            f"train.label_free.steps must be a step for each of the {len(settings.keep)} rounds of "
            f"keep, at least; got {settings.steps}"
        )
    if not config.unlabelled or min(config.unlabelled) <= 0:
        raise ConfigError(f"unlabelled must hold numbers of seconds above 0: {config.unlabelled}")
    # The callback checks what it is given; better now than after the source model's training.
    PseudoTranscriptCallback([Utterance(Path("none"))], keep=settings.keep)
    if settings.teacher_decay is not None and not 0 <= settings.teacher_decay < 1:
        raise ConfigError(f"train.label_free.teacher_decay: {settings.teacher_decay} not in [0, 1)")
    LoRACallback(config.lora, batch_norm=settings.batch_norm)
    if config.data.lexicon is not None:
        Lexicon.read(config.data.lexicon)


def source_only(context: Context) -> list[Row]:
    """The source model as it is."""
    tick = context.stages.stage("source only", "targets")
    rows, model = [], context.fresh()
    domains = context.recordings.domains
    for done, domain in enumerate(domains, 1):
        rows += context.measure("source only", model, domain, seconds=0.0)
        tick(done, len(domains))
    return rows


def lora(context: Context, rank: Rank | None = None) -> list[Row]:
    """Low-rank factors, trained with the enrolment's transcripts; at another rank if given."""
    name = "LoRA" if rank is None else f"LoRA, rank {rank}"
    return _each(context, name, partial(_lora, rank=rank))


def full(context: Context) -> list[Row]:
    """Every weight, trained with the enrolment's transcripts: the upper reference."""
    return _each(context, "full", _full)


_Method = Callable[[Context, str, Domain, int], list[Row]]


def _each(context: Context, name: str, method: _Method) -> list[Row]:
    rows: list[Row] = []
    domains = context.recordings.domains
    for size in context.config.enrolment:
        title = f"{name}, {size} target labels"
        tick = context.stages.stage(title, "targets")
        for done, domain in enumerate(domains, 1):
            rows += method(context, title, domain, size)
            tick(done, len(domains))
    return rows


def _lora(context: Context, title: str, domain: Domain, size: int, rank: Rank | None) -> list[Row]:
    model = context.fresh()
    callback = LoRACallback(
        at_rank(context.config.lora, rank),
        name=context.named(domain, str(size) if rank is None else f"{size}-rank-{rank}"),
        batch_norm=context.config.batch_norm,
        output_dir=Path(context.config.out, "adapters"),
    )
    seconds = context.fit(model, context.config.train.lora, domain, size, [callback])
    assert callback.report_ is not None
    assert callback.adapter_path_ is not None
    if context.first and size == context.config.headline and not context.run.spectra:
        for path, factors in named_factors(model, callback.name).items():
            values = spectrum(*factors.low_rank(), factors.spec.scaling)
            context.run.spectra[path] = values.tolist()
    size_of_file = callback.adapter_path_.stat().st_size
    parameters = callback.report_.trainable_parameters
    # Measured as it would be used: merged, at the speed of the source model.
    merge(model)
    return context.measure(title, model, domain, seconds, parameters, size_of_file, size)


def _full(context: Context, title: str, domain: Domain, size: int) -> list[Row]:
    model = context.fresh()
    freeze = FrozenBatchNorm() if context.config.batch_norm == "frozen" else None
    callbacks = [freeze] if freeze else []
    seconds = context.fit(model, context.config.train.full, domain, size, callbacks)
    parameters = sum(p.numel() for p in model.parameters())
    file_bytes = sum(t.nbytes for t in model.state_dict().values())
    return context.measure(title, model, domain, seconds, parameters, file_bytes, size)


class FrozenBatchNorm(Callback):
    """Keeps BatchNorm in eval mode, as `LoRACallback` does with ``batch_norm="frozen"``."""

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
        """A Trainer puts everything in train mode."""
        for module in pl_module.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


# In the order of the table.
METHODS: dict[str, Callable[..., list[Row]]] = {
    "source_only": source_only,
    "lexicon": lexicon_only,
    "label_free": label_free,
    "lora": lora,
    "full": full,
}
