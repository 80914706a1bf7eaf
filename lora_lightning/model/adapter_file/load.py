"""`load_adapter`: all checks first, then the model is changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterExistsError, AdapterFileError
from lora_lightning.lora.adapted_module import adapt
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.module_tree import find, join
from lora_lightning.lora.spec import FactorSpec
from lora_lightning.lora.values import check_choice
from lora_lightning.lora.xs import Basis
from lora_lightning.model import injection, lending, switching
from lora_lightning.model.adapter_file.checks import checked, plain_names
from lora_lightning.model.adapter_file.format import read
from lora_lightning.model.adapter_file.hub import fetched
from lora_lightning.model.adapter_file.peft_format import CONFIG
from lora_lightning.model.adapter_file.peft_load import read_peft
from lora_lightning.model.injection_report import InjectionReport, Row
from lora_lightning.model.owned_tensors import chosen
from lora_lightning.model.state import ModelState, named_factors, state_of, states_in
from lora_lightning.model.undo import all_or_nothing
from lora_lightning.model.view import View
from lora_lightning.model.wrapped_keys import look_through


@lending.one_at_a_time
def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    check: str = "weights",
    overwrite: bool = False,
) -> InjectionReport:
    """Put the adapter in `path` on `model`, in place, and make it the active one.

    Args:
        model: The base that the adapter was made for; other adapters on it stay.
        path: A file that `save_adapter` wrote; a folder that PEFT wrote, which says nothing of the
            base's weights; or ``"hf://user/name"``, either of them on a hub.
        name: Name to give it; default: the one in the file.
        check: ``"weights"``: the base must have the weights that the adapter was trained on
            (a sample of each tensor is compared); ``"structure"``: names and shapes only.
        overwrite: Replace an adapter of that name. Factors of the same sizes on the same layers
            take the file's values and stay the parameters that they are.

    Raises:
        AdapterFileError: the file is missing, damaged, no adapter, or does not fit.
        BaseMismatchError: it was made for another base.
        TargetError: what it trains in full is not found in this model.
        AdapterExistsError: the name is taken and `overwrite` is off.

    Whatever is raised, the model is as it was.
    """
    check_choice("check", check, ("weights", "structure"))
    view = View(model)
    path = fetched(path)
    header, tensors = plain_names(view, *_read(view, path))
    name = name or str(header["name"])
    look_through(model)
    state = injection.check_free(view, name)
    view.check_whole("load_adapter", "load the file before fully_shard")
    if name in state.configs and not overwrite:
        raise AdapterExistsError(
            f"adapter {name!r} exists: pass another name, or overwrite=True to replace it"
        )
    with all_or_nothing(view, name):
        config, bases, base = checked(view, header, tensors, check, path, {})
        _check_trainable(view, state, header, config, path)
        if name in state.configs:
            _make_way(view, state, name, header)
            state = state_of(model) or ModelState()
        rows = _put(model, name, header, tensors, config, bases)
        report = injection.report_of(view, name, rows, header["extras"])
        injection.register(view, state, config, report, state.frozen, base)
        own = [*header["extras"], *header["buffers"]]
        state.parked[name] = {n: tensors[n].clone() for n in own}
        switching.switch(view, state, name)
    return report


def _read(view: View, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of an adapter file, or of PEFT's folder."""
    return read_peft(view, path) if os.path.isfile(path / CONFIG) else read(path)


def _check_trainable(
    view: View, state: ModelState, header: dict[str, Any], config: LoRAConfig, path: Path
) -> None:
    """Require that the file holds what its configuration trains in full, and no more.

    A tensor that is not the adapter's own would stay on the model when another is switched to.
    """
    adapted = {join(t["module"], t["tensor"]) for t in header["targets"]}
    own = {n for n in chosen(view, state, config.trainable) if n not in adapted}
    if own != set(header["extras"]):
        listed = sorted(own ^ set(header["extras"]))
        raise AdapterFileError(
            f"{path}: trainable={config.trainable} means {sorted(own)[:5]} in this model, and the "
            f"file holds other tensors in full (the difference: {listed[:5]}); write it again"
        )


def _make_way(view: View, state: ModelState, name: str, header: dict[str, Any]) -> None:
    """Remove the adapter that is replaced; factors of the same shapes stay, to take the new values.

    So no module is made or removed (see `adapt`).
    """
    there = named_factors(view, name).keys()
    within = [root for root, _ in states_in(view)]
    targets = {join(t["module"], t["tensor"]) for t in header["targets"]}
    if within == [view.model] and there == targets:
        switching.vacate(view, state, name)
    else:
        switching.remove(view.model, name)


@torch.no_grad()
def _put(
    model: nn.Module,
    name: str,
    header: dict[str, Any],
    tensors: dict[str, Tensor],
    config: LoRAConfig,
    bases: dict[str, Basis],
) -> tuple[Row, ...]:
    values: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        key, _, part = full.rpartition(".")
        values.setdefault(key, {})[part] = tensor
    return tuple(_place(model, name, t, config, values, bases) for t in header["targets"])


def _place(
    model: nn.Module,
    name: str,
    t: dict[str, Any],
    config: LoRAConfig,
    values: dict[str, dict[str, Tensor]],
    bases: dict[str, Basis],
) -> Row:
    tensor, key = t["tensor"], join(t["module"], t["tensor"])
    spec = FactorSpec(
        t["rank"], t["alpha"], t["scaling"], t["dropout"], t["dora"], t["freeze_a"],
        "zero", config.seed or 0, key, bool(t.get("offset")), bool(t.get("xs")),
    )  # fmt: skip
    bare = t["matrix"][0] != t["shape"][0]
    adapt(
        find(model, t["module"]), name, {tensor: spec}, bare,
        {tensor: bases.get(key)}, {tensor: values[key]},
    )  # fmt: skip
    rows, columns = t["matrix"]
    where = (t["module"], tensor, t["kind"], t["path"])
    return Row(*where, spec.rank, spec.alpha, spec.trained(rows, columns), (rows, columns))
