"""`fingerprint`: hashes of a base model, by which an adapter file recognises its weights."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.layers import base_class
from lora_lightning.lora.precision import floating
from lora_lightning.lora.sharding import is_packed, whole
from lora_lightning.model.view import View

_SAMPLES = 16


@torch.no_grad()
def fingerprint(
    model: nn.Module | View, exclude: Iterable[str] = (), prefix: str = ""
) -> dict[str, str]:
    """Hashes of the base's structure and of a sample of its weights.

    ``structure`` covers names and shapes of the parameters, ``weights`` 16 evenly spaced
    values of each, rounded to bfloat16 so that a base kept in bfloat16 still counts as the
    same (float16 rounds otherwise: load with ``check="structure"`` there). Of a sharded model every
    process must ask.
    `exclude` names the tensors that an adapter trains in full: they are no part of the base.
    `prefix` goes before each name.
    """
    view, left = View.of(model), set(exclude)
    names, weights = _sampled({prefix + n: p for n, p in view.parameters.items() if n not in left})
    found = {"structure": names, "architecture": architecture(view.model)}
    return found | ({"weights": weights} if weights else {})


@torch.no_grad()
def statistics(model: nn.Module | View, exclude: Iterable[str] = ()) -> dict[str, str]:
    """A hash of a sample of the base's buffers, BatchNorm's statistics above all.

    Apart from `fingerprint`, as training may move them: `exclude` names those that a file holds.
    """
    view, moved = View.of(model), set(exclude)
    kept = {n: t for n, t in view.tensors.items() if n not in moved and t.is_floating_point()}
    _, values = _sampled({n: t for n, t in kept.items() if n not in view.parameters})
    return {"statistics": values} if values else {}


def sample(tensor: Tensor) -> str:
    """A hash of a sample of this tensor's values."""
    return _sampled({"": tensor.detach()})[1]


def _sampled(tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """Hashes of names and shapes, and of a sample of the values; empty where there is none."""
    names, samples = [], []
    for name, tensor in tensors.items():
        shape, number, step = _seen(tensor.shape)
        names.append(f"{name} {shape}")
        if number and not tensor.is_meta:
            tensor = floating(whole(tensor))
            if is_packed(tensor):
                samples += _of_parts(tensor)
                continue
            flat = tensor if tensor.is_contiguous() else tensor.reshape(-1)
            values = flat.as_strided((number,), (step,))
            samples.append(values if values.dtype is torch.float32 else values.float())
    structure = _digest("\n".join(names).encode())
    if not samples:
        return structure, ""
    return structure, _digest(torch.cat(samples).bfloat16().float().cpu().numpy().tobytes())


def _of_parts(packed: Any) -> list[Tensor]:
    """Samples of the tensors that a packed one is made of."""
    parts = [getattr(packed, name) for name in packed.__tensor_flatten__()[0]]
    return [p.reshape(-1)[:: max(p.numel() // _SAMPLES, 1)][:_SAMPLES].float() for p in parts]


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
