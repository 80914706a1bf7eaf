"""`PseudoTranscriptCallback`: self-training of a recogniser on pseudo-transcripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lora_lightning.adaptation.guard import Verdict
from lora_lightning.adaptation.resumable_loader import Position
from lora_lightning.adaptation.rounds import Check, Round
from lora_lightning.adaptation.text_self_training import TextRounds, TextSelfTraining, check_keep
from lora_lightning.errors import DataError
from lora_lightning.lora.values import check_count
from lora_lightning.model.batch_norm import BatchNormKeeper
from lora_lightning.model.probing import preserved
from lora_lightning.speech.ctc_objectives import dust_distances, non_blank_rate
from lora_lightning.speech.data.speech_data import SpeechData
from lora_lightning.speech.data.utterances import AudioBatch, Utterance
from lora_lightning.speech.tasks.ctc import CTCRecognition
from lora_lightning.speech.tasks.decoding import greedy
from lora_lightning.speech.tasks.lexicon import Lexicon, LexiconSearch
from lora_lightning.speech.transcript_guard import SpeechGuard, SpeechLimits, Understood

# Recordings with the round's pseudo-transcripts, for `PseudoTranscriptCallback`.


class LabelledSpeech(SpeechData):
    """`SpeechData` of the recordings that have a pseudo-transcript in this round.

    Attributes:
        labels: path → pseudo-transcript; replaced in each round.
    """

    def __init__(self, recordings: Sequence[Utterance], **settings: Any):
        super().__init__(train=recordings, **settings)
        self.labels: dict[str, str] = {}
        self.position = Position()

    def train_dataloader(self) -> DataLoader[Any]:
        """The recordings of the round."""
        self.setup()
        every = self.items["train"]
        paths = [(u, str(u.path)) for u in every]
        known = [replace(u, text=self.labels[path]) for u, path in paths if path in self.labels]
        self.items["train"] = known or every
        try:
            loader: Any = super().train_dataloader()
        finally:
            self.items["train"] = every
        loader.position = self.position  # this one replaces the previous epoch's
        return loader  # type: ignore[no-any-return]

    def everything(self) -> DataLoader[Any]:
        """All recordings, in order."""
        self.setup()
        self.items["test"] = self.items["train"]
        return self.test_dataloader()


KEEP = (0.4, 0.5, 0.7, 0.8, 0.9)


class PseudoTranscriptCallback(TextSelfTraining):
    """Adapt a `CTCRecognition` to recordings without transcripts.

        pseudo = PseudoTranscriptCallback(recordings, Lexicon.read("words.txt"))
        trainer = Trainer(max_steps=125, reload_dataloaders_every_n_epochs=1,
                          callbacks=[LoRACallback(rank=2, target_modules="all"), pseudo])
        trainer.fit(CTCRecognition(model), pseudo.data)

    In each round the recogniser transcribes the recordings; with a lexicon, by the most likely
    sentence of its words. It is then trained on the part of them whose sound supports that sentence
    most: where the score lies least below that of the best path of any letters, a frame (without a
    lexicon: whose transcript changes least under dropout, DUST, Khurana et al. 2021,
    arXiv:2011.13439), a larger part in each round. The guard compares transcripts as they will be
    decoded: with the lexicon the last round alone, at the end of the schedule, is kept or not;
    without one training stops at the first alarm, and the last accepted state is restored.

    Args:
        recordings: The target, such as `load_utterances` gives it; texts are ignored.
        lexicon: The words that may occur; None: any letters.
        keep: Part of the recordings for each round. As many rounds, of equal
            numbers of the trainer's ``max_steps``.
        teacher_decay: Decay of a moving average of the trained weights, which then labels;
            None: the model itself does.
        limits: Of the alarms; None: none.
        beam_size: Of the beam search with the lexicon.
        language_weight: Of the language model in it.
        variants: Decodings under dropout, where there is no lexicon.
        **data: Of `SpeechData`, such as ``sample_rate``, ``max_batch`` and ``transform``.

    Attributes:
        data: The data of ``Trainer.fit``.
        history_: the rounds, the source first.
        accepted_: the round whose state is kept; 0: the source.
        pseudo_labels_: path → pseudo-transcript.
        changed_in_: path → the accepted round in which it got the label it has; 0: the source's.
        transcripts_: path → `Understood` by the accepted state.
        source_: path → `Understood` by the source model.
        termination_condition_: why it ended.

    Raises:
        ConfigError: a value is out of range, or an unsuitable trainer or module.
        DataError: there is no recording, or all transcripts are empty.
    """

    task = CTCRecognition
    called = "recordings", "understood in", "speech"
    data: LabelledSpeech
    setting = "limits=None"  # what a user sets to adapt despite alarms, in their interface

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
        check_keep(keep)
        check_count("variants", variants)
        # Given transcripts must not leak into the training.
        self.recordings = [replace(u, text=None) for u in recordings]
        rounds = TextRounds(self._check_of, Understood, label="label")
        super().__init__(rounds, keep, LabelledSpeech(self.recordings, **data))
        self.lexicon, self.limits = lexicon, limits
        # With a lexicon rounds recover from alarms: the end of the schedule counts.
        self.each_counts = lexicon is None
        self.teacher_decay, self.variants = teacher_decay, variants
        self.beam_size, self.language_weight = beam_size, language_weight
        self._search: LexiconSearch | None = None

    @property
    def pseudo_labels_(self) -> dict[str, str]:
        """Path → pseudo-transcript."""
        return self.data.labels

    @property
    def transcripts_(self) -> dict[str, Understood]:
        """Path → `Understood` by the accepted state."""
        return self.rounds_.answers_ or {}

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse unsuitable modules and trainers; make the beam search."""
        super().check(trainer, module)
        if self.lexicon is not None:
            labels: Any = module.labels
            self._search = LexiconSearch(self.lexicon, labels, self.beam_size, self.language_weight)

    def _check_of(self, source: dict[str, Understood]) -> Check:
        return SpeechGuard(source, self.limits, self.lexicon, self.setting).check

    def judge(
        self, module: LightningModule, now: Any, verdict: Verdict | None = None, keep: bool = True
    ) -> Round:
        """End a round; where the last alone counts, one with an alarm labels the next as well."""
        found = super().judge(module, now, verdict, keep)
        if found.alarms and not (keep or found.final) and any(u.label for u in now.values()):
            self._learn(now)
        return found

    def doubt(self, written: Understood) -> float:
        """What the lexicon costs, or the change under dropout."""
        return written.distance

    def use(self, labels: dict[str, str]) -> None:
        """Select the recordings of the round."""
        self.data.labels = labels

    @torch.no_grad()
    def look(self, module: Any) -> dict[str, Understood]:
        """Transcribe the recordings."""
        found: dict[str, Understood] = {}
        precision = module.trainer.strategy.precision_plugin
        with preserved(module.model), precision.forward_context():
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
            labels, distances = map(
                list, zip(*self._search.compared(log_probs, frames), strict=True)
            )
        else:
            labels, distances = written, self._doubts(module, batch, written)
        paths = [str(item.path) for item in batch.items]
        return list(zip(paths, map(Understood, written, labels, distances, rates), strict=True))

    def _doubts(self, module: CTCRecognition, batch: AudioBatch, written: list[str]) -> list[float]:
        """Mean change of each transcript under dropout (and augmentation, if any)."""
        module.model.train()
        BatchNormKeeper("frozen").apply(module.model)
        said = []
        for _ in range(self.variants):
            log_probs, frames = module(batch.waveforms, batch.lengths)
            said.append(greedy(log_probs, frames, module.labels))
        return dust_distances(written, list(zip(*said, strict=True)))
