"""`target_modules="auto"`: which layers of which family, as data, and a rule for the rest.

The table names, for families of timm, the projections of attention and MLP in transformers
and the pointwise convolutions in ConvNets. A model of no family here, or one in which the
family's patterns match nothing, is judged by structure (`by_structure`).
"""

from __future__ import annotations

from torch import nn

from lora_lightning.patterns import Target, matches
from lora_lightning.structure import block_list
from lora_lightning.tree import walk

_VIT = ("attn.qkv", "attn.proj", "attn.[qkv]", "attn.[qkv]_proj", "attn.kv", "mlp.fc[12]",
        "mlp.fc1_[gx]", "mlp.w[12]")  # fmt: skip
_CONVNEXT = ("mlp.fc1", "mlp.fc2")
_MOBILE = ("conv_pw", "conv_pwl", "blocks.*.conv")
_RESNET = ("layer?.*.conv[123]",)

# Keyed by the module of timm.models that defines the class.
TIMM: dict[str, tuple[str, ...]] = {
    "beit": _VIT,
    "cait": _VIT,
    "convnext": _CONVNEXT,
    "crossvit": (*_VIT, "attn.w[qkv]"),
    "davit": _VIT,
    "deit": _VIT,
    "edgenext": (*_CONVNEXT, "xca.qkv", "xca.proj"),
    "efficientnet": _MOBILE,
    "eva": _VIT,
    "fastvit": (*_VIT, *_CONVNEXT),
    "focalnet": ("mlp.fc[12]", "modulation.f", "modulation.h", "modulation.proj"),
    "hiera": _VIT,
    "inception_next": _CONVNEXT,
    "maxxvit": (*_VIT, "conv1_1x1", "conv3_1x1"),
    "metaformer": _CONVNEXT,
    "mobilenetv3": _MOBILE,
    "mvitv2": _VIT,
    "naflexvit": _VIT,
    "nfnet": ("stages.*.conv1", "stages.*.conv3"),
    "pvt_v2": _VIT,
    "regnet": ("conv1.conv", "conv3.conv"),
    "repvit": ("mixer.*.c", "conv[12].c"),
    "resnet": _RESNET,
    "swin_transformer": (*_VIT, "downsample.reduction"),
    "swin_transformer_v2": (*_VIT, "downsample.reduction"),
    "swin_transformer_v2_cr": (*_VIT, "downsample.reduction"),
    "twins": _VIT,
    "vision_transformer": _VIT,
    "vision_transformer_relpos": _VIT,
    "vision_transformer_sam": _VIT,
    "xcit": _VIT,
}

# Gates and squeeze-excitation: tiny, and they scale channels rather than mix features.
_GATES = {"se", "se_module", "attn_last", "gate_fn"}


def auto(model: nn.Module, layers: list[Target]) -> list[Target]:
    """The layers of `layers` that ``"auto"`` adapts (the caller leaves out the classifier)."""
    found = by_table(model, layers)
    return found or by_structure(model, layers)


def by_table(model: nn.Module, layers: list[Target]) -> list[Target]:
    """Layers that the family's patterns match; empty where there is no table."""
    for prefix, module in walk(model):
        patterns = TIMM.get(_family(module))
        if patterns:
            inside = f"{prefix}." if prefix else ""
            own = [t for t in layers if t.name.startswith(inside)]
            return [t for t in own if any(matches(p, t.name[len(inside) :]) for p in patterns)]
    return []


def by_structure(model: nn.Module, layers: list[Target]) -> list[Target]:
    """Linear layers, attention and pointwise convolutions inside the blocks.

    Where those hold under a quarter of the blocks' weights (VGG, ResNet-18), every layer of
    the blocks. Without a list of blocks, the whole model less its first layer.
    """
    blocks = tuple(f"{b}." for b in block_list(model))
    inside = [t for t in layers if t.name.startswith(blocks)] if blocks else layers
    if not blocks and len(layers) > 1:
        inside = layers[1:]
    inside = [t for t in inside if not _GATES.intersection(t.name.split("."))]
    mixing = [t for t in inside if _mixes_channels(t.module)]
    return mixing if 4 * _weights(mixing) >= _weights(inside) else inside


def _mixes_channels(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.groups == 1 and set(module.kernel_size) == {1}
    return not isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _weights(targets: list[Target]) -> int:
    return sum(p.numel() for t in targets if (p := t.module._parameters.get(t.tensor)) is not None)


def _family(module: nn.Module) -> str:
    where = type(module).__module__
    return where.rpartition(".")[2] if where.startswith("timm.models.") else ""
