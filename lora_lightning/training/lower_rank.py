"""Lower ranks at the end of a fit, together with its optimizers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.model import state as states
from lora_lightning.model.compression import compress
from lora_lightning.model.shrinkage import undone


def lower_while_no_worse(
    network: nn.Module, loss: float, evaluate: Callable[[], Tensor], optimizers: list[Optimizer]
) -> dict[str, int]:
    """Halve the rank of the active adapter for as long as the mean loss is no higher.

    Returns:
        Layer → its rank; empty where none was lowered.
    """
    first = rank = max(ranks_of(network).values())
    while rank > 1:
        with undone(network):
            compress(network, rank=rank // 2)
            now = float(evaluate().mean())
        if not now <= loss:
            break
        loss, rank = now, rank // 2
    if rank == first:
        return {}
    lower_rank(network, rank, optimizers)
    return ranks_of(network)


def ranks_of(network: nn.Module) -> dict[str, int]:
    """Layer → rank of the active adapter."""
    root, _, name = states.holder(network, None, "to look at")
    return {path: f.spec.rank for path, f in states.named_factors(root, name).items()}


def lower_rank(backbone: nn.Module, rank: int, optimizers: list[Optimizer]) -> None:
    """`compress` the active adapter after a fit, so that a checkpoint saved then can be loaded."""
    root, _, name = states.holder(backbone, None, "to lower")
    before = states.named_factors(root, name)
    compress(root, name, rank=rank)
    after = states.named_factors(root, name)
    new = {
        old: after[path].get_parameter(key)
        for path, f in before.items()
        for key, old in f.named_parameters()
        if key in dict(after[path].named_parameters())
    }
    for optimizer in optimizers:  # the old factors' moments have other shapes
        for group in optimizer.param_groups:
            group["params"] = [new.get(p, p) for p in group["params"]]
        for old in new:
            optimizer.state.pop(old, None)
