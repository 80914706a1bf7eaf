"""Caches and fast paths of models in eval mode that bypass adapted weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterError
from lora_lightning.lora.adapted_module import AdaptedModule
from lora_lightning.lora.layers import base_class
from lora_lightning.lora.module_tree import Modules
from lora_lightning.lora.sharding import is_in_pieces
from lora_lightning.lora.swapped_class import once

_CACHE = "attention_bias_cache"


def cachers(modules: Modules) -> list[nn.Module]:
    """Modules that cache values of their biases in eval mode: timm's LeViT, TinyViT, …"""
    return [m for _, m in modules if _CACHE in m.__dict__]


def packers(modules: Modules) -> list[nn.TransformerEncoder]:
    """Torch's encoders that pack padded sequences into nested tensors in eval mode.

    torch checks only the first layer for nested tensors, which an adapted one cannot take.
    """
    encoders = [m for _, m in modules if isinstance(m, nn.TransformerEncoder)]
    return [m for m in encoders if m.use_nested_tensor or isinstance(m, _Unpacked)]


def _acts(module: nn.Module) -> bool:
    return isinstance(module, AdaptedModule) and module.lora_active is not None


def settle(
    caching: Iterable[nn.Module],
    packing: Iterable[nn.TransformerEncoder],
    acts: Callable[[nn.Module], bool] = _acts,
) -> None:
    """Clear caches and choose fast paths, after adapters or the values of biases have changed."""
    for module in caching:
        module.__dict__[_CACHE] = {}
    for encoder in packing:
        unpacked = any(acts(part) for part in encoder.modules())
        encoder.use_nested_tensor = not unpacked
        if is_in_pieces(encoder):  # its class is FSDP2's, by which packing stays right too
            _check_unpacked(encoder, unpacked)
            continue
        base: Any = base_class(encoder)
        object.__setattr__(encoder, "__class__", _unpacked(base) if unpacked else base)


def _check_unpacked(encoder: nn.Module, unpacked: bool) -> None:
    if unpacked and not isinstance(encoder, _Unpacked):
        raise AdapterError(
            f"the adapter within a sharded {base_class(encoder).__name__} was inactive when "
            "fully_shard was called: activate it before"
        )


class _Unpacked(nn.TransformerEncoder):
    """An encoder that gives what nested tensors give, computed on padded ones.

    Packing drops the padded rows; unpacked they are zero, before the encoder's own norm.
    """

    _adapted_base: type[nn.TransformerEncoder]

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Torch's forward; padded rows are zero where torch would pack."""
        out_BTD = super().forward(src, mask, src_key_padding_mask, is_causal)
        if src_key_padding_mask is None or not self._packs(src, mask, src_key_padding_mask):
            return out_BTD
        padded_D = out_BTD.new_zeros(out_BTD.shape[-1])
        if self.norm is not None:
            padded_D = self.norm(padded_D)
        return torch.where(src_key_padding_mask.bool()[..., None], padded_D, out_BTD)

    def _packs(self, src: Tensor, mask: Tensor | None, padding: Tensor) -> bool:
        """Torch's own conditions, see `nn.TransformerEncoder.forward`."""
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        off = not torch.backends.mha.get_fastpath_enabled() or torch.is_autocast_enabled()
        if trains or off or mask is not None or self.layers[0].training or src.dim() != 3:
            return False
        if not getattr(self, "mask_check", True):
            return True
        aligned: Any = torch._nested_tensor_from_mask_left_aligned
        return not torch.compiler.is_compiling() and bool(aligned(src, padding.logical_not()))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, see `AdaptedModule`.
        return (_new, (self._adapted_base,), *super().__reduce_ex__(protocol)[2:])


def _new(base: type[nn.TransformerEncoder]) -> nn.Module:
    cls = _unpacked(base)
    return cls.__new__(cls)


@once
def _unpacked(base: type[nn.TransformerEncoder]) -> type[nn.TransformerEncoder]:
    """The subclass of `base` whose `super().forward` is `_Unpacked`'s."""
    parents = (_Unpacked,) if base is nn.TransformerEncoder else (base, _Unpacked)
    return type(base.__name__, parents, {"_adapted_base": base, "__module__": __name__})
