"""Reading safetensors files, of whoever wrote them: regular files, in limits, whole or not at all.

Files are read, never mapped: one that is overwritten or truncated while it is mapped ends the
process by a signal, which nothing can catch.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import AdapterFileError
from lora_lightning.report.files import no_file

LARGEST_HEADER = 16_000_000  # bytes; parsed, JSON takes up to thirty times its length
# First bytes of files often renamed to .safetensors: zip (torch.save) and pickle protocols.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# Stored as in memory; other types are read by safetensors itself.
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64} if sys.byteorder == "little" else {}  # fmt: skip
_RAW = {kind: (dtype, dtype.itemsize) for kind, dtype in _TYPES.items()}


def contents(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file, in memory of their own.

    Raises:
        AdapterFileError: it is missing, no regular file, damaged, a pickle, or beyond the limits.
    """
    data = _bytes(path)
    try:
        begin = 8 + int.from_bytes(data[:8], "little")
        entries = json.loads(data[8:begin].decode()) if data[8:9] == b"{" else {}
        metadata = entries.pop("__metadata__", {})
        if begin % 8 or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("laid out as others do")
        return metadata, _views(data, begin, entries)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        tensors = _by_safetensors(data, path)  # reads it, or says why not
    return _metadata(data), tensors


def _bytes(path: Path) -> bytearray:
    """The whole file, once its first bytes allow it."""
    try:
        if what := no_file(path):
            raise AdapterFileError(f"{path} is a {what}; expected a .safetensors file")
        with path.open("rb") as file:
            _check_start(path, file.peek(9)[:9])
            data = bytearray(os.fstat(file.fileno()).st_size)
            del data[file.readinto(data) :]  # cut short by another process
            return data
    except AdapterFileError:
        raise
    except (FileNotFoundError, ValueError) as error:  # a name that no file can have
        raise AdapterFileError(f"{path} does not exist; expected a .safetensors file") from error
    except (OSError, MemoryError) as error:
        why = getattr(error, "strerror", None) or "it is larger than the memory"
        raise AdapterFileError(f"{path} cannot be read: {why}") from error


def _check_start(path: Path, start: bytes) -> None:
    # safetensors begins with the length of its header, which may look like a pickle's first bytes.
    if start.startswith(_PICKLES) and start[4:] != b"\0\0\0\0{":
        raise AdapterFileError(
            f"{path} is a pickle (torch.save), whatever its name says. It was not opened, because "
            "a pickle can run code; ask for a file written by save_adapter"
        )
    length = int.from_bytes(start[:8], "little")
    if len(start) == 9 and start[8:] == b"{" and length > LARGEST_HEADER:
        raise AdapterFileError(
            f"{path} is damaged or no safetensors file (its header is said to take {length:,} "
            f"bytes, and at most {LARGEST_HEADER:,} are read); copy or write it again"
        )


def _views(data: bytearray, begin: int, entries: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that lie in `data` one after the other, from `begin` to the end.

    As `write` lays them out, in a fifth of safetensors' time. Nothing is accepted here that it
    would not accept.

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


def _by_safetensors(data: bytearray, path: Path) -> dict[str, Tensor]:
    """What safetensors reads; or an error that says why it does not."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return dict(load(bytes(data)))
    # KeyError: a type that it knows and torch does not.
    except (SafetensorError, KeyError, ValueError, RuntimeError, OverflowError) as error:
        raise AdapterFileError(
            f"{path} is damaged or no safetensors file ({error}); copy or write it again"
        ) from error


def _metadata(data: bytearray) -> dict[str, str]:
    end = 8 + int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8:end]).get("__metadata__") or {})
