"""What learning a speaker takes, with transcripts or without: settings, outcome, the judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torchmetrics.functional.text import word_error_rate

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.model.adapter_file.save import save_adapter
from lora_lightning.model.switching import disabled
from lora_lightning.speech.data.audio import read_audio
from lora_lightning.speech.data.utterances import AudioBatch, Utterance
from lora_lightning.speech.tasks.ctc import CTCRecognition
from lora_lightning.speech.tasks.lexicon import Lexicon
from lora_lightning.speech.tasks.named_recogniser import NamedRecogniser

FEWEST_TO_SPLIT = 10  # of fewer recordings none is held out: a WER of one or two says nothing
ADAPTED, KEPT, THERE, FAILED = "adapted", "kept source", "already there", "failed"
Tick = Callable[[int, int], None]


@dataclass
class Outcome:
    """What became of a speaker.

    Attributes:
        status: ``"adapted"``, ``"kept source"`` (the adapter did harm on the held-out
            recordings, or the guard accepted no round: no file), ``"already there"`` (an earlier
            run's file) or ``"failed"``.
        learnt: Recordings learnt from.
        held_out: Recordings that decided whether the adapter is kept.
        before: WER of the source on those; None without any.
        after: WER of the adapter on those.
        path: The file.
        reason: Of a failure, or why the source is kept.
    """

    speaker: str
    status: str
    learnt: int = 0
    held_out: int = 0
    before: float | None = None
    after: float | None = None
    path: Path | None = None
    reason: str = ""


@dataclass
class SpeakerSettings:
    """How a speaker is learnt.

    Args:
        lora: The adapter.
        steps: Optimizer steps; None: 150, without transcripts 200.
        batch: Recordings in a batch, at most; None: 4, without transcripts 8.
        learning_rate: Peak learning rate of AdamW; None: 4e-3 (one-cycle), without transcripts
            8e-3 (cosine).
        held_out: Part of the recordings that decides whether the adapter is kept, where there are
            ten or more; 0: none, and the adapter is kept always.
        seed: Of the factors, the order, and which recordings are held out.
        accelerator: cpu, gpu, mps or auto, as Lightning has it.
        untranscribed: Learn from no transcript; those that are there only decide whether the
            adapter is kept. A speaker who has none is learnt so anyway.
        lexicon: Words that may be said, for those; None: any.
    """

    lora: LoRAConfig = field(
        default_factory=lambda: LoRAConfig(rank=2, alpha=4.0, target_modules="all")
    )
    steps: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    held_out: float = 0.2
    seed: int = 0
    accelerator: str = "auto"
    untranscribed: bool = False
    lexicon: Lexicon | None = None


def judged(
    base: NamedRecogniser,
    name: str,
    learnt: Sequence[Utterance],
    test: Sequence[Utterance],
    path: Path,
) -> Outcome:
    """Write the adapter, unless it does harm on the recordings that were held out."""
    base.model.eval()
    found = Outcome(name, ADAPTED, len(learnt), len(test))
    if test:
        found.after = _wer(base, test)
        with disabled(base.model):
            found.before = _wer(base, test)
        if found.after > found.before:
            found.status = KEPT
            return found
    path.parent.mkdir(parents=True, exist_ok=True)
    found.path = save_adapter(base.model, path)
    return found


def split(
    labelled: Sequence[Utterance], settings: SpeakerSettings
) -> tuple[list[Utterance], list[Utterance]]:
    """Recordings to learn from, and those that are held out."""
    order = np.random.default_rng(settings.seed).permutation(len(labelled)).tolist()
    count = round(settings.held_out * len(labelled)) if len(labelled) >= FEWEST_TO_SPLIT else 0
    return [labelled[i] for i in order[count:]], [labelled[i] for i in order[:count]]


def _wer(base: NamedRecogniser, utterances: Sequence[Utterance]) -> float:
    said = [base.labels.normalise(u.text or "") for u in utterances]
    found = [text for _, text in transcribed(base, utterances)]
    return float(word_error_rate(found, said))


@torch.inference_mode()
def transcribed(
    base: NamedRecogniser,
    utterances: Sequence[Utterance],
    beam_size: int | None = None,
    lexicon: Lexicon | None = None,
) -> Iterator[tuple[Utterance, str]]:
    """What the recogniser understands of each recording, one after the other.

    Raises:
        DataError: a file that cannot be read.
    """
    module = CTCRecognition(
        base.model.eval(),
        base.labels,
        decoder="beam" if beam_size else "greedy",
        beam_size=beam_size or (1 if lexicon is None else 16),
        lexicon=lexicon,
    )
    device = next(base.model.parameters()).device
    for utterance in utterances:
        batch = AudioBatch.of([read_audio(utterance.path, base.sample_rate)], [utterance])
        yield utterance, module.transcribe(batch.to(device))[0]
