"""`PseudoTranslationCallback`: self-training of a translator on pseudo-translations."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lora_lightning.adaptation.rounds import Check
from lora_lightning.adaptation.text_self_training import TextRounds, TextSelfTraining, check_keep
from lora_lightning.errors import DataError
from lora_lightning.lora.values import check_number
from lora_lightning.model.probing import evaluating
from lora_lightning.text.parallel import Pair, ParallelData, TextBatch
from lora_lightning.text.subwords import Subwords
from lora_lightning.text.translation import Translated, Translation
from lora_lightning.text.translation_guard import TranslationGuard, TranslationLimits


class PseudoTranslationCallback(TextSelfTraining):
    """Adapt a `Translation` to sentences without translations: guarded self-training.

        limits = TranslationLimits(confidence=0)  # 1, the default, trains nothing
        own = PseudoTranslationCallback(sentences, model.subwords, limits=limits)
        trainer = Trainer(max_steps=90, reload_dataloaders_every_n_epochs=1,
                          callbacks=[LoRACallback(rank=4), own])
        trainer.fit(Translation(model), own.data)

    In each round the translator translates the sentences and is trained on the part of them with
    the highest confidence (mean log-probability of the pieces), with words of the sentence dropped
    at random; a larger part in each round. He et al. 2020, "Revisiting self-training for neural
    sequence generation", arXiv:1909.13788. At the first alarm training stops, and the last accepted
    state is restored. By default nothing is trained, as nothing was gained on the mean.

    Args:
        sentences: The target, in the source language; duplicates count once.
        subwords: Of the model.
        words: Of the target language, for the guard; None: unknown.
        keep: Part of the sentences for each round. As many rounds, of equal
            numbers of the trainer's ``max_steps``, whole passes over them.
        limits: Of the alarms; None: none.
        batch_size: Sentences in a batch.
        dropped: Probability of dropping a word.
        seed: Of the order and the dropped words.

    Attributes:
        data: The data of ``Trainer.fit``.
        history_: the rounds, the source first.
        accepted_: the round whose state is kept; 0: the source.
        source_: sentence → the source model's translation.
        translations_: sentence → the accepted state's translation.
        changed_in_: sentence → the accepted round in which it got that, where it is not the
            source's.
        termination_condition_: why it ended.

    Raises:
        ConfigError: a value is out of range, or an unsuitable trainer or module.
        DataError: there is no sentence, or all translations are empty.
    """

    task = Translation
    called = "sentences", "written for", "text"
    # What a user sets to train all the same, in their interface
    setting = "limits=TranslationLimits(confidence=0)"

    def __init__(
        self,
        sentences: Sequence[str],
        subwords: Subwords,
        words: Collection[str] | None = None,
        *,
        keep: Sequence[float] = (0.5, 0.7, 0.9),
        limits: TranslationLimits | None = TranslationLimits(),  # noqa: B008 - frozen
        batch_size: int = 16,
        dropped: float = 0.1,
        seed: int = 0,
    ):
        check_rounds(keep, dropped)
        self.sentences = list(dict.fromkeys(sentences))
        if not self.sentences:
            raise DataError("the target is empty: there is no sentence to adapt to")
        self.words, self.limits = words, limits
        waiting = [Pair(sentence) for sentence in self.sentences]
        rounds = TextRounds(self._check_of, Translated, label="text")
        data = ParallelData(subwords, waiting, (), batch_size, dropped, seed)
        super().__init__(rounds, keep, data)

    @property
    def translations_(self) -> dict[str, Translated]:
        """Sentence → the accepted state's translation."""
        return self.rounds_.answers_ or {}

    def _check_of(self, source: dict[str, Translated]) -> Check:
        self._guard = TranslationGuard(source, self.limits, self.words)
        return self._guard.check

    def start(self, module: LightningModule, source: Any) -> None:
        """Start the rounds, or end them where the guard refuses to train."""
        super().start(module, source)
        if why := self._guard.refusal():
            self.rounds_.termination_condition_ = f"{why} ({self.setting} trains all the same)"

    def doubt(self, written: Translated) -> float:
        """The mean negative log-probability of its pieces."""
        return -written.log_probability

    def use(self, labels: dict[str, str]) -> None:
        """Select the sentences of the round."""
        self.data.train = [Pair(*pair) for pair in labels.items()]

    @torch.no_grad()
    def look(self, module: Any) -> dict[str, Translated]:
        """Translate the sentences."""
        found: dict[str, Translated] = {}
        pairs = [Pair(sentence) for sentence in self.sentences]
        size = 4 * self.data.batch_size
        precision = module.trainer.strategy.precision_plugin
        with evaluating(module.model), precision.forward_context():
            for i in range(0, len(pairs), size):
                batch = TextBatch.of(pairs[i : i + size], self.data.subwords).to(module.device)
                found |= {t.source: t for t in module.translate(batch)}
        return found


def check_rounds(keep: Sequence[float], dropped: float) -> None:
    """Raise ConfigError for invalid settings."""
    check_keep(keep)
    check_number("dropped", dropped, "[0, 1)")
