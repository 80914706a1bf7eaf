"""The adapter file format: validated reading, atomic writing."""

from __future__ import annotations

import functools
import json
import math
import mmap
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import AdapterFileError
from lora_lightning.report.files import atomic_write
from lora_lightning.report.versions import installed

FORMAT_VERSION = 1
_KEY = "lora_lightning"
_FIELDS = {
    "format_version": int,
    "name": str,
    "base": dict,
    "config": dict,
    "targets": list,
    "extras": list,
    "buffers": list,
}
_TARGET_FIELDS = {"module", "tensor", "kind", "path", "shape", "matrix", "rank", "alpha",
                  "scaling", "dropout", "dora", "freeze_a"}  # fmt: skip
# First bytes of files often renamed to .safetensors: zip (torch.save) and pickle protocols.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# Stored as in memory; other types are read by safetensors itself.
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64} if sys.byteorder == "little" else {}  # fmt: skip
_RAW = {kind: (dtype, dtype.itemsize) for kind, dtype in _TYPES.items()}
_LARGEST = 100_000_000  # bytes of a header that safetensors reads


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> Path:
    """Write an adapter file, which replaces `path` atomically."""
    from safetensors.torch import save

    data = save(
        {k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
         for k, v in tensors.items()},
        metadata={_KEY: json.dumps(header)},  # one key: several come in random order
    )  # fmt: skip
    return atomic_write(path, data)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of an adapter file, whole or not at all.

    The tensors are views of the memory-mapped file: writing to them does
    not reach it. Copy what outlives the reading, since the file may be overwritten.

    Raises:
        AdapterFileError: the file is missing, damaged, a pickle, or no adapter.
    """
    metadata, tensors = _mapped(path) or _by_safetensors(path)
    return _parse(metadata, path), tensors


def _mapped(path: Path) -> tuple[dict[str, str], dict[str, Tensor]] | None:
    """Metadata and tensors of a file laid out as `write` does, in a fifth of safetensors' time.

    ``None`` for any other, which safetensors reads or refuses: nothing is accepted here that
    it would not accept.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        begin = 8 + int.from_bytes(data[:8], "little")
        entries = json.loads(data[8:begin].decode()) if data[8:9] == b"{" else {}
        metadata = entries.pop("__metadata__")
        if begin % 8 or begin > _LARGEST or not all(isinstance(v, str) for v in metadata.values()):
            return None
        return metadata, _views(data, begin, entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None


def _views(data: mmap.mmap, begin: int, entries: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that lie in `data` one after the other, from `begin` to the end.

    Raises:
        ValueError: they do not, or one is empty.
    """
    # All bytes as numbers of each type, of which a tensor is one view.
    whole = {
        kind: torch.frombuffer(data, dtype=_RAW[kind][0], offset=begin, count=count)
        for kind in {entry["dtype"] for entry in entries.values()}
        if (count := (len(data) - begin) // _RAW[kind][1])
    }
    found, place = {}, 0
    for name, entry in entries.items():
        kind, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        size = _RAW[kind][1]
        whole_numbers = {type(number) for number in (*shape, start, end)} == {int}
        fits = start == place < end and end - start == size * math.prod(shape)
        if not (whole_numbers and fits and start % size == 0):
            raise ValueError(f"{name} does not follow on the tensor before it")
        found[name] = whole[kind].as_strided(shape, _row_major(shape), start // size)
        place = end
    if begin + place != len(data):
        raise ValueError("the file ends elsewhere than its tensors")
    return found


@functools.lru_cache(1024)
def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(shape[i:]) for i in range(1, len(shape) + 1))


def versions() -> dict[str, str]:
    """Versions of the libraries, for a file's header or a run."""
    python, of_torch = platform.python_version(), str(torch.__version__)
    return {"lora_lightning": installed(), "python": python, "torch": of_torch}


def _by_safetensors(path: Path) -> tuple[dict[str, str] | None, dict[str, Tensor]]:
    """What safetensors reads; or an error that says why it does not."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise AdapterFileError(f"{path} {what}; expected an adapter file (.safetensors)")
    with path.open("rb") as file:
        start = file.read(9)
    # safetensors begins with the length of its header, which may look like a pickle's first bytes.
    if start.startswith(_PICKLES) and start[4:] != b"\0\0\0\0{":
        raise AdapterFileError(
            f"{path} is a pickle (torch.save), whatever its name says. It was not opened, because "
            "a pickle can run code; ask for a file written by save_adapter"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata()
        return metadata, dict(load_file(path))
    except SafetensorError as error:
        raise AdapterFileError(
            f"{path} is damaged or no safetensors file ({error}); copy or write it again"
        ) from error


def _parse(metadata: dict[str, str] | None, path: Path) -> dict[str, Any]:
    text = (metadata or {}).get(_KEY)
    if text is None:
        raise AdapterFileError(
            f"{path} is a safetensors file without lora-lightning's header: it holds no adapter "
            "of ours (a base checkpoint?)"
        )
    try:
        header = json.loads(text)
    except json.JSONDecodeError as error:
        raise AdapterFileError(f"{path}: the header is no JSON ({error})") from error
    version = header.get("format_version") if isinstance(header, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise AdapterFileError(
            f"{path} has format version {version}, newer than this package reads "
            f"({FORMAT_VERSION}); upgrade lora-lightning"
        )
    _check_fields(header, path)
    return dict(header)


def _check_fields(header: Any, path: Path) -> None:
    wrong = [
        key
        for key, kind in _FIELDS.items()
        if not isinstance(header, dict) or not isinstance(header.get(key), kind)
    ]
    if not wrong:
        wrong = sorted(
            {f"targets[{i}].{key}" for i, t in enumerate(header["targets"]) for key in
             _TARGET_FIELDS - (t.keys() if isinstance(t, dict) else set())}
        )  # fmt: skip
        wrong += [f"base.{k}" for k in ("architecture", "structure") if k not in header["base"]]
    if wrong:
        raise AdapterFileError(f"{path}: the header lacks or garbles {', '.join(wrong[:8])}")
