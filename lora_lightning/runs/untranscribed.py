"""Learn a speaker from recordings that nobody wrote down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from lora_lightning.callback import LoRACallback
from lora_lightning.config import LoRAConfig
from lora_lightning.data.utterances import Utterance
from lora_lightning.runs.common import make_trainer
from lora_lightning.runs.enrolment import KEPT, Outcome, Place, SpeakerSettings, Tick, judged
from lora_lightning.runs.label_free import without_head
from lora_lightning.runs.progress import Ticks
from lora_lightning.tasks.ctc import CTCRecognition, spec_augment
from lora_lightning.tasks.named import NamedRecogniser
from lora_lightning.tasks.recognisers import ConformerCTC
from lora_lightning.transduction.transcripts import PseudoTranscriptCallback


@contextmanager
def _masked(model: nn.Module) -> Iterator[None]:
    """Within the block our own recogniser trains with SpecAugment; torchaudio's have no place."""
    if not isinstance(model, ConformerCTC):
        yield
        return
    before, model.augment = model.augment, spec_augment()
    try:
        yield
    finally:
        model.augment = before


def learn_untranscribed(
    base: NamedRecogniser,
    name: str,
    adapter: str,
    recordings: Sequence[Utterance],
    canary: Sequence[Utterance],
    path: Path,
    settings: SpeakerSettings,
    place: Place,
    tick: Tick,
) -> Outcome:
    """Train an adapter on the recogniser's own transcripts, and keep it if the guard accepts it.

    Args:
        base: The recogniser, in training mode.
        name: Of the speaker.
        adapter: Of the adapter.
        recordings: All of the speaker's; their texts are not looked at.
        canary: Those with a transcript: an adapter that makes more errors on them is not kept.
        path: The file to write.
        settings: How.
        place: Where a trainer runs and may write.
        tick: Told the steps that are done.
    """
    pseudo = PseudoTranscriptCallback(
        recordings,
        settings.lexicon,
        sample_rate=base.sample_rate,
        max_batch=settings.batch or 8,
        seed=settings.seed,
    )
    module = CTCRecognition(
        base.model,
        base.labels,
        learning_rate=settings.learning_rate or 8e-3,
        weight_decay=0.0,
        schedule="cosine",
    )
    lora: LoRAConfig = without_head(settings.lora, base.model)
    callback = LoRACallback(lora, name=adapter, output_dir=place.out, batch_norm="adapt")
    trainer = make_trainer(
        place,
        [callback, pseudo, Ticks(tick)],
        max_epochs=-1,
        max_steps=settings.steps or 200,
        gradient_clip_val=5.0,
        reload_dataloaders_every_n_epochs=1,
    )
    with _masked(base.model):
        trainer.fit(module, datamodule=pseudo.data)
    if not pseudo.accepted_:
        reason = pseudo.termination_condition_
        return Outcome(name, KEPT, len(recordings), len(canary), reason=reason)
    return judged(base, name, recordings, canary, path)
