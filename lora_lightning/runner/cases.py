"""What a method of a run is given, and what it makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning import LightningDataModule, LightningModule
from lightning.pytorch import Callback

# What a method is given of a target: nothing, labels, or items without labels.
NOTHING, LABELS, NO_LABELS = "nothing", "labels", "no labels"


@dataclass(frozen=True)
class Case:
    """One adaptation, and what it is measured on.

    Attributes:
        name: Of its files.
        train: What it learns from: one domain, or several.
        tested: The domains that it is measured on.
        given: What the method is given, as a row is called: "20 target labels"; "" for nothing.
        size: How much of it, where that is a setting.
    """

    name: str
    train: Any
    tested: Sequence[Any]
    given: str = ""
    size: int | None = None

    @property
    def items(self) -> int | None:
        """Labelled items of the target that the method is given."""
        return self.size if self.given.endswith("target labels") else None


@dataclass(frozen=True)
class Adapted:
    """A model that a method made, and what it cost; `decoding` goes to `Experiment.measure`."""

    model: Any
    seconds: float = 0.0
    parameters: int = 0
    file_bytes: int | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Unlabelled:
    """A training without labels.

    Attributes:
        task: What is fitted.
        tell: Called when it is done: adds notes and examples to the run.
        data: What it is fitted on; None: the task has it.
        callbacks: That train it.
        trainer: Settings of the trainer.
        batch_norm: Of the adapter's `LoRACallback`.
        decodings: End of a row's name → how it is decoded; a row for each.
    """

    task: LightningModule
    tell: Callable[[], None]
    data: LightningDataModule | None = None
    callbacks: Sequence[Callback] = ()
    trainer: Mapping[str, Any] = field(default_factory=dict)
    batch_norm: str = "frozen"
    decodings: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
