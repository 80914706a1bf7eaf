"""What BatchNorm statistics do while an adapter trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

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


@torch.no_grad()
def reestimated(
    backbone: nn.Module, forward: Callable[[Tensor], Any], batches: Iterable[Tensor]
) -> bool:
    """Take BatchNorm's statistics anew: the plain average over `batches`; all else in eval mode.

    Li et al. 2017, "Revisiting batch normalization for practical domain adaptation" (AdaBN),
    arXiv:1603.04779.

    Args:
        backbone: Whose BatchNorm layers change; afterwards its modes are what they were.
        forward: Called with each batch.
        batches: Inputs, of two items or more each (one item has no variance; it is passed over).

    Returns:
        Whether there is any BatchNorm; without, nothing is done.
    """
    norms = list(_tracking(backbone).values())
    if not norms:
        return False
    modes = [(m, m.training) for m in backbone.modules()]
    momenta = [norm.momentum for norm in norms]
    kept = [{n: b.clone() for n, b in norm.named_buffers(recurse=False)} for norm in norms]
    backbone.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
        norm.train()
    count = 0
    for batch in batches:
        if len(batch) > 1:
            forward(batch)
            count += 1
    for norm, momentum, values in zip(norms, momenta, kept, strict=True):
        norm.momentum = momentum
        for name, value in values.items() if not count else ():
            norm.get_buffer(name).copy_(value)
    for module, training in modes:
        module.training = training
    return count > 0


def _tracking(backbone: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    }
