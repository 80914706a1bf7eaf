"""`read_peft`: an adapter from a folder of PEFT's.

What PEFT computes otherwise is refused by name. Its folders say nothing of the base's weights, so
that these cannot be compared.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_lightning.errors import AdapterFileError
from lora_lightning.lora import layers
from lora_lightning.lora.adapted_module import raw_tensor
from lora_lightning.lora.module_tree import find
from lora_lightning.lora.spec import matrix_shape
from lora_lightning.model.adapter_file.container import contents
from lora_lightning.model.adapter_file.format import FORMAT_VERSION, check_header
from lora_lightning.model.adapter_file.peft_format import (
    CONFIG,
    OF_ATTENTION,
    OUTPUT,
    PREFIX,
    WEIGHTS,
    refusal,
)
from lora_lightning.model.adapter_file.schema import FLAG, Record, check, real, text, whole
from lora_lightning.model.fingerprint import fingerprint, statistics
from lora_lightning.model.view import View

_FACTOR = re.compile(r"(.*)\.lora_(?:(?:embedding_)?([AB])|magnitude_vector)(?:\.weight)?")
_ALPHA = real(1e-6, 1e6)
_SCHEMA = Record(
    {"peft_type": text(), "r": whole(1), "lora_alpha": _ALPHA},
    {
        "lora_dropout": real(0, 0.999999),
        "use_dora": FLAG,
        "use_rslora": FLAG,
        "alpha_pattern": Record({}, others=_ALPHA),
    },
)
# Starting factors that leave the base as it is.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Settings that change nothing in what a trained adapter computes, or that are read.
_READ = {
    *_SCHEMA.required, *_SCHEMA.optional, "target_modules", "exclude_modules", "rank_pattern",
    "bias", "modules_to_save", "task_type", "base_model_name_or_path", "revision", "eva_config",
    "inference_mode", "auto_mapping", "peft_version", "layers_to_transform", "layers_pattern",
    "init_lora_weights", "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip


def read_peft(view: View, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of PEFT's folder, as `read` gives them of an adapter file.

    Raises:
        AdapterFileError: it is damaged, or holds what this package computes otherwise.
    """
    settings = _read_settings(folder / CONFIG)
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise AdapterFileError(
            f"{folder} holds a pickle, adapter_model.bin, which can run code and was not opened: "
            "write it again by PEFT's save_pretrained(..., safe_serialization=True)"
        )
    given = contents(folder / WEIGHTS)[1]
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for key, value in given.items():
        key = key.removeprefix(PREFIX)
        found = _FACTOR.fullmatch(key)
        if found and found[1].endswith(OUTPUT):
            if found[2] == "B" and value.any():
                raise AdapterFileError(f"{folder} adapts {found[1]}: {OF_ATTENTION}")
        elif found:
            places[found[1]] = _tensor(view, found[1], settings, folder)
            tensors |= _factor_in(view, found[1], places[found[1]], found[2], value)
        else:
            rest[key.replace(".base_layer.", ".")] = value
    extras = [key for key in rest if key in view.parameters]
    header = {
        "format_version": FORMAT_VERSION,
        "name": "default",
        "base": fingerprint(view, extras) | statistics(view, set(rest) - set(extras)),
        "config": _config(settings, list(places), extras),
        "targets": [_target(view, *place, settings, tensors, folder) for place in places.items()],
        "extras": extras,
        "buffers": [key for key in rest if key not in view.parameters],
    }
    check_header(header, folder)
    return header, {**tensors, **rest}


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}") from error
    if isinstance(settings, dict):
        settings = {k: v for k, v in settings.items() if v is not None}
    check(_SCHEMA, settings, "PEFT's configuration", path)
    if settings["peft_type"] != "LORA":
        raise AdapterFileError(f"{path}: peft_type is {settings['peft_type']}; LORA alone is read")
    start = settings.get("init_lora_weights")
    if start not in _STARTS:
        raise AdapterFileError(
            f"{path}: with init_lora_weights={start!r} PEFT changes the base's weights; convert "
            "it by PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if unknown := sorted(k for k, v in settings.items() if v and k not in _READ):
        raise AdapterFileError(f"{path} asks for {', '.join(unknown)}, which is not read here")
    return settings


def _tensor(view: View, path: str, settings: dict[str, Any], folder: Path) -> str:
    """The tensor of the layer at `path` that PEFT adapts."""
    try:
        module = find(view.model, path)
    except (AttributeError, KeyError) as error:
        raise AdapterFileError(f"{folder} adapts {path}, which this model has not") from error
    tensor = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    why = refusal(view, path, tensor, settings.get("use_dora", False))
    if why is None and tensor not in layers.tensors_of(module):
        why = "it is no layer that is adapted here"
    if why:
        raise AdapterFileError(f"{folder} adapts {path}, which PEFT computes otherwise: {why}")
    return tensor


def _factor_in(
    view: View, path: str, tensor: str, which: str | None, value: Tensor
) -> dict[str, Tensor]:
    """A factor by the name and in the shape of this package."""
    key = f"{path}.{tensor}"
    if which is None:
        return {f"{key}.magnitude": value.reshape(-1)}
    if isinstance(find(view.model, path), nn.Embedding):
        other = {"A": "B", "B": "A"}[which]
        return {f"{key}.lora_{other}": value.T.contiguous()}
    return {f"{key}.lora_{which}": value.flatten(1) if value.dim() > 1 else value}


def _config(settings: dict[str, Any], places: list[str], extras: list[str]) -> dict[str, Any]:
    return {
        "rank": settings["r"],
        "alpha": settings["lora_alpha"],
        "scaling": "alpha/sqrt(r)" if settings.get("use_rslora") else "alpha/r",
        "dropout": settings.get("lora_dropout", 0.0),
        "dora": settings.get("use_dora", False),
        "target_modules": places,
        "trainable": extras,
    }


def _target(
    view: View,
    path: str,
    tensor: str,
    settings: dict[str, Any],
    tensors: dict[str, Tensor],
    folder: Path,
) -> dict[str, Any]:
    module, key = find(view.model, path), f"{path}.{tensor}"
    shape = tuple(raw_tensor(module, tensor).shape)
    if f"{key}.lora_A" not in tensors or f"{key}.lora_B" not in tensors:
        raise AdapterFileError(f"{folder} is not whole: a factor of {path} is missing")
    rank = len(tensors[f"{key}.lora_A"])
    alpha = _alpha(path, settings, folder)
    return {
        "module": path,
        "tensor": tensor,
        "kind": layers.base_class(module).__name__,
        "path": layers.path_of(module),
        "shape": list(shape),
        "matrix": list(matrix_shape(shape)),
        "rank": rank,
        "alpha": alpha,
        "scaling": alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank),
        "dropout": settings.get("lora_dropout", 0.0),
        "dora": settings.get("use_dora", False),
        "freeze_a": False,
    }


def _alpha(path: str, settings: dict[str, Any], folder: Path) -> float:
    """By the first of PEFT's patterns that matches the end of the layer's name."""
    for pattern, alpha in settings.get("alpha_pattern", {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return float(alpha)
        except re.error as error:
            raise AdapterFileError(f"{folder}: alpha_pattern {pattern!r}: {error}") from error
    return float(settings["lora_alpha"])
