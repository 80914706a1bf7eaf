"""`PseudoTranslationCallback`: a translator learns sentences that nobody translated."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lora_lightning.adaptation.guard import Verdict
from lora_lightning.adaptation.rounds import SOURCE_ROUND, Round
from lora_lightning.adaptation.teacher import Snapshot
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.model.probing import preserved
from lora_lightning.text.parallel import Pair, ParallelData, TextBatch
from lora_lightning.text.subwords import Subwords
from lora_lightning.text.translation import Translated, Translation
from lora_lightning.text.translation_guard import (
    TranslationGuard,
    TranslationLimits,
    kept,
)


class PseudoTranslationCallback(Callback):
    """Adapt a `Translation` to sentences without translations: guarded self-training.

        own = PseudoTranslationCallback(sentences, model.subwords)
        trainer = Trainer(max_steps=90, reload_dataloaders_every_n_epochs=1,
                          callbacks=[LoRACallback(rank=4), own])
        trainer.fit(Translation(model), own.data)

    In each round the translator translates the sentences and learns the part of them that it is
    surest of (mean log-probability of the pieces), words of the sentence left out at random; more
    of them in each round. He et al. 2020, "Revisiting self-training for neural sequence
    generation", arXiv:1909.13788. At the first alarm training stops, and the last accepted state
    comes back.

    Args:
        sentences: The target, in the language that is translated; each counts once.
        subwords: Of the model.
        words: Of the language that is written, for the guard; None: unknown.
        keep: Part of the sentences that each round learns, in turn. As many rounds, of equal
            numbers of the trainer's ``max_steps``, whole passes over them.
        limits: Of the alarms; None: none.
        batch_size: Sentences in a batch.
        dropped: Probability of leaving a word out.
        seed: Of the order and the words left out.

    Attributes:
        data: What to give to ``Trainer.fit``.
        history_: the rounds, the source first.
        accepted_: the round whose state is kept; 0: the source.
        source_: sentence → what the source model writes.
        translations_: sentence → what the accepted state writes.
        changed_in_: sentence → the accepted round in which it got that, where it is not the
            source's.
        termination_condition_: why it ended.

    Raises:
        ConfigError: a value is out of range, or a trainer or module that it cannot work with.
        DataError: there is no sentence, or the model writes nothing.
    """

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
        self.words, self.keep, self.limits = words, list(keep), limits
        waiting = [Pair(sentence) for sentence in self.sentences]
        self.data = ParallelData(subwords, waiting, (), batch_size, dropped, seed)
        self.history_: list[Round] = []
        self.accepted_, self.termination_condition_ = SOURCE_ROUND, ""
        self.source_: dict[str, Translated] = {}
        self.translations_: dict[str, Translated] = {}
        self.changed_in_: dict[str, int] = {}
        self._previous: dict[str, Translated] = {}
        self._guard: TranslationGuard | None = None
        self._best: Snapshot | None = None
        self._judged_at = 0

    # ---- hooks -----------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Translate the target by the source model."""
        if not isinstance(pl_module, Translation):
            raise ConfigError(
                f"PseudoTranslationCallback adapts a Translation, not {type(pl_module).__name__}"
            )
        reload: Any = getattr(trainer, "reload_dataloaders_every_n_epochs", 0)
        if reload != 1 or trainer.max_steps < 1:
            raise ConfigError(
                "PseudoTranslationCallback needs Trainer(reload_dataloaders_every_n_epochs=1, "
                "max_steps=…): each round has sentences of its own, and so many steps"
            )
        self.source_ = self.translations_ = self._previous = self._translated(trainer, pl_module)
        self._guard = TranslationGuard(self.source_, self.limits, self.words)
        self._best = Snapshot(pl_module.model)
        self.history_ = [Round(SOURCE_ROUND, self._guard.scores)]
        self._take(self.source_)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Other data than ours would be learnt without any of this."""
        if getattr(trainer, "datamodule", None) is not self.data:
            raise ConfigError("call trainer.fit(module, callback.data): the target is in there")

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
        now = self._translated(trainer, pl_module)
        verdict = self._guard.check(now)
        if not all(math.isfinite(t.log_probability) for t in now.values()):
            verdict = Verdict({}, ["the translations are NaN: the learning rate is too high"])
        found = Round(
            len(self.history_),
            verdict.scores,
            verdict.alarms,
            len(self.data.train),
            agreement_before=kept(self._previous, now),
        )
        self.history_.append(found)
        self._previous = now
        if found.alarms:
            self.termination_condition_ = f"alarm in round {found.index}: {found.alarms[0]}"
            trainer.should_stop = True
            return
        for sentence, each in now.items():
            if each.text == self.source_[sentence].text:
                self.changed_in_.pop(sentence, None)
            elif each.text != self.translations_[sentence].text:
                self.changed_in_[sentence] = found.index
        self.accepted_, self.translations_ = found.index, now
        self._best = Snapshot(pl_module.model)
        self._take(now)

    def _take(self, now: dict[str, Translated]) -> None:
        """What the next round learns: the translations that are the surest."""
        usable = [t for t in now.values() if t.text]
        if not usable:
            raise DataError(
                f"nothing is written for any of the {len(now)} sentences: the source model does "
                "not fit this text, and cannot teach itself"
            )
        part = self.keep[min(len(self.history_) - 1, len(self.keep) - 1)]
        count = max(1, math.floor(part * len(now)))
        surest = sorted(usable, key=lambda t: -t.log_probability)[:count]
        self.data.train = [Pair(t.source, t.text) for t in surest]

    @torch.no_grad()
    def _translated(self, trainer: Trainer, module: Any) -> dict[str, Translated]:
        found: dict[str, Translated] = {}
        pairs = [Pair(sentence) for sentence in self.sentences]
        size = 4 * self.data.batch_size
        with preserved(module.model), trainer.strategy.precision_plugin.forward_context():
            module.model.eval()
            for i in range(0, len(pairs), size):
                batch = TextBatch.of(pairs[i : i + size], self.data.subwords).to(module.device)
                found |= {t.source: t for t in module.translate(batch)}
        return found


def check_rounds(keep: Sequence[float], dropped: float) -> None:
    """Raise ConfigError for what cannot be."""
    if not keep or not all(0 < k <= 1 for k in keep):
        raise ConfigError(f"keep must hold parts in (0, 1], one for each round; got {list(keep)}")
    if not 0 <= dropped < 1:
        raise ConfigError(f"dropped must lie in [0, 1), got {dropped}")
