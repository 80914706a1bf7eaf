"""Features of items: each block's output, the head's input, and the predictions.

Legend of shapes: B items of a batch, N items, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adaptation.target import Predict, Predicted, Target, predicted
from lora_lightning.lora.module_tree import find
from lora_lightning.model.calling import classifier
from lora_lightning.model.introspection import block_list

HEAD = "head"  # name of the classifier's input


def features_of(
    model: nn.Module, data: Any, batch_size: int, predict: Predict | None = None
) -> tuple[dict[str, Tensor], Predicted]:
    """Each block's pooled output (N, D) by name, the head's input last; and the predictions."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    loader = Target(data).loader(batch_size, shuffle=False)
    with _watched(model) as found:
        said = predicted(predict or classifier(model, None), model, loader, device)
    layers = {name: torch.cat(x) for name, x in found.items() if x}
    layers = {name: x for name, x in layers.items() if len(x) == len(said.probabilities)}
    return {**layers, HEAD: said.features}, said


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    found: dict[str, list[Tensor]] = {name: [] for name in block_list(model)}
    last = any(getattr(m, "output_fmt", None) == "NHWC" for m in model.modules())

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(first, Tensor) and first.is_floating_point() and first.ndim > 1:
                found[name].append(_pooled(first, last).float().cpu())

        return hook

    handles = [find(model, n).register_forward_hook(keep(n)) for n in found]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _pooled(x: Tensor, channels_last: bool) -> Tensor:
    """(B, D): the mean over places of (B, C, H, W), (B, H, W, C), (B, N, C) or (B, C)."""
    if x.ndim == 4 and not channels_last:
        return x.mean(dim=(2, 3))
    return x if x.ndim == 2 else x.flatten(1, -2).mean(dim=1)
