"""`PseudoTranscriptCallback`: a recogniser learns recordings that nobody wrote down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from lora_lightning.adaptation.guard import Verdict
from lora_lightning.adaptation.rounds import SOURCE_ROUND, Round
from lora_lightning.adaptation.self_training import normalised_distance
from lora_lightning.adaptation.teacher import Snapshot, Teacher
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.model.batch_norm import BatchNormKeeper
from lora_lightning.model.probing import preserved
from lora_lightning.speech.ctc_objectives import dust, non_blank_rate
from lora_lightning.speech.data.speech_data import SpeechData
from lora_lightning.speech.data.utterances import AudioBatch, Utterance
from lora_lightning.speech.tasks.ctc import CTCRecognition
from lora_lightning.speech.tasks.decoding import greedy
from lora_lightning.speech.tasks.lexicon import Lexicon, LexiconSearch
from lora_lightning.speech.transcript_guard import (
    SpeechGuard,
    SpeechLimits,
    Understood,
    agreement,
)

# Recordings with the transcripts of the round, as `PseudoTranscriptCallback` trains on them.


class LabelledSpeech(SpeechData):
    """`SpeechData` of the recordings that have a label now; the others wait.

    Args:
        recordings: All of them.
        **settings: Of `SpeechData`.

    Attributes:
        labels: path → what is learnt for it; replaced in each round.
    """

    def __init__(self, recordings: Sequence[Utterance], **settings: Any):
        super().__init__(train=recordings, **settings)
        self.labels: dict[str, str] = {}

    def train_dataloader(self) -> DataLoader[Any]:
        """Those that the round learns."""
        self.setup()
        every = self.items["train"]
        paths = [(u, str(u.path)) for u in every]
        known = [replace(u, text=self.labels[path]) for u, path in paths if path in self.labels]
        self.items["train"] = known or every
        try:
            return super().train_dataloader()
        finally:
            self.items["train"] = every

    def everything(self) -> DataLoader[Any]:
        """All recordings, in order."""
        self.setup()
        self.items["test"] = self.items["train"]
        return self.test_dataloader()


KEEP = (0.4, 0.5, 0.7, 0.8, 0.9)


class PseudoTranscriptCallback(Callback):
    """Adapt a `CTCRecognition` to recordings without transcripts.

        pseudo = PseudoTranscriptCallback(recordings, Lexicon.read("words.txt"))
        trainer = Trainer(max_steps=125, reload_dataloaders_every_n_epochs=1,
                          callbacks=[LoRACallback(rank=2, target_modules="all"), pseudo])
        trainer.fit(CTCRecognition(model), pseudo.data)

    In each round the recogniser transcribes the recordings; with a lexicon, by the most likely
    sentence of its words. It then learns the part of them whose greedy transcript is nearest to
    that sentence (without a lexicon: changes least under dropout, DUST, Khurana et al. 2021,
    arXiv:2011.13439), and more of them in each round. At the first alarm training stops, and the
    last accepted state comes back.

    Args:
        recordings: The target, such as `load_utterances` gives it; texts are not looked at.
        lexicon: The words that may be said; None: any letters.
        keep: Part of the recordings that each round learns, in turn. As many rounds, of equal
            numbers of the trainer's ``max_steps``.
        teacher_decay: Decay of a moving average of what is trained, which then writes the labels;
            None: the model itself does.
        limits: Of the alarms; None: none.
        beam_size: Prefixes that the search with the lexicon keeps.
        language_weight: Of the words' probabilities in it.
        variants: Decodings under dropout, where there is no lexicon.
        **data: Of `SpeechData`, such as ``sample_rate``, ``max_batch`` and ``transform``.

    Attributes:
        data: What to give to ``Trainer.fit``.
        history_: the rounds, the source first.
        accepted_: the round whose state is kept; 0: the source.
        pseudo_labels_: path → what is learnt for it.
        changed_in_: path → the accepted round in which it got the label it has; 0: the source's.
        transcripts_: path → `Understood` by the accepted state.
        source_: path → `Understood` by the source model.
        termination_condition_: why it ended.

    Raises:
        ConfigError: a value is out of range, or a trainer or module that it cannot work with.
        DataError: there is no recording, or nothing is understood in any.
    """

    def __init__(
        self,
        recordings: Sequence[Utterance],
        lexicon: Lexicon | None = None,
        *,
        keep: Sequence[float] = KEEP,
        teacher_decay: float | None = None,
        limits: SpeechLimits | None = SpeechLimits(),  # noqa: B008 - frozen
        beam_size: int = 16,
        language_weight: float = 1.0,
        variants: int = 3,
        **data: Any,
    ):
        if not recordings:
            raise DataError("the target is empty: there is no recording to adapt to")
        if not keep or not all(0 < k <= 1 for k in keep):
            raise ConfigError(f"keep must hold parts in (0, 1], one for each round; got {keep}")
        if variants < 1:
            raise ConfigError(f"variants must be at least 1, got {variants}")
        # Whatever text they come with must not leak into the training.
        self.recordings = [replace(u, text=None) for u in recordings]
        self.lexicon, self.keep, self.limits = lexicon, list(keep), limits
        self.teacher_decay, self.variants = teacher_decay, variants
        self.beam_size, self.language_weight = beam_size, language_weight
        self.data = LabelledSpeech(self.recordings, **data)
        self.history_: list[Round] = []
        self.accepted_, self.termination_condition_ = 0, ""
        self.changed_in_: dict[str, int] = {}
        self.source_: dict[str, Understood] = {}
        self.transcripts_: dict[str, Understood] = {}
        self._search: LexiconSearch | None = None
        self._guard: SpeechGuard | None = None
        self._teacher: Teacher | None = None
        self._best: Snapshot | None = None
        self._previous: dict[str, Understood] = {}
        self._judged_at = 0

    @property
    def pseudo_labels_(self) -> dict[str, str]:
        """Path → what is learnt for it."""
        return self.data.labels

    # ---- hooks -----------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Transcribe the target by the source model."""
        if not isinstance(pl_module, CTCRecognition):
            raise ConfigError(
                f"PseudoTranscriptCallback adapts a CTCRecognition, not {type(pl_module).__name__}"
            )
        reload: Any = getattr(trainer, "reload_dataloaders_every_n_epochs", 0)
        if reload != 1 or trainer.max_steps < 1:
            raise ConfigError(
                "PseudoTranscriptCallback needs Trainer(reload_dataloaders_every_n_epochs=1, "
                "max_steps=…): each round has recordings of its own, and so many steps"
            )
        if self.lexicon is not None:
            self._search = LexiconSearch(
                self.lexicon, pl_module.labels, self.beam_size, self.language_weight
            )
        self.source_ = self.transcripts_ = self._previous = self._understood(trainer, pl_module)
        self._best = Snapshot(pl_module.model)
        self._guard = SpeechGuard(self.source_, self.limits, self._search is not None)
        self.history_ = [Round(SOURCE_ROUND, self._guard.scores)]
        self._take(self.source_)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Other data than ours would be learnt without any of this."""
        if getattr(trainer, "datamodule", None) is not self.data:
            raise ConfigError("call trainer.fit(module, callback.data): the target is in there")
        if self.teacher_decay is not None:  # now that the factors have started
            self._teacher = Teacher(pl_module.model, self.teacher_decay)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """The teacher follows."""
        if self._teacher is not None:
            self._teacher.update(pl_module.model)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A round ends with the first epoch that has its number of steps."""
        due = trainer.max_steps / len(self.keep)
        if trainer.global_step - self._judged_at >= due and trainer.global_step < trainer.max_steps:
            self._end_round(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The last round, then the best accepted state, before any file is written of it."""
        if trainer.global_step > self._judged_at:
            self._end_round(trainer, pl_module)
        assert self._best is not None
        self._best.restore(pl_module.model)
        self.termination_condition_ = self.termination_condition_ or "all rounds done"

    # ---- what it does ----------------------------------------------------------------------

    def _end_round(self, trainer: Trainer, pl_module: Any) -> None:
        self._judged_at = trainer.global_step
        assert self._guard is not None
        try:
            now = self._understood(trainer, pl_module)
            verdict = self._guard.check(now)
        except ConfigError as error:  # NaN
            now, verdict = self._previous, Verdict({}, [str(error)])
        found = Round(
            len(self.history_),
            verdict.scores,
            verdict.alarms,
            len(self.pseudo_labels_),
            agreement_before=agreement(self._previous, now),
        )
        self.history_.append(found)
        self._previous = now
        found.tell(pl_module, len(self.source_))
        if found.alarms:
            self.termination_condition_ = f"alarm in round {found.index}: {found.alarms[0]}"
            trainer.should_stop = True
            return
        self._note(found.index, now)
        self.accepted_, self.transcripts_ = found.index, now
        self._best = Snapshot(pl_module.model)
        if self._teacher is not None:
            with self._teacher.applied(pl_module.model):
                now = self._understood(trainer, pl_module)
        self._take(now)

    def _note(self, index: int, now: dict[str, Understood]) -> None:
        """In which round each recording got the label that it has."""
        for path, understood in now.items():
            if understood.label == self.source_[path].label:
                self.changed_in_.pop(path, None)
            elif understood.label != self.transcripts_[path].label:
                self.changed_in_[path] = index

    def _take(self, now: dict[str, Understood]) -> None:
        """The labels of the next round: those that are the surest."""
        usable = [path for path, u in now.items() if u.label]
        if not usable:
            raise DataError(
                f"nothing is understood in any of the {len(now)} recordings: the source model does "
                "not fit this speech, and cannot teach itself"
            )
        part = self.keep[min(len(self.history_) - 1, len(self.keep) - 1)]
        count = max(1, math.floor(part * len(now)))
        kept = sorted(usable, key=lambda path: now[path].distance)[:count]
        self.data.labels = {path: now[path].label for path in kept}

    @torch.no_grad()
    def _understood(self, trainer: Trainer, module: Any) -> dict[str, Understood]:
        found: dict[str, Understood] = {}
        with preserved(module.model), trainer.strategy.precision_plugin.forward_context():
            for batch in self.data.everything():
                module.model.eval()
                for path, each in self._of(module, batch.to(module.device)):
                    found[path] = each
        return found

    def _of(self, module: CTCRecognition, batch: AudioBatch) -> list[tuple[str, Understood]]:
        log_probs, frames = module(batch.waveforms, batch.lengths)
        written = greedy(log_probs, frames, module.labels)
        rows = [(log_probs[i : i + 1], frames[i : i + 1]) for i in range(len(batch))]
        rates = [float(non_blank_rate(p, n, module.labels.blank)) for p, n in rows]
        if self._search is not None:
            labels = self._search.decode(log_probs, frames)
            distances = list(map(normalised_distance, written, labels))
        else:
            labels, distances = written, self._doubts(module, batch, written)
        paths = [str(item.path) for item in batch.items]
        return list(zip(paths, map(Understood, written, labels, distances, rates), strict=True))

    def _doubts(self, module: CTCRecognition, batch: AudioBatch, written: list[str]) -> list[float]:
        """How far each transcript changes under dropout (and augmentation, where there is some)."""
        module.model.train()
        BatchNormKeeper("frozen").apply(module.model)
        said = []
        for _ in range(self.variants):
            log_probs, frames = module(batch.waveforms, batch.lengths)
            said.append(greedy(log_probs, frames, module.labels))
        return dust(written, [list(x) for x in zip(*said, strict=True)], keep=1.0).distances
