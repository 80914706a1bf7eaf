"""`TextSelfTraining`: self-training on a model's own transcripts or translations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from operator import attrgetter
from statistics import fmean
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lora_lightning.adaptation.rounds import Check, Rounds
from lora_lightning.adaptation.self_training import SelfTraining
from lora_lightning.errors import ConfigError, DataError


def normalised_distance(a: str, b: str) -> float:
    """Edit distance of characters over the length of the longer; 0 for two empty texts."""
    from torchmetrics.functional.text import edit_distance

    return float(edit_distance(a, b)) / max(len(a), len(b), 1)


def text_agreement(before: Mapping[str, Any], now: Mapping[str, Any], written: str) -> float:
    """1 − mean normalised edit distance of the texts in this attribute, item by item."""
    text = attrgetter(written)
    return fmean(1 - normalised_distance(text(before[n]), text(now[n])) for n in now)


class TextRounds(Rounds[Mapping[str, Any]]):
    """Rounds of a model that predicts a text for each item: name → prediction.

    Args:
        guard: See `Rounds`.
        kind: Type of a prediction, a dataclass or named tuple.
        label: Its attribute that is trained on.

    Attributes:
        changed_in_: name → round, of those whose label is not the source's.
    """

    def __init__(self, guard: Callable[[Any], Check], kind: Callable[..., Any], label: str):
        super().__init__(guard)
        self.kind, self.label = kind, attrgetter(label)

    def note(self, index: int, now: Mapping[str, Any]) -> None:
        """In which round each item got the label that it has."""
        for name, each in now.items():
            if self.label(each) == self.label(self.source[name]):
                self.changed_in_.pop(name, None)
            elif self.label(each) != self.label(self.answers_[name]):
                self.changed_in_[name] = index

    def packed(self, answers: Mapping[str, Any]) -> Any:
        """Name → tuple."""
        return {n: tuple(a) if isinstance(a, tuple) else astuple(a) for n, a in answers.items()}

    def unpacked(self, state: Any) -> Mapping[str, Any]:
        """Name → prediction."""
        return {name: self.kind(*values) for name, values in state.items()}


def check_keep(keep: Sequence[float]) -> None:
    """Raise ConfigError for invalid parts of the items, one for each round."""
    if not keep or not all(0 < k <= 1 for k in keep):
        raise ConfigError(f"keep must hold parts in (0, 1], one for each round; got {list(keep)}")


class TextSelfTraining(SelfTraining):
    """Rounds of equal numbers of steps, each on the most certain part of the items.

    A subclass defines the predictions (`look`), their uncertainty (`doubt`), and `use`.

    Args:
        rounds: How rounds are checked.
        keep: Part of the items that each round trains on. As many rounds, of equal numbers
            of the trainer's ``max_steps``.
        data: The data of ``Trainer.fit``, with the `Position` of its loader.
    """

    task: type[LightningModule]  # of the adapted module
    called = "items", "written for", "text"  # nouns in messages

    def __init__(self, rounds: TextRounds, keep: Sequence[float], data: Any):
        super().__init__(rounds, data.position)
        self.keep, self.data = list(keep), data

    @property
    def source_(self) -> dict[str, Any]:
        """Name → prediction of the source model."""
        return self.rounds_.source or {}

    def doubt(self, written: Any) -> float:
        """The uncertainty of a prediction."""
        raise NotImplementedError

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse another module, and a trainer without ``max_steps``."""
        name = type(self).__name__
        if not isinstance(module, self.task):
            raise ConfigError(f"{name} adapts a {self.task.__name__}, not {type(module).__name__}")
        reload: Any = getattr(trainer, "reload_dataloaders_every_n_epochs", 0)
        if reload != 1 or trainer.max_steps < 1:
            raise ConfigError(
                f"{name} needs Trainer(reload_dataloaders_every_n_epochs=1, max_steps=…): each "
                f"round has {self.called[0]} of its own, and so many steps"
            )

    def check_loader(self, trainer: Trainer) -> None:
        """Refuse another training loader, which would have no pseudo-labels."""
        if getattr(trainer, "datamodule", None) is not self.data:
            raise ConfigError("call trainer.fit(module, callback.data): the target is in there")

    def due(self, trainer: Trainer, epochs: int) -> bool:
        """Whether the epoch completes a round's number of steps; the last round ends at the end."""
        steps = trainer.global_step - self._judged_at
        last = trainer.global_step >= trainer.max_steps
        return steps >= trainer.max_steps / len(self.keep) and not last

    def due_at_end(self, trainer: Trainer) -> bool:
        """Whether the last round is still to be ended."""
        return trainer.global_step > self._judged_at

    def labelled(self) -> dict[str, Any]:
        """The number of items of the round."""
        return {"labelled": len(self._labels)}

    def label(self, now: Mapping[str, Any]) -> dict[str, str]:
        """The most certain predictions: name → text."""
        texts = {name: self.rounds_.label(each) for name, each in now.items()}
        usable = [name for name, text in texts.items() if text]
        if not usable:
            items, done, kind = self.called
            raise DataError(
                f"nothing is {done} any of the {len(now)} {items}: the source model does not fit "
                f"this {kind}, and cannot teach itself"
            )
        part = self.keep[min(len(self.history_) - 1, len(self.keep) - 1)]
        count = max(1, math.floor(part * len(now)))
        surest = sorted(usable, key=lambda name: self.doubt(now[name]))[:count]
        return {name: texts[name] for name in surest}
