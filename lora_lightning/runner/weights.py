"""Files of source models: weights alone, or weights with the model's hyperparameters."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.report.files import atomic_write

FORMAT = 1  # of the files of `save_built`


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, without running any code that it may hold.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise ConfigError(f"model.checkpoint: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"model.checkpoint: {path} is damaged, or holds more than tensors; expected a state "
            "dict as torch.save(model.state_dict(), path) or safetensors write it"
        ) from error
    except Exception as error:  # safetensors' own error has no public base class
        raise ConfigError(f"model.checkpoint: {path} is no safetensors file: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ConfigError(f"model.checkpoint: {path} holds no state dict of tensors")
    return {key.removeprefix("module."): value for key, value in found.items()}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict as safetensors takes it: contiguous, no two tensors in one memory."""
    return {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}


def save_weights(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Write a model's weights to safetensors; returns them."""
    from safetensors.torch import save

    weights = weights_of(model)
    atomic_write(path, save(weights))
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

    header = {kind: json.dumps({"format": FORMAT, **built})}
    atomic_write(Path(path), save(weights, metadata=header))


def load_built(path: Path, kind: str) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """The model's hyperparameters, and its weights, from a file of `save_built`.

    Raises:
        ConfigError: it is damaged, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            built = json.loads((file.metadata() or {}).get(kind, "null"))
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ConfigError(f"{path} is damaged, or no safetensors file ({error})") from error
    if not isinstance(built, dict) or built.get("format") != FORMAT:
        raise ConfigError(
            f"{path} was not written by save_{kind} of this version; it must say how the model "
            "is built, not only its weights"
        )
    return built, weights
