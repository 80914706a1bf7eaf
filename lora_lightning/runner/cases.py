"""Inputs and outputs of a run's methods: `Case`, `Adapted`, `Unlabelled`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning import LightningDataModule, LightningModule
from lightning.pytorch import Callback

# Data of a target for a method: none, labels, or items without labels.
NOTHING, LABELS, NO_LABELS = "nothing", "labels", "no labels"


@dataclass(frozen=True)
class Case:
    """One adaptation: its training domains, and the domains to evaluate.

    Attributes:
        name: Of its files.
        train: The training data: one domain, or several.
        tested: The domains that it is evaluated on.
        given: The method's data, for a row's name: "20 target labels"; "" for none.
        size: Amount of that data, where it is a setting.
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
    """A method's model and its costs; `decoding` is passed to `Experiment.measure`."""

    model: Any
    seconds: float = 0.0
    parameters: int = 0
    file_bytes: int | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Unlabelled:
    """A training without labels."""

    task: LightningModule  # what is fitted
    tell: Callable[[], None]  # Called at the end: adds notes and examples to the run
    data: LightningDataModule | None = None  # training data; None: the task has its own
    callbacks: Sequence[Callback] = ()  # of the trainer
    trainer: Mapping[str, Any] = field(default_factory=dict)  # settings of the trainer
    batch_norm: str = "frozen"  # of the adapter's `LoRACallback`
    # Suffix of a row's name → decoding; a row for each
    decodings: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    target_modules: Any = None  # of the adapter; None: as with labels
    trainable: Sequence[str] = ()  # by the adapter, in full
