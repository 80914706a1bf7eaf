"""Checks that an adapter file fits a model, all made before the model is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterFileError, BaseMismatchError, ConfigError
from lora_lightning.lora import layers
from lora_lightning.lora.adapted_module import raw_tensor
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.module_tree import find, join
from lora_lightning.lora.spec import matrix_shape
from lora_lightning.lora.values import not_finite
from lora_lightning.lora.xs import Basis, basis_of
from lora_lightning.model.fingerprint import fingerprint
from lora_lightning.model.owned_tensors import source_marks
from lora_lightning.model.view import View

# Before the names in files that were written of a wrapped model, once.
_WRAPPERS = ("_orig_mod.", "module.")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def checked(
    view: View,
    header: dict[str, Any],
    tensors: dict[str, Tensor],
    check: str,
    path: Path,
    known: dict[tuple[str, int], Basis],
) -> tuple[LoRAConfig, dict[str, Basis], dict[str, str]]:
    """Configuration, LoRA-XS's frozen factors and the base's fingerprint of a file that fits.

    `known` keeps those factors by (tensor's path, rank), for a caller with many files.

    Raises:
        AdapterFileError: it does not fit.
        BaseMismatchError: it was made for another base.
    """
    config = _config(header, path)
    base = check_base(view, header, check, path)
    _check_targets(view, header, path)
    _check_tensors(view.tensors, header, tensors, path)
    _check_values(view, header, tensors, path)
    return config, _bases(view.model, header, check, path, known), base


def plain_names(
    view: View, header: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors by the names of an unwrapped model, as files are written today."""
    for wrapper in _WRAPPERS:
        places = [f"{t['module']}." for t in header["targets"]]
        named = [*places, *header["extras"], *header["buffers"]]
        own = wrapper[:-1] in view.model._modules
        if named and not own and all(name.startswith(wrapper) for name in named):
            cut = len(wrapper)
            targets = [{**t, "module": t["module"][cut:]} for t in header["targets"]]
            whole = {key: [n[cut:] for n in header[key]] for key in ("extras", "buffers")}
            header = {**header, **whole, "targets": targets}
            tensors = {name.removeprefix(wrapper): t for name, t in tensors.items()}
    return header, tensors


def check_base(
    model: nn.Module | View, header: dict[str, Any], check: str, path: Path
) -> dict[str, str]:
    """The base's fingerprint, without the tensors that the adapter trains in full.

    Raises:
        BaseMismatchError: the adapter of this header was made for another base.
    """
    view, made_for = View.of(model), header["base"]
    own, kept = source_marks(view, header["extras"], header["buffers"])
    wrapped = (fingerprint(view, header["extras"], w)["structure"] for w in _WRAPPERS)
    if own["structure"] != made_for["structure"] and made_for["structure"] not in wrapped:
        raise BaseMismatchError(
            f"{path} was made for {made_for['architecture']}, and this model is "
            f"{own['architecture']} with other parameters or shapes. Build the base that it was "
            f"trained on{_first_misfit(view.model, header)}"
        )
    if check == "weights" and own.get("weights") != made_for.get("weights"):
        raise BaseMismatchError(
            f"{path} was made for a {made_for['architecture']} with other weights (fingerprint "
            f"{made_for.get('weights')}, this model {own.get('weights')}): load the same base "
            "checkpoint first, or pass check='structure' if you mean it"
        )
    known = made_for.get("statistics")  # older files have none
    if check == "weights" and known is not None and kept.get("statistics") != known:
        raise BaseMismatchError(
            f"{path} was made for a {made_for['architecture']} with other buffers, such as "
            "BatchNorm's running statistics, which one forward in training mode moves: load the "
            "same base checkpoint first, or pass check='structure' if you mean it"
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
    """Require exactly the tensors that the header lists, in shapes that fit the model."""
    expected = _factor_shapes(header)
    for kind in ("extras", "buffers"):
        for key in header[kind]:
            # A parameter among the buffers would be taken for the base's, and stay.
            own = kind == "extras"
            if key not in live or isinstance(live[key], nn.Parameter) is not own:
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


def _check_values(
    view: View, header: dict[str, Any], tensors: dict[str, Tensor], path: Path
) -> None:
    """Require types that the model's own can take, and numbers that are finite in them."""
    places = {join(t["module"], t["tensor"]): t["module"] for t in header["targets"]}
    taken = {}
    for key, tensor in tensors.items():
        owner = key.rpartition(".")[0]
        live = view.tensors.get(key)
        if live is None:
            live = raw_tensor(find(view.model, places[owner]), owner.rpartition(".")[2])
        floats = live.is_floating_point() and tensor.dtype in _FLOATS
        if tensor.dtype != live.dtype and not floats:
            raise AdapterFileError(
                f"{path}: {key} holds numbers of type {tensor.dtype}, and here {live.dtype}"
            )
        taken[key] = tensor.to(live.dtype) if floats else tensor
    if bad := not_finite(taken):
        raise AdapterFileError(
            f"{path}: {bad[0]} holds NaN or infinity, as {len(bad)} of its {len(tensors)} tensors "
            f"do in this model's precision ({taken[bad[0]].dtype}); train it again, with a lower "
            "learning rate"
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


def _check_targets(view: View, header: dict[str, Any], path: Path) -> None:
    """Require that each target is a tensor of this model, in the header's matrix form."""
    base = {id(module) for _, module in view.modules}  # without factors
    for t in header["targets"]:
        try:
            module = find(view.model, t["module"])
            raw = raw_tensor(module, t["tensor"])
            shape = tuple(raw.shape) if id(module) in base else ()
        except (AttributeError, KeyError):
            shape = ()
        bare = bool(shape) and t["matrix"][0] != shape[0]
        why = layers.refusal(module, t["tensor"], raw) if shape else None
        if why is not None:
            raise AdapterFileError(f"{path}: {t['module']}.{t['tensor']} takes no adapter: {why}")
        if t.get("xs") and t["rank"] > min(t["matrix"]):
            raise AdapterFileError(
                f"{path}: a core of rank {t['rank']} (LoRA-XS) needs a matrix of that rank, and "
                f"{t['module']}.{t['tensor']} is {t['matrix']}"
            )
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
    """LoRA-XS's frozen factors, computed from this base."""
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
