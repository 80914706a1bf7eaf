"""A short identity of a base model: does this adapter belong to these weights?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.structure import base_parameters

_SAMPLES = 16


@torch.no_grad()
def fingerprint(
    model: nn.Module, exclude: Iterable[str] = (), live: dict[str, Tensor] | None = None
) -> dict[str, str]:
    """Hashes of the base's structure and of a sample of its weights.

    ``structure`` covers names and shapes of the parameters, ``weights`` 16 evenly spaced
    values of each, rounded to bfloat16 so that a base kept in bfloat16 still counts as the
    same (float16 rounds otherwise: load with ``check="structure"`` there).
    `exclude` names what an adapter trains in full: it is no part of the base.
    """
    whole = set(exclude)
    base = [(n, p) for n, p in base_parameters(model, live).items() if n not in whole]
    names = "\n".join(f"{n} {tuple(p.shape)}" for n, p in base)
    found = {"structure": _digest(names.encode()), "architecture": architecture(model)}
    samples = [_sample(p) for _, p in base if p.numel() and not p.is_meta]
    if samples:
        values = torch.cat(samples).bfloat16().float().cpu().numpy().tobytes()
        found["weights"] = _digest(values)
    return found


def architecture(model: nn.Module) -> str:
    """timm's name of the architecture where the model knows it, else its class."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture") if hasattr(cfg, "get") else None
    return str(name or f"{type(model).__module__}.{type(model).__qualname__}")


def _sample(parameter: Tensor) -> Tensor:
    number = parameter.numel()
    step = max(number // _SAMPLES, 1)
    flat = parameter if parameter.is_contiguous() else parameter.reshape(-1)
    values = flat.as_strided((min(number, _SAMPLES),), (step,))
    return values if values.dtype is torch.float32 else values.float()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
