"""One adapter for each speaker of a manifest, the base loaded once.

The implementation of ``lora-lightning adapt-speaker``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import seed_everything
from torch import nn

from lora_lightning.model.switching import adapters, remove
from lora_lightning.model.targets import without_head
from lora_lightning.runner.each_target import (
    ADAPTED,
    KEPT,
    Outcome,
    Tick,
    attempted,
    each_target,
)
from lora_lightning.runner.file_names import adapter_name
from lora_lightning.runner.progress import Stages, Ticks, quiet_lightning
from lora_lightning.runner.settings import RunConfig
from lora_lightning.runner.trainer import in_rounds, make_trainer
from lora_lightning.speech.data.speech_data import SpeechData
from lora_lightning.speech.data.utterances import Utterance
from lora_lightning.speech.enrolment import SpeakerSettings, compared, few, judged, refused, split
from lora_lightning.speech.self_training import PseudoTranscriptCallback
from lora_lightning.speech.tasks.ctc import CTCRecognition, spec_augment
from lora_lightning.speech.tasks.named_recogniser import NamedRecogniser
from lora_lightning.speech.tasks.recognisers import ConformerCTC
from lora_lightning.speech.transcript_guard import SpeechLimits
from lora_lightning.training.lora_callback import LoRACallback


@dataclass(frozen=True)
class _Training:
    """Defaults of a speaker's training, with or without transcripts."""

    steps: int
    batch: int
    learning_rate: float
    schedule: str
    batch_norm: str


FOLDS = 3  # of recordings that are too few to hold some out
_TRANSCRIBED = _Training(150, 4, 4e-3, "one-cycle", "frozen")
_UNTRANSCRIBED = _Training(200, 8, 8e-3, "cosine", "adapt")


def adapt_speakers(
    base: NamedRecogniser,
    speakers: Mapping[str, Sequence[Utterance]],
    files: Mapping[str, Path],
    settings: SpeakerSettings,
    stage: Callable[[str], Tick],
    overwrite: bool = False,
) -> Iterator[Outcome]:
    """Adapt to each speaker in turn; each adapter file is written when its speaker is done."""

    def one(name: str) -> Outcome:
        return _one(base, name, speakers[name], files[name], settings, stage)

    return each_target(base.model, {name: files[name] for name in speakers}, one, overwrite)


def job(common: tuple[NamedRecogniser, SpeakerSettings], item: Any) -> Outcome:
    """A speaker of `each_apart`: the recogniser and settings; name, recordings and file."""
    (base, settings), (name, said, path) = common, item
    with Stages() as stages:

        def one(name: str) -> Outcome:
            return _one(base, name, said, path, settings, lambda name: stages.stage(name, "steps"))

        return attempted(name, one)


def _one(
    base: NamedRecogniser,
    name: str,
    utterances: Sequence[Utterance],
    path: Path,
    settings: SpeakerSettings,
    stage: Callable[[str], Tick],
) -> Outcome:
    seed_everything(settings.seed, verbose=False)
    labelled = [u for u in utterances if u.text and base.labels.encode(u.text)]
    try:
        if settings.untranscribed or not labelled:
            return _untranscribed(base, name, utterances, labelled, path, settings, stage(name))
        return _transcribed(base, name, labelled, path, settings, stage)
    finally:
        _remove(base, name)


def _remove(base: NamedRecogniser, name: str) -> None:
    if adapter_name(name) in adapters(base.model):
        remove(base.model)
    base.model.eval()


def _untranscribed(
    base: NamedRecogniser,
    name: str,
    utterances: Sequence[Utterance],
    labelled: Sequence[Utterance],
    path: Path,
    settings: SpeakerSettings,
    tick: Tick,
) -> Outcome:
    """Learn without transcripts; existing ones decide: with a higher WER it is not kept."""
    pseudo = PseudoTranscriptCallback(
        utterances,
        settings.lexicon,
        sample_rate=base.sample_rate,
        max_batch=settings.batch or _UNTRANSCRIBED.batch,
        seed=settings.seed,
        limits=SpeechLimits() if settings.guard else None,
    )
    pseudo.setting = "--no-guard"
    _learn(base, adapter_name(name), utterances, settings, tick, pseudo)
    if not pseudo.accepted_:
        reason = pseudo.termination_condition_
        return Outcome(name, KEPT, len(utterances), len(labelled), reason=reason)
    return judged(base, name, utterances, labelled, path, settings.lexicon)


def _transcribed(
    base: NamedRecogniser,
    name: str,
    labelled: Sequence[Utterance],
    path: Path,
    settings: SpeakerSettings,
    stage: Callable[[str], Tick],
) -> Outcome:
    """Learn with transcripts; held-out ones decide, of few recordings each in its turn."""
    learn, test = split(labelled, settings)
    folds = min(FOLDS, len(labelled)) if settings.held_out and not test else 0
    found = Outcome(name, ADAPTED, len(learn), reason=few(len(labelled)))
    if folds > 1:
        found = _cross_validated(base, found, labelled, folds, settings, stage)
        if found.after > found.before:  # type: ignore[operator]
            return refused(found)
    _learn(base, adapter_name(name), learn, settings, stage(name))
    done = judged(base, name, learn, test, path, settings.lexicon)
    if test:
        return done
    return replace(found, path=done.path)


def _cross_validated(
    base: NamedRecogniser,
    found: Outcome,
    labelled: Sequence[Utterance],
    folds: int,
    settings: SpeakerSettings,
    stage: Callable[[str], Tick],
) -> Outcome:
    """The WER of recordings, each by an adapter that did not learn it, and by the source."""
    errors, words = [0.0, 0.0], 0
    for fold in range(folds):
        test = list(labelled[fold::folds])
        others = [u for i, u in enumerate(labelled) if i % folds != fold]
        try:
            tick = stage(f"{found.name}, check {fold + 1} of {folds}")
            _learn(base, adapter_name(found.name), others, settings, tick)
            rates = compared(base, test, settings.lexicon)
        finally:
            _remove(base, found.name)
        spoken = sum(len(base.labels.normalise(u.text or "").split()) for u in test)
        errors, words = [e + r * spoken for e, r in zip(errors, rates, strict=True)], words + spoken
    before, after = (e / words for e in errors)
    return replace(found, held_out=len(labelled), before=before, after=after)


def _learn(
    base: NamedRecogniser,
    adapter: str,
    learn: Sequence[Utterance],
    settings: SpeakerSettings,
    tick: Tick,
    pseudo: PseudoTranscriptCallback | None = None,
) -> None:
    """Train an adapter on recordings with transcripts, or on those that `pseudo` writes."""
    how, lora = _TRANSCRIBED, settings.lora
    steps: dict[str, int] = {"max_epochs": -1, "max_steps": settings.steps or how.steps}
    if pseudo is not None:
        how, lora = _UNTRANSCRIBED, without_head(settings.lora, base.model)
        steps = in_rounds(settings.steps or how.steps)
    module = CTCRecognition(
        base.model,
        base.labels,
        learning_rate=settings.learning_rate or how.learning_rate,
        weight_decay=0.0,
        schedule=how.schedule,
    )
    data: SpeechData = (
        pseudo.data
        if pseudo is not None
        else SpeechData(
            train=learn,
            sample_rate=base.sample_rate,
            max_batch=settings.batch or how.batch,
            seed=settings.seed,
        )
    )
    with TemporaryDirectory() as folder, quiet_lightning():
        # The callback's own file is not kept: its adapter is not accepted yet.
        callback = LoRACallback(lora, name=adapter, output_dir=folder, batch_norm=how.batch_norm)
        trainer = make_trainer(
            RunConfig(accelerator=settings.accelerator, out=folder),
            [callback, *([] if pseudo is None else [pseudo]), Ticks(tick)],
            gradient_clip_val=5.0,
            **steps,
        )
        base.model.train()
        with nullcontext() if pseudo is None else _masked(base.model):
            trainer.fit(module, datamodule=data)


@contextmanager
def _masked(model: nn.Module) -> Iterator[None]:
    """Within the block our own recogniser trains with SpecAugment; torchaudio's have none."""
    if not isinstance(model, ConformerCTC):
        yield
        return
    before, model.augment = model.augment, spec_augment()
    try:
        yield
    finally:
        model.augment = before
