"""A base as a service uses it: what it takes, and what it answers to a batch of requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import nn

from lora_lightning.deploy.intake import Intake

Items = Sequence[NDArray[Any]]


class Answers(Protocol):
    """What a service needs to know of a modality."""

    base: Any
    model: nn.Module

    def intake(self, most_seconds: float) -> Intake:
        """How its items are read; it holds no model."""

    def told(self, data: Mapping[str, Any]) -> Any:
        """How the answers of an adapter are named, by the data in its file's header.

        Raises:
            ConfigError: it takes other items than the base, or has other classes.
        """

    def groups(self, items: Items) -> list[list[int]]:
        """The items that can be run as one batch without a change of their outputs."""

    def outputs(self, items: Items) -> list[Any]:
        """The model's output for each item."""

    def said(self, output: Any, told: Any, top: int) -> dict[str, Any]:
        """An output in words."""
