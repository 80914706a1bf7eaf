"""PEFT's adapter folders, written and read: ``adapter_config.json``, ``adapter_model.safetensors``.

What PEFT computes otherwise, or has not, is refused by name. Its folders say nothing of the base's
weights, so that these cannot be compared.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_lightning.errors import AdapterFileError, TargetError
from lora_lightning.lora import layers
from lora_lightning.lora.adapted_module import raw_tensor
from lora_lightning.lora.factors import Factors
from lora_lightning.lora.module_tree import find, join
from lora_lightning.lora.spec import matrix_shape
from lora_lightning.model import state as states
from lora_lightning.model import switching
from lora_lightning.model.adapter_file.container import contents
from lora_lightning.model.adapter_file.format import FORMAT_VERSION, check_header
from lora_lightning.model.adapter_file.save import checked_contents
from lora_lightning.model.adapter_file.schema import FLAG, Record, check, real, text, whole
from lora_lightning.model.fingerprint import fingerprint, statistics
from lora_lightning.model.view import View
from lora_lightning.report.files import atomic_write

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
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


# ---- writing ---------------------------------------------------------------------------------


def save_peft(model: nn.Module, folder: Path, name: str | None = None) -> Path:
    """Write the adapter `name` (default: the active one) as PEFT does.

    Raises:
        AdapterNotFoundError: there is no such adapter.
        TargetError: PEFT has no such adapter for some layers, which are named.
    """
    from safetensors.torch import save

    view = View(model)
    states.check_home(view, "export")
    root, state, name = states.holder(view, name, "to export")
    with switching.unmerged(root):
        view = View(root)
        tensors, header = checked_contents(view, state, name, folder)
        factors = states.named_factors(view, name)
        _check_layers(view, header["targets"])
        whole = _in_full(view, header)
        weights = {k: v for key, f in factors.items() for k, v in _factors_out(view, key, f)}
    own = {**view.tensors, **tensors}
    weights |= {_PREFIX + key: own[key] for modules in whole.values() for key in modules}
    settings = {**_settings(header, factors), "modules_to_save": sorted(whole) or None}
    plain = {key: value.detach().cpu().clone().contiguous() for key, value in weights.items()}
    atomic_write(folder / WEIGHTS, save(plain, metadata={"format": "pt"}))
    atomic_write(folder / CONFIG, json.dumps(settings, indent=2, sort_keys=True).encode())
    return folder


def _check_layers(view: View, targets: list[dict[str, Any]]) -> None:
    refused = {}
    for t in targets:
        module = find(view.model, t["module"])
        if why := _refusal(module, t["tensor"], t["dora"]):
            refused[join(t["module"], t["tensor"])] = why
    if refused:
        shown = "; ".join(f"{key} ({why})" for key, why in list(refused.items())[:8])
        raise TargetError(
            f"PEFT has no such adapter for {len(refused)} of {len(targets)} adapted tensors: "
            f"{shown}. Export as timm, onnx or torch-export, or train with target_modules that "
            "leave these out"
        )


def _refusal(module: nn.Module, tensor: str, dora: bool) -> str | None:
    """Why PEFT has no such adapter on this layer; None where it has."""
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


def _in_full(view: View, header: dict[str, Any]) -> dict[str, list[str]]:
    """Module → names of all its tensors, of those that PEFT must keep whole."""
    adapted = [f"{t['module']}." for t in header["targets"]]
    found = {}
    for key in [*header["extras"], *header["buffers"]]:
        module = key.rpartition(".")[0]
        if not module or any(path.startswith(f"{module}.") for path in adapted):
            raise TargetError(
                f"PEFT keeps whole modules beside its factors (modules_to_save), and {key} lies "
                "in one that has adapted layers: train with a `trainable` that leaves it out"
            )
        found[module] = [n for n in view.tensors if n.startswith(f"{module}.")]
    return found


def _factors_out(view: View, key: str, factors: Factors) -> list[tuple[str, Tensor]]:
    """Names and values in PEFT's file."""
    path = key.rpartition(".")[0]
    module, name = find(view.model, path), f"{_PREFIX}{path}.lora_"
    lora_B, lora_A = factors.low_rank()
    if isinstance(module, nn.Embedding):
        return [(f"{name}embedding_A", lora_B.T), (f"{name}embedding_B", lora_A.T)]
    shape = raw_tensor(module, "weight").shape
    ones = [1] * (len(shape) - 2)
    found = [
        (f"{name}A.weight", lora_A.reshape(-1, *shape[1:])),
        (f"{name}B.weight", lora_B.reshape(*lora_B.shape, *ones)),
    ]
    if factors.magnitude is not None:
        size = [1, -1, *ones] if ones else [-1]
        found.append((f"{name}magnitude_vector", factors.magnitude.reshape(size)))
    return found


def _settings(header: dict[str, Any], factors: Mapping[str, Factors]) -> dict[str, Any]:
    """PEFT's configuration: each layer by its whole name, with its own rank and alpha."""
    places = {key.rpartition(".")[0]: f for key, f in factors.items()}
    ranks = {place: f.low_rank()[1].shape[0] for place, f in places.items()}
    alphas = {place: f.spec.scaling * ranks[place] for place, f in places.items()}
    (rank, _), *_ = Counter(ranks.values()).most_common()
    (alpha, _), *_ = Counter(alphas.values()).most_common()
    spec = next(iter(places.values())).spec
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": spec.dropout,
        "use_dora": spec.dora,
        "bias": "none",
        # As one expression, which PEFT matches as a whole; "^": not the end of another name.
        "target_modules": "|".join(map(re.escape, places)),
        "rank_pattern": {f"^{re.escape(p)}": r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(p)}": a for p, a in alphas.items() if a != alpha},
    }


# ---- reading ---------------------------------------------------------------------------------


def read_peft(view: View, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of PEFT's folder, as `read` gives them of an adapter file.

    Raises:
        AdapterFileError: it is damaged, or holds what this package computes otherwise.
    """
    settings = _read_settings(folder / CONFIG)
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise AdapterFileError(
            f"{folder} holds a pickle, adapter_model.bin, which can run code and was not opened: "
            "write it anew by PEFT's save_pretrained(..., safe_serialization=True)"
        )
    given = contents(folder / WEIGHTS)[1]
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, value in given.items():
        key = key.removeprefix(_PREFIX)
        if found := _FACTOR.fullmatch(key):
            module = _module(view, found[1], settings, folder)
            tensors |= _factor_in(module, f"{found[1]}.weight", found[2], value, key)
        else:
            rest[key.replace(".base_layer.", ".")] = value
    extras = [key for key in rest if key in view.parameters]
    places = dict.fromkeys(key.rpartition(".weight.")[0] for key in tensors)
    header = {
        "format_version": FORMAT_VERSION,
        "name": "default",
        "base": fingerprint(view, extras) | statistics(view, set(rest) - set(extras)),
        "config": _config(settings, list(places), extras),
        "targets": [_target(view, path, settings, tensors, folder) for path in places],
        "extras": extras,
        "buffers": [key for key in rest if key not in view.parameters],
    }
    check_header(header, folder)
    return header, {**tensors, **rest}


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}") from error
    settings = {k: v for k, v in settings.items() if v is not None} if settings else {}
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


def _module(view: View, path: str, settings: dict[str, Any], folder: Path) -> nn.Module:
    """The adapted layer."""
    try:
        module = find(view.model, path)
    except (AttributeError, KeyError) as error:
        raise AdapterFileError(f"{folder} adapts {path}, which this model has not") from error
    known = layers.tensors_of(module) and isinstance(getattr(module, "weight", None), Tensor)
    why = "it is no layer that is adapted here"
    if known:
        why = _refusal(module, "weight", settings.get("use_dora", False)) or ""
    if why:
        raise AdapterFileError(f"{folder} adapts {path}, which PEFT computes otherwise: {why}")
    return module


def _factor_in(
    module: nn.Module, key: str, which: str | None, value: Tensor, name: str
) -> dict[str, Tensor]:
    """A factor by the name and in the shape of this package."""
    if which is None:
        return {f"{key}.magnitude": value.reshape(-1)}
    if isinstance(module, nn.Embedding):
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
    view: View, path: str, settings: dict[str, Any], tensors: dict[str, Tensor], folder: Path
) -> dict[str, Any]:
    module, key = find(view.model, path), f"{path}.weight"
    shape = tuple(raw_tensor(module, "weight").shape)
    if f"{key}.lora_A" not in tensors or f"{key}.lora_B" not in tensors:
        raise AdapterFileError(f"{folder} is not whole: a factor of {path} is missing")
    rank = len(tensors[f"{key}.lora_A"])
    alpha = _alpha(path, settings, folder)
    return {
        "module": path,
        "tensor": "weight",
        "kind": layers.base_class(module).__name__,
        "path": "factorised",
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
