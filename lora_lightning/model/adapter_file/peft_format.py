"""PEFT's adapter folders: their files, and which layers PEFT adapts as this package does."""

from __future__ import annotations

from torch import nn

from lora_lightning.lora import layers
from lora_lightning.lora.module_tree import find
from lora_lightning.model.view import View

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# PEFT adapts both projections of an attention under one name, the second by this ending. What it
# learns there is added twice in its forward (0.21.2), and ignored where it stands alone.
OUTPUT = ".base_layer.out_proj"
OF_ATTENTION = "the output's projection of an attention, which PEFT ignores or adds twice"


def refusal(view: View, path: str, tensor: str, dora: bool) -> str | None:
    """Why PEFT has no such adapter on a tensor of the layer at `path`; None where it has."""
    module, (parent, _, last) = find(view.model, path), path.rpartition(".")
    if not path:
        return "it is the model itself, which PEFT cannot wrap"
    if last == "out_proj" and isinstance(find(view.model, parent), nn.MultiheadAttention):
        return OF_ATTENTION
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None:
            return "its queries, keys and values have weights of their own"
        return "DoRA of attention" if dora else None
    if tensor != "weight" or layers.path_of(module) != "factorised":
        return f"the own forward of {layers.base_class(module).__name__} reads it"
    if isinstance(module, nn.Embedding):
        return "DoRA of an embedding, by rows here and by columns there" if dora else None
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.padding_mode != "zeros":
            return f"padding_mode={module.padding_mode!r}, where PEFT pads with zeros"
        if any(d != 1 for d in module.dilation):
            return f"dilation={module.dilation}, which PEFT's factors have not"
    return None
