"""`Teacher`, a moving average of the trained parameters, and `Snapshot`, a state to restore.

Both hold factors and other trained tensors, no frozen weight: kilobytes, no second model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import check_number


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → each parameter that requires a gradient, tied ones once."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


class Snapshot:
    """A copy of the trained parameters and the buffers."""

    def __init__(self, model: nn.Module):
        self._values = {n: t.detach().clone() for n, t in _moving(model).items()}

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Restore the values, bit for bit."""
        live = _moving(model)
        for name, value in self._values.items():
            live[name].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return dict(self._values)

    @classmethod
    def of(cls, values: dict[str, Tensor]) -> Snapshot:
        """From a checkpoint."""
        found = cls.__new__(cls)
        found._values = {n: t.clone() for n, t in values.items()}
        return found


def _moving(model: nn.Module) -> dict[str, Tensor]:
    return {**trained(model), **dict(model.named_buffers())}


class Teacher:
    r"""The exponential moving average of the trained parameters.

    After each step :math:`\bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta` for the
    parameters that require a gradient. In the first steps the decay is
    :math:`\min(d, (1 + t) / (10 + t))` with d the decay, in [0, 1), so that the
    initial values are not overweighted.
    Tarvainen & Valpola 2017, "Mean teachers are better role models", arXiv:1703.01780.

    Raises:
        ConfigError: the decay is out of range, or nothing of the model is trained.
    """

    def __init__(self, model: nn.Module, decay: float = 0.95):
        check_number("decay", decay, "[0, 1)")
        self.decay, self.steps = decay, 0
        self._mean = {n: p.detach().clone() for n, p in trained(model).items()}
        if not self._mean:
            raise ConfigError("nothing of the model is trained: inject an adapter first")

    @property
    def nbytes(self) -> int:
        """The teacher's size in bytes."""
        return sum(t.nbytes for t in self._mean.values())

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average after a step of the student."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        live = trained(model)
        for name, mean in self._mean.items():
            mean.lerp_(live[name].detach().to(mean), 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the block the model holds the teacher's values; afterwards the student's again."""
        live = trained(model)
        student = {name: live[name].detach().clone() for name in self._mean}
        with torch.no_grad():
            for name, mean in self._mean.items():
                live[name].copy_(mean)
        try:
            yield model
        finally:
            with torch.no_grad():
                for name, value in student.items():
                    live[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"steps": self.steps, "mean": dict(self._mean)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.steps = state["steps"]
        for name, value in state["mean"].items():
            self._mean[name].copy_(value)
