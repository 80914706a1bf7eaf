"""Files of source models: weights alone, or weights with the model's hyperparameters."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterFileError, ConfigError
from lora_lightning.lora.values import not_finite
from lora_lightning.model.adapter_file.container import contents
from lora_lightning.model.adapter_file.data_config import DATA, data_config
from lora_lightning.model.adapter_file.format import checksum, parsed, verify
from lora_lightning.model.adapter_file.schema import Kind, check, one_of
from lora_lightning.report.files import atomic_write

Made = TypeVar("Made", bound=nn.Module)
_DATA = "data"  # key in the header of `save_weights`
FORMAT = 1  # of the files of `save_built`


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file, and what it says about their training."""

    weights: dict[str, Tensor]  # A state dict without the prefixes of DDP and of torch.compile
    # Arguments of the training, as timm's scripts write them: ``"model"``, ``"img_size"``,
    # ``"mean"`` …; empty where the file has none
    settings: Mapping[str, Any] = field(default_factory=dict)
    # Of files that `save_weights` wrote: class names, and how pictures are prepared, see
    # `lora_lightning.model.adapter_file.data_config`
    data: Mapping[str, Any] = field(default_factory=dict)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, see `read_checkpoint`."""
    return read_checkpoint(path).weights


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a state dict, or a training checkpoint of timm or Lightning; runs no code that it holds.

    Averaged weights are preferred where there are any, as ``timm.models.load_state_dict`` does.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise ConfigError(f"model.checkpoint: there is no file {path}")
    found, data = _loaded(path)
    if not isinstance(found, dict):
        raise ConfigError(f"model.checkpoint: {path} holds no state dict of tensors")
    given = found.get("args")
    settings = vars(given) if isinstance(given, argparse.Namespace) else {}
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(found.get(key), dict):
            found = found[key]
    found = {key: value for key, value in found.items() if key != "n_averaged"}  # of AveragedModel
    if odd := [str(key) for key, value in found.items() if not isinstance(value, Tensor)]:
        raise ConfigError(
            f"model.checkpoint: {path} holds more than tensors ({', '.join(odd[:4])}), and no "
            "state dict under 'state_dict' or 'model'"
        )
    return Checkpoint({_plain(key): value for key, value in found.items()}, settings, data)


def _plain(key: str) -> str:
    return key.replace("_orig_mod.", "").removeprefix("module.")


def _loaded(path: Path) -> tuple[Any, dict[str, Any]]:
    """What a file holds, and the data in its header."""
    try:
        if path.suffix == ".safetensors":
            metadata, weights = contents(path)
            data = parsed(metadata, _DATA, path) or {}
            check(DATA, data, "the header", path)
            return weights, data
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except AdapterFileError as error:
        raise ConfigError(f"model.checkpoint: {error}") from error
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"model.checkpoint: {path} {_unread(path)}") from error


def _harmless() -> list[Any]:
    """What training checkpoints hold beside tensors, and what runs no code when it is read."""
    from lightning.fabric.utilities.data import AttributeDict

    numbers: list[Any] = [np.float64(0), np.float32(0), np.int64(0)]
    types = [type(n.dtype) for n in numbers]
    own = type(Path())  # which newer versions of Python define elsewhere
    paths = [own, (own, f"pathlib.{own.__name__}"), PurePosixPath]
    return [argparse.Namespace, AttributeDict, *paths, np.dtype, numbers[0].__reduce__()[0], *types]


def _unread(path: Path) -> str:
    try:
        with torch.serialization.safe_globals(_harmless()):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # whatever a damaged file makes of it
        unsafe = []
    if unsafe:
        return (
            f"holds more than tensors ({', '.join(sorted(unsafe)[:4])}), which could be read only "
            "by running its code. If you trust it, write its weights alone: torch.save(torch.load("
            "path, weights_only=False)['state_dict'], 'weights.pth')"
        )
    return (
        "is damaged; expected a state dict as torch.save(model.state_dict(), path) or safetensors "
        "write it, or a training checkpoint of timm or Lightning"
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict as safetensors takes it: contiguous, no two tensors in one memory."""
    return {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}


def save_weights(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Write a model's weights to safetensors; returns them.

    The header says what a timm model's ``pretrained_cfg`` does of classes and pictures.
    """
    from safetensors.torch import save

    weights, data = weights_of(model), data_config(model)
    atomic_write(path, save(weights, {_DATA: json.dumps(data)} if data else None))
    return weights


def save_built(path: Path | str, kind: str, weights: dict[str, Tensor], **built: Any) -> None:
    """Write weights to safetensors, with the model's hyperparameters in the header.

    Args:
        path: Of the file; its folder is created if missing.
        kind: "recogniser" or "translator".
        weights: A state dict of tensors that share no memory.
        built: Hyperparameters, returned by `load_built`, as JSON.
    """
    from safetensors.torch import save

    header = {"format": FORMAT, **built}
    header["checksum"] = checksum(header, weights)
    atomic_write(Path(path), save(weights, metadata={kind: json.dumps(header)}))


def load_built(path: Path, kind: str, schema: Kind) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model's hyperparameters, and its weights, from a file of `save_built`.

    `schema` is that of the hyperparameters.

    Raises:
        ConfigError: it is damaged, or holds something else.
    """
    try:
        metadata, weights = contents(path)
        built = parsed(metadata, kind, path) or {}
        if not one_of(FORMAT).fits(built.get("format")):
            raise ConfigError(
                f"{path} was not written by save_{kind} of this version; it must say how the "
                "model is built, not only its weights"
            )
        check(schema, built, "the header", path)
        verify(built, weights, path)
    except AdapterFileError as error:
        raise ConfigError(str(error)) from error
    if bad := not_finite(weights):
        raise ConfigError(f"{path}: {bad[0]} holds NaN or infinity; train the model again")
    return built, weights


def build(
    path: Path,
    make: Callable[[], Made],
    shapes: Mapping[str, tuple[int, ...]],
    weights: dict[str, Tensor],
) -> Made:
    """A model in eval mode with the weights of a file.

    Args:
        path: Of the file, for messages.
        make: Builds the model.
        shapes: Of some weights that its hyperparameters ask for, to be compared first: a few
            bytes could ask for any amount of memory.
        weights: A whole state dict.

    Raises:
        ConfigError: hyperparameters and weights are not those of one model.
    """
    for key, shape in shapes.items():
        found = tuple(weights[key].shape) if key in weights else "missing"
        if found != shape:
            raise ConfigError(
                f"{path}: {key} is {found}, and its settings ask for {shape}; write it again"
            )
    try:
        model = make()
        own = model.state_dict()
        odd = [k for k, w in weights.items() if k in own and _kind(w) != _kind(own[k])]
        if odd:
            raise ConfigError(f"{odd[0]} holds numbers of type {weights[odd[0]].dtype}")
        model.load_state_dict(weights, strict=True)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{path} holds no model that can be built: {error}") from error
    return model.eval()


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()
