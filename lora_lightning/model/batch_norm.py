"""BatchNorm statistics during training: frozen, adapted, reset, or re-estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn

from lora_lightning.model.calling import items_in

POLICIES = ("frozen", "adapt", "reset")


class BatchNormKeeper:
    """Keeps every BatchNorm of a backbone to one policy.

    ``frozen``: eval mode; the source's head keeps getting features normalised by the statistics
    that it was trained with. ``adapt``: training mode, the running statistics follow the
    target. ``reset``: reset when the fit starts, then the plain average over all batches.
    """

    def __init__(self, policy: str):
        self.policy = policy
        self._momenta: dict[str, float | None] = {}

    def start(self, backbone: nn.Module, fresh: bool = True) -> None:
        """At the start; a resumed fit, not `fresh`, keeps its checkpoint's statistics."""
        if self.policy != "reset":
            return
        for name, norm in tracking(backbone).items():
            self._momenta[name], norm.momentum = norm.momentum, None
            if fresh:
                norm.reset_running_stats()

    def apply(self, backbone: nn.Module) -> None:
        """Before each batch, whatever switched the modes."""
        for norm in tracking(backbone).values():
            if norm.training == (self.policy == "frozen"):
                norm.train(self.policy != "frozen")

    def stop(self, backbone: nn.Module) -> None:
        """At the end of the fit: restore the model's own momenta."""
        norms = tracking(backbone)
        for name, momentum in self._momenta.items():
            if name in norms:
                norms[name].momentum = momentum
        self._momenta.clear()


@torch.no_grad()
def reestimated(
    backbone: nn.Module,
    forward: Callable[[Any], Any],
    batches: Iterable[Any],
    source_items: float = 0.0,
) -> bool:
    r"""Re-estimate BatchNorm's statistics: the plain average over `batches`; all else in eval mode.

    Li et al. 2017, "Revisiting batch normalization for practical domain adaptation" (AdaBN),
    arXiv:1603.04779.

    Args:
        backbone: Whose BatchNorm layers change; afterwards its modes are what they were.
        forward: Called with each batch.
        batches: Inputs, of two items or more each (one item has no variance; it is passed over).
        source_items: m, how many items the source's own statistics count for beside the n items
            of the batches: :math:`\mu = (m \mu_s + n \mu_t) / (m + n)`, the variance likewise, so
            that few items have little weight. Schneider et al. 2020, "Improving robustness against
            common corruptions by covariate shift adaptation", arXiv:2006.16971.

    Returns:
        Whether there is any BatchNorm, and a batch for it; without, nothing is done.
    """
    usable = (batch for batch in batches if items_in(batch) > 1)
    first = next(usable, None) if tracking(backbone) else None
    if first is None:
        return False
    modes = [(m, m.training) for m in backbone.modules()]
    keeper = BatchNormKeeper("reset")
    backbone.eval()
    norms = tracking(backbone).values()
    before = [[b.clone() for b in (n.running_mean, n.running_var)] for n in norms]
    keeper.start(backbone)
    keeper.apply(backbone)
    items = 0
    for batch in chain([first], usable):
        items += items_in(batch)
        forward(batch)
    keeper.stop(backbone)
    for norm, source in zip(norms, before, strict=True):
        for now, old in zip((norm.running_mean, norm.running_var), source, strict=True):
            now.lerp_(old, source_items / (source_items + items))
    for module, training in modes:
        module.training = training
    return True


def tracking(backbone: nn.Module) -> dict[str, Any]:
    """Path → every normalisation that keeps running statistics."""
    return {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    }
