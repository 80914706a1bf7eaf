"""The models and variants that `training_step.py`, `growth.py` and `gpu.py` measure."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning import inject

VARIANTS = ("floor", "ours", "ours, frozen A", "peft", "loralib", "full")


@dataclass(frozen=True)
class Case:
    """A model, a batch, and the layers that are adapted, as a regular expression."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    layers: str
    out: Callable[[Any], Tensor] = lambda y: y


def _timm(name: str, **options: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10, **options)

    return build


def wav2vec2(classes: int | None = None) -> nn.Module:
    """wav2vec2-base without dropout."""
    from torchaudio.models import wav2vec2_base

    return wav2vec2_base(
        encoder_projection_dropout=0.0,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_drop=0.0,
        aux_num_out=classes,
    )


def _wav2vec2_small() -> nn.Module:
    from torchaudio.models import wav2vec2_model

    blocks = [(32, 10, 5), (32, 8, 8)]
    return wav2vec2_model(
        "group_norm", blocks, False, 32, 0.0, 16, 4, 2, 2, 0.0, 64, 0.0, 0.0, False, 0.0, None
    )


class _Conformer(nn.Module):
    def __init__(self, width: int = 256, hidden: int = 1024, depth: int = 8) -> None:
        super().__init__()
        from torchaudio.models import Conformer

        self.body = Conformer(width, 4, hidden, depth, 31)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x, torch.full((len(x),), x.shape[1], device=x.device))[0]
        return out


def _pictures(count: int, size: int = 224) -> Callable[[], Tensor]:
    return lambda: torch.rand(count, 3, size, size)


VIT = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
CONVNEXT = r".*\.mlp\.fc[12]"
EFFICIENTNET = r"blocks\..*\.(conv_pw|conv_pwl)"
WAV2VEC2 = r".*layers\.\d+\.(attention\.\w+_proj|feed_forward\.\w+_dense)"
CONFORMER = r".*\.ffn[12]\.sequential\.[14]"
CASES = {
    "vit_tiny": Case(_timm("vit_tiny_patch16_224"), _pictures(16), VIT),
    "vit_small": Case(_timm("vit_small_patch16_224"), _pictures(8), VIT),
    "convnext_atto": Case(_timm("convnext_atto"), _pictures(16), CONVNEXT),
    "efficientnet_lite0": Case(_timm("tf_efficientnet_lite0"), _pictures(16), EFFICIENTNET),
    "wav2vec2_base": Case(wav2vec2, lambda: torch.randn(4, 32000), WAV2VEC2, lambda y: y[0]),
    "conformer": Case(_Conformer, lambda: torch.randn(8, 400, 256), CONFORMER),
}
# What keeps a GPU busy, and the same families at a size that only shows whether all runs.
GPU = {
    "vit_base": Case(_timm("vit_base_patch16_224"), _pictures(64), VIT),
    "convnext_tiny": Case(_timm("convnext_tiny"), _pictures(64), CONVNEXT),
    "efficientnet_b0": Case(_timm("efficientnet_b0"), _pictures(64), EFFICIENTNET),
    "wav2vec2_base": Case(wav2vec2, lambda: torch.randn(8, 160_000), WAV2VEC2, lambda y: y[0]),
    "conformer": Case(_Conformer, lambda: torch.randn(16, 1000, 256), CONFORMER),
}
SMOKE = {
    "vit_base": Case(_timm("test_vit", img_size=64, depth=2), _pictures(2, 64), VIT),
    "convnext_tiny": Case(_timm("test_convnext"), _pictures(2, 32), CONVNEXT),
    "efficientnet_b0": Case(_timm("test_efficientnet"), _pictures(2, 32), EFFICIENTNET),
    "wav2vec2_base": Case(_wav2vec2_small, lambda: torch.randn(2, 2000), WAV2VEC2, lambda y: y[0]),
    "conformer": Case(lambda: _Conformer(32, 64, 1), lambda: torch.randn(2, 40, 32), CONFORMER),
}


def names(model: nn.Module, case: Case) -> list[str]:
    """The layers that are adapted."""
    return [n for n, _ in model.named_modules() if re.fullmatch(case.layers, n)]


def variant(name: str, case: Case, rank: int, dropout: float) -> nn.Module:
    """The model as this variant trains it; the same weights for all."""
    torch.manual_seed(0)
    model = case.build()
    layers = names(model, case)
    if name == "floor":
        model.requires_grad_(False)
        model.get_submodule(layers[0]).register_forward_pre_hook(_wanting_gradients())
    elif name.startswith("ours"):
        frozen = name.endswith("frozen A")
        inject(
            model,
            rank=rank,
            alpha=rank,
            target_modules=layers,
            trainable=[],
            dropout=dropout,
            freeze_a=frozen,
        )
    elif name == "peft":
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, lora_dropout=dropout)
        inject_adapter_in_model(config, model)
    elif name == "loralib":
        _with_loralib(model, layers, rank, dropout)
    return freeze_statistics(model.train())


def _wanting_gradients() -> Callable[[nn.Module, Any], Any]:
    """A hook after which the gradient of the layer's input is wanted."""
    zero = torch.zeros((), requires_grad=True)

    def hook(_: nn.Module, args: Any) -> Any:
        if torch.compiler.is_compiling():  # the other way would break the graph
            return (args[0] + zero,)
        return (args[0].detach().requires_grad_(torch.is_grad_enabled()),)

    return hook


def _with_loralib(model: nn.Module, layers: list[str], rank: int, dropout: float) -> None:
    """Its own layers, with the same weights, in the places of these."""
    import loralib

    for path in layers:
        old: Any = model.get_submodule(path)
        new: Any
        own = {"r": rank, "lora_alpha": rank, "bias": old.bias is not None}
        if isinstance(old, nn.Linear):
            sizes = (old.in_features, old.out_features)
            new = loralib.Linear(*sizes, lora_dropout=dropout, **own)
            new.load_state_dict(old.state_dict(), strict=False)
        else:  # it drops nothing there
            sizes = (old.in_channels, old.out_channels, old.kernel_size[0])
            new = loralib.Conv2d(*sizes, stride=old.stride, padding=old.padding, **own)
            new.conv.load_state_dict(old.state_dict())
        model.set_submodule(path, new)
    loralib.mark_only_lora_as_trainable(model)


def freeze_statistics(model: nn.Module) -> nn.Module:
    """BatchNorm in eval mode and dropout off, in every variant."""
    for path, module in model.named_modules():
        if "BatchNorm" in type(module).__name__ or (
            isinstance(module, nn.Dropout) and "lora" not in path  # PEFT's own
        ):
            module.eval()
        if type(module).__name__ == "Transformer":  # its layer drop, here 0, draws for every layer
            module.training = False
    return model


def stepper(model: nn.Module, case: Case, batch: Tensor, low: bool = False) -> Callable[[], None]:
    """One training step; `low`: its forward pass under autocast to bfloat16."""
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = batch.is_cuda or None  # there one launch for all of an adapter's small tensors
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=fused) if trained else None

    def step() -> None:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=low):
            loss = case.out(model(batch)).square().mean()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def available() -> tuple[str, ...]:
    """The variants that can be measured here."""
    missing = [p for p in ("peft", "loralib") if importlib.util.find_spec(p) is None]
    return tuple(v for v in VARIANTS if v not in missing)
