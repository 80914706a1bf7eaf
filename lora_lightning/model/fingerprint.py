"""`fingerprint`: hashes of a base model, by which an adapter file recognises its weights."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lora_lightning.lora.layers import base_class
from lora_lightning.model.view import View

_SAMPLES = 16


@torch.no_grad()
def fingerprint(model: nn.Module | View, exclude: Iterable[str] = ()) -> dict[str, str]:
    """Hashes of the base's structure and of a sample of its weights.

    ``structure`` covers names and shapes of the parameters, ``weights`` 16 evenly spaced
    values of each, rounded to bfloat16 so that a base kept in bfloat16 still counts as the
    same (float16 rounds otherwise: load with ``check="structure"`` there).
    `exclude` names the tensors that an adapter trains in full: they are no part of the base.
    """
    view, whole = View.of(model), set(exclude)
    names, samples = [], []
    for name, parameter in view.parameters.items():
        if name in whole:
            continue
        shape, number, step = _seen(parameter.shape)
        names.append(f"{name} {shape}")
        if number and not parameter.is_meta:
            flat = parameter if parameter.is_contiguous() else parameter.reshape(-1)
            values = flat.as_strided((number,), (step,))
            samples.append(values if values.dtype is torch.float32 else values.float())
    structure = _digest("\n".join(names).encode())
    found = {"structure": structure, "architecture": architecture(view.model)}
    if samples:
        rounded = torch.cat(samples).bfloat16().float().cpu()
        found["weights"] = _digest(rounded.numpy().tobytes())
    return found


def architecture(model: nn.Module) -> str:
    """timm's name of the architecture where the model knows it, else its class."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture") if hasattr(cfg, "get") else None
    cls = base_class(model)
    return str(name or f"{cls.__module__}.{cls.__qualname__}")


@functools.lru_cache(4096)
def _seen(shape: torch.Size) -> tuple[str, int, int]:
    """The shape as text, the number of sampled values, and their distance."""
    number = shape.numel()
    return str(tuple(shape)), min(number, _SAMPLES), max(number // _SAMPLES, 1)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
