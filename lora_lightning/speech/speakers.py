"""One adapter for each speaker of a manifest, the base loaded once.

What ``lora-lightning adapt-speaker`` does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning.pytorch import seed_everything

from lora_lightning.callback import LoRACallback
from lora_lightning.data.speech import SpeechData
from lora_lightning.data.utterances import Utterance
from lora_lightning.errors import AdapterFileError, DataError
from lora_lightning.files import read_header
from lora_lightning.loading import check_base
from lora_lightning.runs.common import make_trainer
from lora_lightning.runs.enrolment import (
    FAILED,
    THERE,
    Outcome,
    Place,
    SpeakerSettings,
    Tick,
    judged,
    split,
)
from lora_lightning.runs.progress import Ticks, quiet_lightning
from lora_lightning.runs.untranscribed import learn_untranscribed
from lora_lightning.switching import adapters, remove
from lora_lightning.tasks.ctc import CTCRecognition
from lora_lightning.tasks.named import NamedRecogniser


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
        speakers: Name → recordings, looked at before (`checked`).
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
    adapter, model = re.sub(r"\W", "_", name), base.model.train()
    try:
        with TemporaryDirectory() as folder, quiet_lightning():
            if settings.untranscribed or not labelled:
                place = Place(settings.accelerator, folder)
                tick = stage(name)
                return learn_untranscribed(
                    base, name, adapter, utterances, labelled, path, settings, place, tick
                )
            learn, test = split(labelled, settings)
            _learn(base, adapter, learn, settings, folder, stage(name))
        return judged(base, name, learn, test, path)
    finally:
        if adapter in adapters(model):
            remove(model)
        model.eval()


def _learn(
    base: NamedRecogniser,
    adapter: str,
    learn: Sequence[Utterance],
    settings: SpeakerSettings,
    folder: str,
    tick: Tick,
) -> None:
    """Train an adapter on recordings with transcripts."""
    rate = settings.learning_rate or 4e-3
    module = CTCRecognition(base.model, base.labels, learning_rate=rate, weight_decay=0.0)
    data = SpeechData(
        train=learn,
        sample_rate=base.sample_rate,
        max_batch=settings.batch or 4,
        seed=settings.seed,
    )
    # The callback's own file is not the one to keep: it is not judged yet.
    callback = LoRACallback(settings.lora, name=adapter, output_dir=folder)
    trainer = make_trainer(
        Place(settings.accelerator, folder),
        [callback, Ticks(tick)],
        max_epochs=-1,
        max_steps=settings.steps or 150,
        gradient_clip_val=5.0,
    )
    trainer.fit(module, datamodule=data)
