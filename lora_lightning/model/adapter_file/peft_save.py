"""`save_peft`: an adapter as a folder of PEFT's."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_lightning.errors import TargetError
from lora_lightning.lora.adapted_module import raw_tensor
from lora_lightning.lora.factors import Factors
from lora_lightning.lora.module_tree import find, join
from lora_lightning.model import lending, switching
from lora_lightning.model import state as states
from lora_lightning.model.adapter_file.peft_format import CONFIG, OUTPUT, PREFIX, WEIGHTS, refusal
from lora_lightning.model.adapter_file.save import checked_contents
from lora_lightning.model.view import View
from lora_lightning.report.files import atomic_write


class _Product(NamedTuple):
    """s·BA of a layer, B (O, r), A (r, I); DoRA's magnitudes."""

    B: Tensor
    A: Tensor
    scaling: float
    magnitude: Tensor | None = None


def save_peft(model: nn.Module, folder: Path, name: str | None = None) -> Path:
    """Write the adapter `name` (default: the active one) as PEFT does.

    Raises:
        AdapterNotFoundError: there is no such adapter.
        TargetError: PEFT has no such adapter for some layers, which are named.
    """
    from safetensors.torch import save

    view = View(model)
    lending.check_home(view, "export")
    root, state, name = states.holder(view, name, "to export")
    with switching.unmerged(root):
        view = View(root)
        tensors, header = checked_contents(view, state, name, folder)
        _check_layers(view, header["targets"])
        whole = _in_full(view, header)
        products = _products(view, states.named_factors(view, name))
        weights = {k: v for at, p in products.items() for k, v in _named(view, at, p)}
    own = {**view.tensors, **tensors}
    weights |= {PREFIX + key: own[key] for modules in whole.values() for key in modules}
    settings = _settings(header["targets"][0], products)
    settings["modules_to_save"] = sorted(whole) or None
    plain = {key: value.detach().cpu().clone().contiguous() for key, value in weights.items()}
    atomic_write(folder / WEIGHTS, save(plain, metadata={"format": "pt"}))
    atomic_write(folder / CONFIG, json.dumps(settings, indent=2, sort_keys=True))
    return folder


def _check_layers(view: View, targets: list[dict[str, Any]]) -> None:
    refused = {}
    for t in targets:
        if why := refusal(view, t["module"], t["tensor"], t["dora"]):
            refused[join(t["module"], t["tensor"])] = why
    if refused or not targets:
        shown = "; ".join(f"{key} ({why})" for key, why in list(refused.items())[:8])
        raise TargetError(
            f"PEFT has no such adapter for {len(refused)} of {len(targets)} adapted tensors: "
            f"{shown or 'there are none'}. Export as timm, onnx or torch-export, or train with "
            "target_modules that leave these out"
        )


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


def _products(view: View, factors: Mapping[str, Factors]) -> dict[str, _Product]:
    """PEFT's name of a layer → its product."""
    found = {
        key.rpartition(".")[0]: _Product(*f.low_rank(), f.spec.scaling, f.magnitude)
        for key, f in factors.items()
    }
    for path, (_, A, scaling, _) in list(found.items()):
        if isinstance(find(view.model, path), nn.MultiheadAttention):
            rank, width = A.shape
            nothing = _Product(A.new_zeros(width, rank), A.new_zeros(rank, width), scaling)
            found[path + OUTPUT] = nothing
    return found


def _named(view: View, place: str, product: _Product) -> list[tuple[str, Tensor]]:
    """Names and values in PEFT's file."""
    module = find(view.model, place.replace(".base_layer.", "."))
    B, A, _, magnitude = product
    name = f"{PREFIX}{place}.lora_"
    if isinstance(module, nn.Embedding):
        return [(f"{name}embedding_A", B.T), (f"{name}embedding_B", A.T)]
    ones: list[int] = []
    if isinstance(module, nn.modules.conv._ConvNd):
        kernel = raw_tensor(module, "weight").shape[1:]
        A, ones = A.reshape(-1, *kernel), [1] * (len(kernel) - 1)
    found = [(f"{name}A.weight", A), (f"{name}B.weight", B.reshape(*B.shape, *ones))]
    if magnitude is not None:
        size = [1, -1, *ones] if ones else [-1]
        found.append((f"{name}magnitude_vector", magnitude.reshape(size)))
    return found


def _settings(target: dict[str, Any], products: Mapping[str, _Product]) -> dict[str, Any]:
    """PEFT's configuration: each layer by its whole name, with its own rank and alpha."""
    places = {at: p for at, p in products.items() if not at.endswith(OUTPUT)}
    ranks = {at: len(p.A) for at, p in places.items()}
    alphas = {at: p.scaling * len(p.A) for at, p in places.items()}
    (rank, _), *_ = Counter(ranks.values()).most_common()
    (alpha, _), *_ = Counter(alphas.values()).most_common()
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        # That of an attention would have to be none, and it acts in training alone.
        "lora_dropout": target["dropout"] if len(places) == len(products) else 0.0,
        "use_dora": target["dora"],
        "bias": "none",
        # As one expression, which PEFT matches as a whole; "^": not the end of another name.
        "target_modules": "|".join(map(re.escape, places)),
        "rank_pattern": {f"^{re.escape(p)}": r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(p)}": a for p, a in alphas.items() if a != alpha},
    }
