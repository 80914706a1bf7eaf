"""What the output of a model that decides in eval mode tells of its adapters there.

Classes, detections and texts have no gradient, or as many entries as the model finds. Whether an
adapter acts can be told by whether they change, if need be with far larger factors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_lightning.lora.factors import Factors
from lora_lightning.model.probing import difference, randomise
from lora_lightning.model.switching import disabled

Look = Callable[..., list[Tensor]]  # from a seed: the outputs of one run

_LARGER = (1.0, 10.0)  # parts of each weight's norm


def untold_by_eval(
    model: nn.Module, factors: dict[str, Factors], look: Look, trained: list[Tensor]
) -> tuple[str, bool]:
    """Why the eval output tells no gradient ("": it does), and whether it can be compared.

    Args:
        model: In eval mode.
        factors: Of the adapter that is on, randomised.
        look: Runs the model.
        trained: The outputs in training mode.
    """
    found = look()
    gradient = any(x.requires_grad and x.numel() for x in found)
    if gradient and _kinds(found) == _kinds(trained):
        return "", True
    with torch.no_grad():
        with disabled(model):
            source = look(whole=True)
        drawn = [look(whole=True)]
        for part in _LARGER:
            randomise(model, factors, 0, part)
            drawn.append(look(whole=True))
    randomise(model, factors, 0)
    stable = all([x.shape for x in source] == [x.shape for x in now] for now in drawn)
    numbers = stable and any(x.numel() for x in found)
    if gradient and numbers:
        return "", True
    why = (
        "the eval output has no gradient or no fixed size, as of a model that decides: that "
        "every factor learns was checked in training mode"
    )
    changes = [difference(now, source) != 0 for now in drawn]
    if numbers and changes[0] == any(changes):
        return f"{why} only", True
    seen = "the adapter changes decisions" if any(changes) else "no decision changed on this batch"
    return f"{why}; in eval {seen}, and merging was not checked", False


def _kinds(outputs: list[Tensor]) -> list[tuple[torch.dtype, int]]:
    return [(x.dtype, x.ndim) for x in outputs]
