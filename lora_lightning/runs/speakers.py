"""One adapter for each speaker of a manifest, the base loaded once; and transcription.

What ``lora-lightning adapt-speaker`` and ``lora-lightning transcribe`` do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from lightning.pytorch import seed_everything
from torchmetrics.functional.text import word_error_rate

from lora_lightning.callback import LoRACallback
from lora_lightning.config import LoRAConfig
from lora_lightning.data.audio import read_audio
from lora_lightning.data.speech import SpeechData
from lora_lightning.data.utterances import AudioBatch, Utterance
from lora_lightning.errors import AdapterFileError, DataError
from lora_lightning.files import read_header, save_adapter
from lora_lightning.loading import check_base
from lora_lightning.runs.common import make_trainer
from lora_lightning.runs.progress import Ticks, quiet_lightning
from lora_lightning.switching import adapters, disabled, remove
from lora_lightning.tasks.ctc import CTCRecognition
from lora_lightning.tasks.named import NamedRecogniser

FEWEST_TO_SPLIT = 10  # of fewer recordings none is held out: a WER of one or two says nothing
ADAPTED, KEPT, THERE, FAILED = "adapted", "kept source", "already there", "failed"
Tick = Callable[[int, int], None]


@dataclass
class Outcome:
    """What became of a speaker.

    Attributes:
        status: ``"adapted"``, ``"kept source"`` (the adapter did harm on the held-out
            recordings: no file), ``"already there"`` (an earlier run's file) or ``"failed"``.
        learnt: Recordings learnt from.
        held_out: Recordings that decided whether the adapter is kept.
        before: WER of the source on those; None without any.
        after: WER of the adapter on those.
        path: The file.
        reason: Of a failure.
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
        steps: Optimizer steps.
        batch: Recordings in a batch, at most.
        learning_rate: Peak learning rate of AdamW, one-cycle.
        held_out: Part of the recordings that decides whether the adapter is kept, where there are
            ten or more; 0: none, and the adapter is kept always.
        seed: Of the factors, the order, and which recordings are held out.
        accelerator: cpu, gpu, mps or auto, as Lightning has it.
    """

    lora: LoRAConfig = field(
        default_factory=lambda: LoRAConfig(rank=2, alpha=4.0, target_modules="all")
    )
    steps: int = 150
    batch: int = 4
    learning_rate: float = 4e-3
    held_out: float = 0.2
    seed: int = 0
    accelerator: str = "auto"


@dataclass
class Place:
    """Where a trainer runs and may write."""

    accelerator: str
    out: str


def adapt_speakers(
    base: NamedRecogniser,
    speakers: Mapping[str, Sequence[Utterance]],
    files: Mapping[str, Path],
    settings: SpeakerSettings,
    stage: Callable[[str], Tick],
    overwrite: bool = False,
) -> Iterator[Outcome]:
    """Learn each speaker in turn; a file is written when its speaker is done.

    Args:
        base: The recogniser; as it was, when the iterator ends.
        speakers: Name → recordings with transcripts, looked at before (`checked`).
        files: Name → adapter file to write.
        settings: How.
        stage: Begins a progress bar; returns what to call with (done, total).
        overwrite: Learn those again whose file is there. Without, a file of the same base is
            left as it is, so that a run that was interrupted goes on where it was.

    Yields:
        What became of each; one that fails does not stop the others.
    """
    for name, utterances in speakers.items():
        if not overwrite and files[name].exists():
            yield _there(base, name, files[name])
            continue
        try:
            yield _one(base, name, utterances, files[name], settings, stage)
        except DataError as error:
            yield Outcome(name, FAILED, reason=str(error))


def _there(base: NamedRecogniser, name: str, path: Path) -> Outcome:
    """The file of an earlier run, if it is one."""
    try:
        check_base(base.model, read_header(path), "weights", path)
    except AdapterFileError as error:
        raise AdapterFileError(
            f"{error}. The file was there before: give another --out, or --overwrite"
        ) from error
    return Outcome(name, THERE, path=path)


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
    if not labelled:
        raise DataError(
            f"none of the {len(utterances)} recordings of {name} has a transcript; adapting "
            "without transcripts is not there yet"
        )
    learn, test = _split(labelled, settings)
    model = base.model.train()
    module = CTCRecognition(
        model, base.labels, learning_rate=settings.learning_rate, weight_decay=0.0
    )
    data = SpeechData(
        train=learn, sample_rate=base.sample_rate, max_batch=settings.batch, seed=settings.seed
    )
    adapter = re.sub(r"\W", "_", name)
    try:
        with TemporaryDirectory() as folder, quiet_lightning():
            # The callback's own file is not the one to keep: it is not judged yet.
            callback = LoRACallback(settings.lora, name=adapter, output_dir=folder)
            trainer = make_trainer(
                Place(settings.accelerator, folder),
                [callback, Ticks(stage(name))],
                max_epochs=-1,
                max_steps=settings.steps,
                gradient_clip_val=5.0,
            )
            trainer.fit(module, datamodule=data)
        return _judged(base, name, learn, test, path)
    finally:
        if adapter in adapters(model):
            remove(model)
        model.eval()


def _judged(
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


def _split(
    labelled: Sequence[Utterance], settings: SpeakerSettings
) -> tuple[list[Utterance], list[Utterance]]:
    order = np.random.default_rng(settings.seed).permutation(len(labelled)).tolist()
    count = round(settings.held_out * len(labelled)) if len(labelled) >= FEWEST_TO_SPLIT else 0
    return [labelled[i] for i in order[count:]], [labelled[i] for i in order[:count]]


def _wer(base: NamedRecogniser, utterances: Sequence[Utterance]) -> float:
    said = [base.labels.normalise(u.text or "") for u in utterances]
    found = [text for _, text in transcribed(base, utterances)]
    return float(word_error_rate(found, said))


@torch.inference_mode()
def transcribed(
    base: NamedRecogniser, utterances: Sequence[Utterance], beam_size: int | None = None
) -> Iterator[tuple[Utterance, str]]:
    """What the recogniser understands of each recording, one after the other.

    Raises:
        DataError: a file that cannot be read.
    """
    module = CTCRecognition(
        base.model.eval(),
        base.labels,
        decoder="beam" if beam_size else "greedy",
        beam_size=beam_size or 1,
    )
    device = next(base.model.parameters()).device
    for utterance in utterances:
        batch = AudioBatch.of([read_audio(utterance.path, base.sample_rate)], [utterance])
        yield utterance, module.transcribe(batch.to(device))[0]
