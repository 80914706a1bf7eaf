"""Putting an adapter file on a model: every check first, then the model is touched."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import (
    AdapterExistsError,
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
)
from lora_lightning.lora import layers
from lora_lightning.lora.adapted_module import adapt, raw_tensor
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.factors import FactorSpec, matrix_shape
from lora_lightning.lora.module_tree import Modules, find, join
from lora_lightning.lora.xs import Basis, basis_of
from lora_lightning.model import eval_caches, injection, switching
from lora_lightning.model import state as states
from lora_lightning.model.adapter_file.format import read
from lora_lightning.model.fingerprint import fingerprint
from lora_lightning.model.injection_report import InjectionReport, Row
from lora_lightning.model.state import ModelState


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
        path: A file that `save_adapter` wrote.
        name: Name to give it; default: the one in the file.
        check: ``"weights"``: the base must have the weights that the adapter was trained on
            (a sample of each tensor is compared); ``"structure"``: names and shapes only.
        overwrite: Replace an adapter of that name. Factors of the same sizes on the same layers
            take the file's values and stay the parameters that they are.

    Raises:
        AdapterFileError: the file is missing, damaged, no adapter, or does not fit.
        BaseMismatchError: it was made for another base.
        AdapterExistsError: the name is taken and `overwrite` is off.

    Whatever is raised, the model is as it was.
    """
    if check not in ("weights", "structure"):
        raise ConfigError(f"check must be 'weights' or 'structure', got {check!r}")
    header, tensors = read(Path(path))
    name = name or str(header["name"])
    modules = states.base_modules(model)  # the same objects until the end, as the tensors are
    state = injection.check_free(model, name, modules)
    if name in state.configs and not overwrite:
        raise AdapterExistsError(
            f"adapter {name!r} exists: pass another name, or overwrite=True to replace it"
        )
    live = states.base_tensors(model, modules)
    config, bases, base = checked(model, header, tensors, check, Path(path), live)
    if name in state.configs:
        _make_way(model, state, name, header, modules, live)
    rows = _put(model, name, header, tensors, config, bases)
    extras = {n: live[n].numel() for n in header["extras"]}
    report = InjectionReport(name, rows, extras, injection.count_parameters(live))
    state = states.state_of(model) or ModelState()
    state.cachers = eval_caches.cachers(modules)
    state.packers += eval_caches.keep_padded(modules)
    injection.register(model, state, name, config, report, state.frozen, live, base)
    state.parked[name] = {n: tensors[n].clone() for n in [*extras, *header["buffers"]]}
    switching.switch(model, state, name, live, states.adapted_layers(model, modules).values())
    return report


def _make_way(
    model: nn.Module,
    state: ModelState,
    name: str,
    header: dict[str, Any],
    modules: Modules,
    live: dict[str, Tensor],
) -> None:
    """Take the adapter off that is to be replaced; where the file's has the same tensors, its
    factors stay on to take the values (see `adapt`), so that no module is made or removed."""
    adapted = states.adapted_layers(model, modules)
    there = {join(path, t) for path, layer in adapted.items() for t in layer.factors_of(name)}
    within = [m for _, m in modules if states.state_of(m) is not None]
    if within == [model] and there == {join(t["module"], t["tensor"]) for t in header["targets"]}:
        switching.vacate(model, state, name, live, adapted.values())
    else:
        switching.remove(model, name)


def checked(
    model: nn.Module,
    header: dict[str, Any],
    tensors: dict[str, Tensor],
    check: str,
    path: Path,
    live: dict[str, Tensor],
    known: dict[tuple[str, int], Basis] | None = None,
) -> tuple[LoRAConfig, dict[str, Basis], dict[str, str]]:
    """Of a file that fits this model: configuration, LoRA-XS's frozen factors, the base's print.

    `live` is `base_tensors`; `known` keeps those factors by (tensor's path, rank) for a caller with
    many files.

    Raises:
        AdapterFileError: it does not fit.
        BaseMismatchError: it was made for another base.
    """
    config = _config(header, path)
    base = check_base(model, header, check, path, live)
    _check_targets(model, header, path)
    _check_tensors(live, header, tensors, path)
    return config, _bases(model, header, check, path, {} if known is None else known), base


def check_base(
    model: nn.Module,
    header: dict[str, Any],
    check: str,
    path: Path,
    live: dict[str, Tensor] | None = None,
) -> dict[str, str]:
    """The base's fingerprint; `live` is `base_tensors`, for a caller who has them already.

    Raises:
        BaseMismatchError: the adapter of this header was made for another base.
    """
    made_for, state = header["base"], states.state_of(model)
    live = states.base_tensors(model) if live is None else live
    with switching.source_values(model, state, live) if state else nullcontext():
        own = fingerprint(model, header["extras"], live)
    if own["structure"] != made_for["structure"]:
        raise BaseMismatchError(
            f"{path} was made for {made_for['architecture']}, and this model is "
            f"{own['architecture']} with other parameters or shapes. Build the base that it was "
            f"trained on{_first_misfit(model, header)}"
        )
    if check == "weights" and own.get("weights") != made_for.get("weights"):
        raise BaseMismatchError(
            f"{path} was made for a {made_for['architecture']} with other weights (fingerprint "
            f"{made_for.get('weights')}, this model {own.get('weights')}): load the same base "
            "checkpoint first, or pass check='structure' if you mean it"
        )
    return own


def _first_misfit(model: nn.Module, header: dict[str, Any]) -> str:
    for target in header["targets"]:
        place = join(target["module"], target["tensor"])
        try:
            raw = raw_tensor(find(model, target["module"]), target["tensor"])
        except (AttributeError, KeyError):
            return f" (here is no {place})"
        if list(raw.shape) != target["shape"]:
            return f" ({place} is {tuple(raw.shape)} here, {tuple(target['shape'])} there)"
    return ""


def _check_tensors(
    live: dict[str, Tensor], header: dict[str, Any], tensors: dict[str, Tensor], path: Path
) -> None:
    """Exactly the tensors that the header promises, in shapes that fit the model."""
    expected = _factor_shapes(header)
    for key in [*header["extras"], *header["buffers"]]:
        if key not in live:
            raise AdapterFileError(f"{path} holds {key}, for which this model has no place")
        expected[key] = tuple(live[key].shape)
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or extra:
        raise AdapterFileError(
            f"{path} is not whole: missing tensors {missing[:5]}, unexpected tensors {extra[:5]}; "
            "write it again with save_adapter"
        )
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != shape:
            hint = "; build the model with the same number of classes" if key in live else ""
            raise AdapterFileError(
                f"{path}: {key} has shape {tuple(tensors[key].shape)}, expected {shape}{hint}"
            )


def _factor_shapes(header: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for t in header["targets"]:
        rows, columns = t["matrix"]
        key = join(t["module"], t["tensor"])
        if t.get("xs"):
            shapes[f"{key}.core"] = (t["rank"], t["rank"])
        else:
            shapes |= {f"{key}.lora_A": (t["rank"], columns), f"{key}.lora_B": (rows, t["rank"])}
        if t.get("offset"):
            shapes |= {f"{key}.start_A": (t["rank"], columns), f"{key}.start_B": (rows, t["rank"])}
        if t["dora"]:
            shapes[f"{key}.magnitude"] = (rows,)
    return shapes


def _config(header: dict[str, Any], path: Path) -> LoRAConfig:
    try:
        return LoRAConfig.make(header["config"])
    except ConfigError as error:
        raise AdapterFileError(f"{path}: the header's configuration is wrong: {error}") from error


def _check_targets(model: nn.Module, header: dict[str, Any], path: Path) -> None:
    """Each target must be a tensor of this model, seen as the header says."""
    for t in header["targets"]:
        try:
            raw = raw_tensor(find(model, t["module"]), t["tensor"])
            shape = tuple(raw.shape)
        except (AttributeError, KeyError):
            shape = ()
        bare = bool(shape) and t["matrix"][0] != shape[0]
        why = layers.refusal(find(model, t["module"]), t["tensor"], raw) if shape else None
        if why is not None:
            raise AdapterFileError(f"{path}: {t['module']}.{t['tensor']} takes no adapter: {why}")
        if not shape or list(shape) != t["shape"] or [*matrix_shape(shape, bare)] != t["matrix"]:
            raise AdapterFileError(
                f"{path}: {t['module']}.{t['tensor']} is {shape or 'missing'} in this model, and "
                f"{t['shape']}, seen as {t['matrix']}, in the file's header"
            )


def _bases(
    model: nn.Module,
    header: dict[str, Any],
    check: str,
    path: Path,
    known: dict[tuple[str, int], Basis],
) -> dict[str, Basis]:
    """LoRA-XS's frozen factors from this base: those that the cores were trained between."""
    found, other = {}, []
    for t in header["targets"]:
        if not t.get("xs"):
            continue
        module, key = find(model, t["module"]), join(t["module"], t["tensor"])
        bare = t["matrix"][0] != t["shape"][0]
        if (key, t["rank"]) not in known:
            raw = raw_tensor(module, t["tensor"])
            known[key, t["rank"]] = basis_of(module, t["tensor"], raw, t["rank"], bare)
        found[key] = known[key, t["rank"]]
        if not found[key].is_as(t.get("basis")):
            other.append(key)
    if other and check == "weights":
        raise BaseMismatchError(
            f"{path} holds cores alone (LoRA-XS), and for {len(other)} of {len(found)} of them "
            f"({other[0]} …) this base's singular vectors are not those of the training: was one "
            "of the bases in another precision, or does a weight have equal singular values? Load "
            "it where it was trained and save it whole: compress(model, energy=1.0), save_adapter"
        )
    return found


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
