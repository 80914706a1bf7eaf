"""Features of items: each block's output, the head's input, and the predictions.

Legend of shapes: B items of a batch, N items, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adaptation.target import Predicted, Target, predicted
from lora_lightning.errors import ConfigError
from lora_lightning.lora.module_tree import find
from lora_lightning.model.introspection import block_list

HEAD = "head"  # name of the classifier's input


def features_of(
    model: nn.Module, data: Any, batch_size: int, forward: Callable[[Tensor], Any] | None = None
) -> tuple[dict[str, Tensor], Predicted]:
    """Each block's pooled output (N, D) by name, the head's input last; and the predictions."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    loader = Target(data).loader(batch_size, shuffle=False)
    with _watched(model) as found:
        said = predicted(_checked(forward or model), model, loader, device)
    layers = {name: torch.cat(x) for name, x in found.items() if x}
    layers = {name: x for name, x in layers.items() if len(x) == len(said.probabilities)}
    return {**layers, HEAD: said.features}, said


def _checked(forward: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def call(inputs: Tensor) -> Tensor:
        logits = forward(inputs)
        if isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] > 1:
            return logits
        what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits)
        raise ConfigError(
            f"a shift is judged by how sure a classifier is: logits (items, classes) are needed, "
            f"got {what}. Give forward=, from (model, inputs) or inputs alone to such logits, as "
            "in forward=lambda x: model(x)[0] for a model that returns more, or model(x).mean(1) "
            "for frames (items, frames, classes). A regression has no confidence: compare its "
            "features by lora_lightning.adaptation.shift.distances"
        )

    return call


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
