"""`save_adapter`: safetensors files with a header that describes the adapter and its base.

The file holds the factors (``blocks.0.attn.qkv.weight.lora_A`` …), what the adapter trains in
full and the buffers that it changed, both under the base's own names. The header is JSON: format
version, base (architecture and fingerprint), configuration, targets, versions of the libraries,
and of a timm model its class names and how pictures are prepared for it.
Nothing in it is executed. Writing is atomic; loading checks everything before it changes the
model.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterError
from lora_lightning.lora.adapted_module import raw_tensor
from lora_lightning.lora.factors import Factors
from lora_lightning.lora.module_tree import find, join
from lora_lightning.lora.sharding import reshard, whole, writes
from lora_lightning.lora.values import not_finite
from lora_lightning.lora.xs import XSFactors
from lora_lightning.model import lending, switching
from lora_lightning.model import state as states
from lora_lightning.model.adapter_file.data_config import data_config
from lora_lightning.model.adapter_file.format import (
    FORMAT_VERSION,
    check_header,
    read,
    versions,
    write,
)
from lora_lightning.model.fingerprint import fingerprint, statistics
from lora_lightning.model.injection_report import Row
from lora_lightning.model.owned_tensors import all_extras, extras, owned_names, source_values
from lora_lightning.model.state import ModelState
from lora_lightning.model.view import View


@lending.one_at_a_time
def save_adapter(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write the adapter `name` (default: the active one) of `model` to a safetensors file.

    The write goes to a temporary file beside `path` that then takes its place, so a killed
    write leaves the old file. A merged model is saved as if unmerged. The tensors of a sharded
    model (`fully_shard`) are gathered: every process must call this, and the first one writes.

    Raises:
        AdapterNotFoundError: there is no such adapter.
        AdapterError: inside a block in which the model is another: `disabled`, `AdapterBank`; or
            a tensor holds NaN or infinity, which no file keeps.
    """
    view = View(model)
    lending.check_home(view, "save_adapter")
    reshard(view.modules)
    root, state, name = states.holder(view, name, "to save")
    with switching.unmerged(root):
        tensors, header = checked_contents(View(root), state, name, Path(path))
    return write(Path(path), tensors, header) if writes(view.modules) else Path(path)


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of an adapter file, without its tensors.

    Raises:
        AdapterFileError: the file is missing, damaged, or no adapter.
    """
    return read(Path(path))[0]


def checked_contents(
    view: View, state: ModelState, name: str, path: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file at `path`; the model is not merged.

    Raises:
        AdapterError: a tensor holds NaN or infinity.
    """
    tensors, header = _contents(view, state, name)
    if bad := not_finite(tensors):
        raise AdapterError(
            f"adapter {name!r} holds NaN or infinity ({bad[0]}, {len(bad)} of {len(tensors)} "
            f"tensors): the training has diverged. {path} was not written; lower the learning rate"
        )
    check_header(header, path)
    return tensors, header


def _contents(view: View, state: ModelState, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    factors = states.named_factors(view, name)
    tensors = {f"{p}.{k}": whole(v) for p, f in factors.items() for k, v in f.tensors().items()}
    owned = {n: whole(t) for n, t in _owned(view, state, name).items()}
    full = [n for n in owned if n in view.parameters]
    buffers = [n for n in owned if n not in view.parameters]
    with source_values(view, state):  # another adapter's head is no part of the base
        now = fingerprint(view, all_extras(view, state))
        base = fingerprint(view, full) | statistics(view, buffers)
    if now != state.fingerprint:
        rounded = any(p.dtype == torch.float16 for p in view.parameters.values())
        also = " (or were only rounded to float16: then load it with check='structure')"
        warnings.warn(
            f"the base's weights changed since the adapter was injected{also * rounded}; the file "
            "holds the adapter only, so loading it into the original base will not give this "
            "model. Freeze the base (inject(..., freeze=True)) or list what you train in "
            "`trainable`.",
            stacklevel=5,
        )
    header = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "base": base,
        "config": state.configs[name].to_dict(),
        "targets": [_target(view.model, row, factors) for row in state.reports[name].rows],
        "extras": full,
        "buffers": buffers,
        "versions": versions(),
    }
    if data := data_config(view.model):
        header["data"] = data
    return {**tensors, **owned}, header


def _owned(view: View, state: ModelState, name: str) -> dict[str, Tensor]:
    """Values of the tensors that this adapter trains in full, and of the buffers it changed."""
    if state.active == name:
        return {n: view.tensors[n].detach() for n in owned_names(view, state, name)}
    parked = dict(state.parked.get(name, {}))
    for key in extras(view, state, name):
        parked.setdefault(key, state.source[key][1])
    return parked


def _target(root: nn.Module, row: Row, factors: dict[str, Factors]) -> dict[str, Any]:
    path = join(row.module, row.tensor)
    if path not in factors:
        raise AdapterError(
            f"{path} was adapted, and has been replaced since (a classifier reset?): the adapter "
            "is no longer whole. Remove it and inject again"
        )
    found = factors[path]
    spec = found.spec
    shape = list(raw_tensor(find(root, row.module), row.tensor).shape)
    return {
        "module": row.module,
        "tensor": row.tensor,
        "kind": row.kind,
        "path": row.path,
        "shape": shape,
        "matrix": list(row.shape),
        "rank": spec.rank,
        "alpha": spec.alpha,
        "scaling": spec.scaling,
        "dropout": spec.dropout,
        "dora": spec.dora,
        "freeze_a": spec.freeze_a,
        "offset": spec.offset,
        "xs": spec.xs,
        **({"basis": found.basis.probe()} if isinstance(found, XSFactors) else {}),
    }
