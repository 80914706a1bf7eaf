"""The methods of a speech run that hear the target's recordings and read no transcript."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from lora_lightning import merge
from lora_lightning.callback import LoRACallback
from lora_lightning.data.utterances import Utterance
from lora_lightning.errors import ConfigError
from lora_lightning.results import Row, Transcript
from lora_lightning.runs.common import make_trainer
from lora_lightning.runs.label_free import without_head
from lora_lightning.runs.speech_context import Context
from lora_lightning.runs.speech_domains import Domain
from lora_lightning.runs.speech_settings import Config
from lora_lightning.tasks.ctc import CTCRecognition, spec_augment
from lora_lightning.tasks.lexicon import Lexicon
from lora_lightning.transduction.transcripts import PseudoTranscriptCallback

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
