"""Reading an adapter file as a `Part` for each tensor that it changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.bank.mix import Part
from lora_lightning.errors import AdapterFileError
from lora_lightning.lora import parametrizations
from lora_lightning.lora.adapted_module import located, raw_tensor
from lora_lightning.lora.factors import TENSORS
from lora_lightning.lora.module_tree import join
from lora_lightning.lora.precision import factor_dtype
from lora_lightning.lora.xs import Basis
from lora_lightning.model.adapter_file.checks import checked, plain_names
from lora_lightning.model.adapter_file.format import read
from lora_lightning.model.view import View


@torch.no_grad()
def parts_of(
    view: View, path: Path, check: str, known: dict[tuple[str, int], Basis]
) -> tuple[dict[str, Part], dict[str, Any]]:
    """Tensor's path → the `Part` of this file's adapter; and the data in its header.

    Arguments as for `checked`.

    Raises:
        AdapterFileError: it is damaged, does not fit, or holds NaN.
        BaseMismatchError: it was made for another base.
    """
    header, tensors = plain_names(view, *read(path))
    model = view.model
    _, bases, _ = checked(view, header, tensors, check, path, known)
    own = _owned(view, header, tensors, path)
    whole = {id(value): Part(full=value) for value in own.values()}
    parts = {key: whole[id(value)] for key, value in own.items()}
    targets = {join(t["module"], t["tensor"]): t for t in header["targets"]}
    computed = {c for key in own if (c := _computed(model, key)) is not None}
    # Tensors that the adapter owns, or computed from these: its factors act on its own values.
    moved = computed | (targets.keys() & own.keys())
    for key in targets.keys() - moved:
        raw = raw_tensor(*located(model, key))
        parts[key] = _folded(targets[key], key, tensors, bases.get(key), raw)
    if moved:
        with _in_place(model, own, computed):
            for key in moved:
                raw = raw_tensor(*located(model, key))
                part = Part(full=raw.detach().clone())
                if key in targets:
                    part = _folded(targets[key], key, tensors, bases.get(key), raw)
                parts[key] = Part(full=part.value(raw))
    found = {key: part for key, part in parts.items() if _computed(model, key) is None}
    return found, header.get("data", {})


def _owned(
    view: View, header: dict[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """The tensors that the adapter replaces in full, under each of their names."""
    names: dict[int, list[str]] = {}
    for name, tensor in view.tensors.items():
        names.setdefault(id(tensor), []).append(name)
    found: dict[str, Tensor] = {}
    for key in [*header["extras"], *header["buffers"]]:
        if tensors[key].is_floating_point():
            value = _like(tensors[key], located(view.model, key))
            found |= dict.fromkeys(names[id(view.tensors[key])], value)
        elif not key.endswith("num_batches_tracked"):  # a counter, not used in forward
            raise AdapterFileError(f"{path} holds {key} of dtype {tensors[key].dtype}")
    return found


def _computed(model: nn.Module, key: str) -> str | None:
    """The tensor that a layer computes from this one (weight norm); ``None``: it reads this one."""
    owner, inside, rest = f".{key}".rpartition(".parametrizations.")
    if inside:
        return join(owner[1:], rest.split(".")[0])
    stem, _, end = key.rpartition("_")
    if end not in ("g", "v"):
        return None
    module, tensor = located(model, stem)
    return stem if tensor in module.__dict__ and tensor not in module._parameters else None


@contextmanager
def _in_place(model: nn.Module, own: Mapping[str, Tensor], computed: set[str]) -> Iterator[None]:
    """Within the block the model has these values, and those computed from them."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for key, value in own.items():
            module, name = located(model, key)
            where = module._buffers if name in module._buffers else module._parameters
            kept.append((where, name, where[name]))
            where[name] = value
        _recompute(model, computed)
        yield
    finally:
        for where, name, value in reversed(kept):
            where[name] = value
        _recompute(model, computed)


def _recompute(model: nn.Module, computed: set[str]) -> None:
    for key in computed:
        parametrizations.recompute(*located(model, key))


def _folded(
    target: dict[str, Any], key: str, tensors: dict[str, Tensor], basis: Basis | None, raw: Tensor
) -> Part:
    """Factors of any kind as one pair, with the scaling, a core or initial factors folded in."""
    like: Any = {"device": raw.device, "dtype": factor_dtype(raw)}
    own = {k: t.to(**like) for k in TENSORS if (t := tensors.get(f"{key}.{k}")) is not None}
    if basis is not None:
        lora_B, lora_A = basis.lora_B @ own["core"].to(basis.lora_B), basis.lora_A
    else:
        lora_B, lora_A = own["lora_B"], own["lora_A"]
    if target.get("offset"):
        lora_B = torch.cat([lora_B, -own["start_B"]], dim=1)
        lora_A = torch.cat([lora_A, own["start_A"]])
    lora_B = target["scaling"] * lora_B
    scale = None
    if target["dora"]:
        norm = torch.linalg.vector_norm(raw.reshape(len(lora_B), -1) + lora_B @ lora_A, dim=1)
        scale = (own["magnitude"] / norm.clamp_min(torch.finfo(norm.dtype).tiny)).to(raw.dtype)
    return Part(lora_A.to(raw.dtype, copy=True), lora_B.to(raw.dtype), scale)


def _like(tensor: Tensor, place: tuple[Any, str]) -> Tensor:
    module, name = place
    live = module._buffers[name] if name in module._buffers else raw_tensor(module, name)
    return tensor.to(live, copy=True)
