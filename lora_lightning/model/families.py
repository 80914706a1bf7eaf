"""`target_modules="auto"`: the layers that a family's table names, or a rule for the rest.

`model.family_tables` names, for families of timm and torchaudio and for `nn.Transformer`, the
projections of attention and feed-forward modules and the convolutions that mix channels. A model
of no family, or one in which the family's patterns match nothing, is adapted by structure
(`by_structure`).
"""

from __future__ import annotations

from torch import nn

from lora_lightning.model.family_tables import TIMM, TORCH, TORCHAUDIO
from lora_lightning.model.introspection import below, block_list
from lora_lightning.model.patterns import Target, matches
from lora_lightning.model.view import View

# Gates and squeeze-excitation: tiny, and they scale channels rather than mix features.
_GATES = {"se", "se_module", "attn_last", "gate_fn"}


def auto(view: View, layers: list[Target]) -> list[Target]:
    """The layers of `layers` that ``"auto"`` adapts (the caller leaves out the classifier)."""
    embedded = {id(t.module._parameters.get(t.tensor)) for t in layers if _looks_up(t.module)}
    # An output layer tied to an embedding is changed with it, or the tie is lost in merging.
    layers = [
        t
        for t in layers
        if _looks_up(t.module) or id(t.module._parameters.get(t.tensor)) not in embedded
    ]
    return by_table(view, layers) or by_structure(view.model, layers)


def _looks_up(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def by_table(model: nn.Module | View, layers: list[Target]) -> list[Target]:
    """Layers that the patterns of their family match; empty where there is no table.

    The outermost family decides; of several side by side, each for its own layers.
    """
    found: list[Target] = []
    done: list[str] = []
    for prefix, module in View.of(model).modules:
        if any(_within(prefix, d) for d in done):
            continue
        if patterns := _table(module):
            done.append(prefix)
            own = [t for t in layers if _within(t.name, prefix)]
            cut = len(prefix) + 1 if prefix else 0
            found += [t for t in own if any(matches(p, t.name[cut:]) for p in patterns)]
            if not prefix:
                break  # the whole model is of this family
    return found


def _within(name: str, prefix: str) -> bool:
    return not prefix or name.startswith(f"{prefix}.")


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
    return not _looks_up(module)


def _weights(targets: list[Target]) -> int:
    return sum(p.numel() for t in targets if (p := t.module._parameters.get(t.tensor)) is not None)


def _table(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.Transformer):
        return TORCH["Transformer"]
    timm = below(module, "timm.models").rpartition(".")[2]
    return TIMM.get(timm, ()) or TORCHAUDIO.get(below(module, "torchaudio.models"), ())
