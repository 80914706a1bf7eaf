"""Adapter files changed from outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lora_lightning.model.adapter_file.format import checksum

Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]


def rewrite(path: Path, change: Change, sign: bool = True, key: str = "lora_lightning") -> None:
    """The same file with its tensors and header changed by `change(tensors, header)`.

    With `sign` it has the checksum of its new contents, as if it had been written so.
    """
    with safe_open(str(path), framework="pt") as file:
        tensors = {k: file.get_tensor(k) for k in list(file.keys())}
        header = json.loads(file.metadata()[key])
    change(tensors, header)
    if sign and "checksum" in header:
        header["checksum"] = checksum(header, tensors)
    save_file(tensors, str(path), metadata={key: json.dumps(header)})
