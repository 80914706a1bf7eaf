"""Caches and fast paths of models in eval mode that bypass adapted weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from lora_lightning.lora.adapted_module import AdaptedModule
from lora_lightning.lora.module_tree import Modules

_CACHE = "attention_bias_cache"


def cachers(modules: Modules) -> list[nn.Module]:
    """Modules that cache values of their biases in eval mode: timm's LeViT, TinyViT, …"""
    return [m for _, m in modules if _CACHE in m.__dict__]


def forget_computed(modules: Iterable[nn.Module]) -> None:
    """Clear the caches of `cachers`, after their biases have changed."""
    for module in modules:
        module.__dict__[_CACHE] = {}


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, AdaptedModule)


def keep_padded(
    modules: Modules, adapted: Callable[[nn.Module], bool] = _is_adapted
) -> list[nn.TransformerEncoder]:
    """Disable nested tensors in torch's encoders with an adapted layer; returns those encoders.

    torch checks only the first layer for nested tensors, which an adapted one cannot take. To be
    given to `pack_again` when the last adapter is removed.
    """
    found = [
        m
        for _, m in modules
        if isinstance(m, nn.TransformerEncoder)
        and m.use_nested_tensor
        and any(adapted(part) for part in m.modules())
    ]
    for encoder in found:
        encoder.use_nested_tensor = False
    return found


def pack_again(encoders: Iterable[nn.TransformerEncoder]) -> None:
    """Undo `keep_padded`."""
    for encoder in encoders:
        encoder.use_nested_tensor = True
