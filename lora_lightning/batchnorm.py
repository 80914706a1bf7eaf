"""What BatchNorm statistics do while an adapter trains."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from torch import nn

POLICIES = ("frozen", "adapt", "reset")


class BatchNormKeeper:
    """Keeps every BatchNorm of a backbone to one policy.

    ``frozen``: eval mode; a source head that was trained with these statistics goes on seeing
    features normalised by them. ``adapt``: training mode, the running statistics follow the
    target. ``reset``: forgotten when the fit starts, then the plain average over all batches.
    """

    def __init__(self, policy: str):
        self.policy = policy
        self._momenta: dict[str, float | None] = {}

    def start(self, trainer: Trainer, backbone: nn.Module) -> None:
        """At the start of the fit; a resumed one keeps the statistics of its checkpoint."""
        if self.policy != "reset":
            return
        for name, norm in _tracking(backbone).items():
            self._momenta[name], norm.momentum = norm.momentum, None
            if trainer.global_step == 0:
                norm.reset_running_stats()

    def apply(self, backbone: nn.Module) -> None:
        """Before each batch, whatever switched the modes."""
        for norm in _tracking(backbone).values():
            if norm.training == (self.policy == "frozen"):
                norm.train(self.policy != "frozen")

    def stop(self, backbone: nn.Module) -> None:
        """At the end of the fit: the momenta are the model's own again."""
        norms = _tracking(backbone)
        for name, momentum in self._momenta.items():
            if name in norms:
                norms[name].momentum = momentum
        self._momenta.clear()


def _tracking(backbone: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    }
