"""Adapting to one speaker, with or without transcripts: settings and acceptance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torchmetrics.functional.text import word_error_rate

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.model.adapter_file.save import save_adapter
from lora_lightning.model.switching import disabled
from lora_lightning.runner.each_target import ADAPTED, KEPT, Outcome
from lora_lightning.speech.data.audio import read_audio
from lora_lightning.speech.data.utterances import AudioBatch, Utterance
from lora_lightning.speech.tasks.ctc import CTCRecognition
from lora_lightning.speech.tasks.lexicon import Lexicon
from lora_lightning.speech.tasks.named_recogniser import NamedRecogniser

FEWEST_TO_SPLIT = 10  # of fewer recordings none is held out: a WER of one or two is too noisy


@dataclass
class SpeakerSettings:
    """Settings of the adaptation to a speaker.

    Args:
        lora: The adapter.
        steps: Optimizer steps; None: 150, without transcripts 200.
        batch: Recordings in a batch, at most; None: 4, without transcripts 8.
        learning_rate: Peak learning rate of AdamW; None: 4e-3 (one-cycle), without transcripts
            8e-3 (cosine).
        held_out: Part of the recordings that decides whether the adapter is kept, where there are
            ten or more; fewer are cross-validated in three parts. 0: none, and the adapter is
            always kept.
        seed: Of the factors, the order, and which recordings are held out.
        accelerator: cpu, gpu, mps or auto, as Lightning has it.
        untranscribed: Train without transcripts; existing ones only decide whether the adapter is
            kept. A speaker without transcripts is always adapted so.
        lexicon: Words that may occur, for training without transcripts, and for decoding what
            decides; None: any.
        guard: Without transcripts, keep the source where the guard says that adapting does harm.
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
    guard: bool = True


def few(count: int) -> str:
    """A warning where so few recordings are given; "" for enough."""
    if count >= FEWEST_TO_SPLIT:
        return ""
    return (
        f"only {count} recordings: with 5, transcribed, the adapter was worse than the source for "
        f"10 of 24 speakers, with 20 for none; give {FEWEST_TO_SPLIT} or more"
    )


def judged(
    base: NamedRecogniser,
    name: str,
    learnt: Sequence[Utterance],
    test: Sequence[Utterance],
    path: Path,
    lexicon: Lexicon | None = None,
) -> Outcome:
    """Write the adapter, unless its WER on the held-out recordings is higher."""
    base.model.eval()
    found = Outcome(name, ADAPTED, len(learnt), len(test), reason=few(len(learnt)))
    if test:
        found.before, found.after = compared(base, test, lexicon)
        if found.after > found.before:
            return refused(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    found.path = save_adapter(base.model, path)
    return found


def refused(found: Outcome) -> Outcome:
    """The source is kept: the adapter has more errors on held-out recordings."""
    found.status, found.reason = KEPT, "more errors with it (--held-out 0 keeps it all the same)"
    return found


def compared(
    base: NamedRecogniser, test: Sequence[Utterance], lexicon: Lexicon | None = None
) -> tuple[float, float]:
    """WER on these recordings by the source and by the adapter, decoded as asked for."""
    base.model.eval()
    after = _wer(base, test, lexicon)
    with disabled(base.model):
        return _wer(base, test, lexicon), after


def split(
    labelled: Sequence[Utterance], settings: SpeakerSettings
) -> tuple[list[Utterance], list[Utterance]]:
    """Training recordings, and held-out ones."""
    order = np.random.default_rng(settings.seed).permutation(len(labelled)).tolist()
    count = round(settings.held_out * len(labelled)) if len(labelled) >= FEWEST_TO_SPLIT else 0
    return [labelled[i] for i in order[count:]], [labelled[i] for i in order[:count]]


def _wer(base: NamedRecogniser, utterances: Sequence[Utterance], lexicon: Lexicon | None) -> float:
    said = [base.labels.normalise(u.text or "") for u in utterances]
    found = [text for _, text in transcribed(base, utterances, lexicon=lexicon)]
    return float(word_error_rate(found, said))


@torch.inference_mode()
def transcribed(
    base: NamedRecogniser,
    utterances: Sequence[Utterance],
    beam_size: int | None = None,
    lexicon: Lexicon | None = None,
) -> Iterator[tuple[Utterance, str]]:
    """The recogniser's transcript of each recording, one after the other.

    Raises:
        DataError: a file cannot be read.
    """
    module = CTCRecognition(
        base.model.eval(),
        base.labels,
        decoder="greedy" if beam_size is None else "beam",
        beam_size=(1 if lexicon is None else 16) if beam_size is None else beam_size,
        lexicon=lexicon,
    )
    device = next(base.model.parameters()).device
    for utterance in utterances:
        batch = AudioBatch.of([read_audio(utterance.path, base.sample_rate)], [utterance])
        yield utterance, module.transcribe(batch.to(device))[0]
