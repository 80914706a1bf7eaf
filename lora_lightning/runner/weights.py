"""Weights of a source model, from a local file."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from lora_lightning.errors import ConfigError


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
