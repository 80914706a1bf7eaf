"""The adapter file format: validated reading, atomic writing."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import AdapterFileError
from lora_lightning.lora.config import LARGEST_ALPHA
from lora_lightning.model.adapter_file.container import LARGEST_HEADER, contents
from lora_lightning.model.adapter_file.data_config import DATA
from lora_lightning.model.adapter_file.schema import (
    FLAG,
    PLAIN,
    SIZE,
    Leaf,
    Listed,
    Record,
    check,
    one_of,
    real,
    text,
    whole,
)
from lora_lightning.report.files import atomic_write
from lora_lightning.report.versions import installed

FORMAT_VERSION = 1
_KEY = "lora_lightning"
_MANY = 20_000  # tensors of a model, at most
_NAMES = Listed(text(), _MANY)
_TARGET = Record(
    {
        "module": text(least=0),
        "tensor": text(),
        "kind": text(),
        "path": text(),
        "shape": Listed(whole(1), 8),
        "matrix": Listed(whole(1, SIZE**2), 2, exactly=True),
        "rank": whole(1),
        "alpha": Leaf("a number above 0", lambda v: real(0, LARGEST_ALPHA).fits(v) and v > 0),
        "scaling": Leaf("a number above 0", lambda v: real(0, LARGEST_ALPHA).fits(v) and v > 0),
        "dropout": Leaf("a number in [0, 1)", lambda v: real(0, 1).fits(v) and v < 1),
        "dora": FLAG,
        "freeze_a": FLAG,
    },
    {"offset": FLAG, "xs": FLAG, "basis": real(-1e6, 1e6)},
)
_SCHEMA = Record(
    {
        "format_version": one_of(FORMAT_VERSION),
        "name": text(),
        "base": Record({"architecture": text(), "structure": text()}, others=text()),
        "config": Record({}, others=PLAIN),  # and by `LoRAConfig`
        "targets": Listed(_TARGET, _MANY),
        "extras": _NAMES,
        "buffers": _NAMES,
    },
    {"versions": Record({}, others=text()), "data": DATA, "checksum": text()},
)


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> Path:
    """Write an adapter file, which replaces `path` atomically.

    Raises:
        AdapterFileError: the header is so long that it could not be read.
    """
    from safetensors.torch import save

    own = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    signed = json.dumps({**header, "checksum": checksum(header, own)})
    data = save(own, metadata={_KEY: signed})  # one key: several come in random order
    if int.from_bytes(data[:8], "little") > LARGEST_HEADER:
        raise AdapterFileError(
            f"{path} was not written: what describes {len(tensors)} tensors is longer than "
            f"{LARGEST_HEADER:,} bytes. Adapt fewer layers, or in two adapters"
        )
    return atomic_write(path, data)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of an adapter file, whole or not at all.

    Raises:
        AdapterFileError: the file is missing, damaged, a pickle, or no adapter.
    """
    metadata, tensors = contents(path)
    header = _parse(metadata, path)
    verify(header, tensors, path)
    return header, tensors


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """A hash of all that a file holds: its header, names, types, shapes and bytes."""
    told = {key: value for key, value in header.items() if key != "checksum"}
    found = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def verify(header: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise `AdapterFileError` where the contents are not those that were written.

    Files of before the checksum have none, and pass.
    """
    if "checksum" in header and header["checksum"] != checksum(header, tensors):
        raise AdapterFileError(
            f"{path} is damaged: its checksum is not that of its contents, which changed after it "
            "was written. Copy it again, or train again"
        )


def versions() -> dict[str, str]:
    """Versions of the libraries, for a file's header or a run."""
    python, of_torch = platform.python_version(), str(torch.__version__)
    return {"lora_lightning": installed(), "python": python, "torch": of_torch}


def _parse(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    header = parsed(metadata, _KEY, path)
    if header is None:
        raise AdapterFileError(
            f"{path} is a safetensors file without lora-lightning's header: it holds no adapter "
            "of ours (a base checkpoint?)"
        )
    version = header.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise AdapterFileError(
            f"{path} has format version {version}, newer than this package reads "
            f"({FORMAT_VERSION}); upgrade lora-lightning"
        )
    check_header(header, path)
    return header


def parsed(metadata: Mapping[str, str], key: str, path: Path) -> dict[str, Any] | None:
    """The JSON object under this key of a file's metadata; ``None`` where there is none.

    Raises:
        AdapterFileError: it is no JSON, or no object.
    """
    if key not in metadata:
        return None
    try:
        header = json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path}: the header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise AdapterFileError(f"{path}: the header is no JSON object")
    return header


def check_header(header: Mapping[str, Any], path: Path) -> None:
    """Raise `AdapterFileError` where a value of the header cannot be."""
    check(_SCHEMA, header, "the header", path)
    keys = [(t["module"], t["tensor"]) for t in header["targets"]]
    for what, given in (("targets", keys), ("tensors", [*header["extras"], *header["buffers"]])):
        if len(set(given)) < len(given):
            raise AdapterFileError(f"{path}: the header lists some of its {what} twice")
