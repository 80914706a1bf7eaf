"""Keys of stored features, and their store under a budget of bytes."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lora_lightning.errors import ConfigError

CONSTANTS = (int, float, complex, str, bytes, tuple, type(None), torch.dtype, torch.device)


class Inputs:
    """Arguments of one call, item by item; `obstacle` says why no key can be taken.

    `size` is B, the first dimension of the first tensor. A tensor whose first dimension is B too
    (`batched`) holds a row for each item, any other is shared.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.args, self.kwargs = args, kwargs
        self.leaves, self.spec = tree_flatten((args, kwargs))
        tensors = [(i, x) for i, x in enumerate(self.leaves) if isinstance(x, Tensor) and x.ndim]
        self.size = len(tensors[0][1]) if tensors else 0
        self.batched = [i for i, x in tensors if len(x) == self.size]
        self.obstacle = "" if self.size else "no argument is a tensor with a row for each item"
        for x in self.leaves:
            if not isinstance(x, CONSTANTS) and getattr(x, "layout", None) is not torch.strided:
                self.obstacle = f"an argument holds a {type(x).__name__}, which has no hash"

    def kind(self) -> tuple[Any, ...]:
        """What the path through a model may depend on: structure, constants, one item or more."""
        return self.size > 1, self.spec, _autocast(), [
            (x.dtype, x.ndim, i in self.batched) if isinstance(x, Tensor) else (type(x), x)
            for i, x in enumerate(self.leaves)
        ]  # fmt: skip

    def rows(self, index: Sequence[int]) -> Inputs:
        """A copy of these items, in this order; an index may come twice."""
        leaves = list(self.leaves)
        for i in self.batched:
            leaves[i] = leaves[i][list(index)]
        return Inputs(*tree_unflatten(leaves, self.spec))

    def keys(self) -> tuple[bytes, list[bytes]]:
        """A key of what items have in common (shapes, precision, flags), and one for each item."""
        shared = hashlib.sha1(repr((self.spec, _autocast())).encode(), usedforsecurity=False)
        for i, leaf in enumerate(self.leaves):
            if not isinstance(leaf, Tensor):
                shared.update(repr(leaf).encode())
                continue
            rows = i in self.batched
            what = rows, tuple(leaf.shape[rows:]), leaf.dtype, str(leaf.device)
            shared.update(repr(what).encode())
            shared.update(b"" if rows else _bytes(leaf[None])[0])
        found = [shared.copy() for _ in range(self.size)]
        for i in self.batched:
            for key, row in zip(found, _bytes(self.leaves[i]), strict=True):
                key.update(row)
        return shared.digest(), [key.digest() for key in found]


def _bytes(tensor: Tensor) -> Any:
    rows = tensor.detach().cpu().reshape(len(tensor), -1).contiguous()
    return rows.resolve_conj().resolve_neg().view(torch.uint8).numpy()


def _autocast() -> tuple[Any, ...]:
    kinds = [k for k in ("cpu", "cuda") if torch.is_autocast_enabled(k)]
    return tuple((k, torch.get_autocast_dtype(k)) for k in kinds)


class Store:
    """Key → tensors, in one block of memory, of which the system gives out pages that are used.

    What is stored stays: dropping the oldest would drop each just before it comes round again.

    Args:
        budget: Room, in bytes.
        folder: Where to put a file instead, that has no name and is gone when it is closed. It is
            read and written, not mapped: on a full disk a mapped file ends the process.

    Attributes:
        obstacle: Why nothing more is stored; "": there is room, or the budget is used up.
    """

    def __init__(self, budget: int, folder: Path | None = None):
        self.budget, self.used, self.obstacle = budget, 0, ""
        self._records: dict[bytes, list[Any]] = {}  # of views, or of places in the file
        self._file = None if folder is None else _unnamed(folder, budget)
        if self._file is not None:
            weakref.finalize(self, self._file.close)
        with torch.inference_mode(False):
            self._block = torch.empty(0 if folder else budget, dtype=torch.uint8, device="cpu")

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: bytes) -> bool:
        return key in self._records

    def get(self, key: bytes) -> list[Tensor] | None:
        """What is stored, not to be written to; ``None`` where it is not, or cannot be read."""
        record = self._records.get(key)
        if record is None or self._file is None:
            return record
        try:
            return [self._read(*place) for place in record]
        except OSError:
            del self._records[key]
            return None

    def put(self, key: bytes, parts: Sequence[Tensor]) -> None:
        """Store copies of tensors, if the key is new and there is room."""
        sizes = [-(-part.nbytes // 64) * 64 for part in parts]  # any dtype can be viewed there
        if key in self or self.used + sum(sizes) > self.budget:
            return
        record, at = [], self.used
        try:
            for part, size in zip(parts, sizes, strict=True):
                record.append(self._placed(part, at))
                at += size
        except OSError as error:
            self.budget, self.obstacle = self.used, f"{error.strerror or error}"
            return
        self._records[key], self.used = record, at

    def _placed(self, part: Tensor, at: int) -> Any:
        if self._file is None:
            place = self._block[at : at + part.nbytes]
            return place.view(part.dtype).view(part.shape).copy_(part)
        data = memoryview(_bytes(part.reshape(1, -1)).reshape(-1))
        self._file.seek(at)
        while data:  # a disk that is almost full takes a part
            data = data[self._file.write(data) :]
        return at, part.dtype, part.shape

    def _read(self, at: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        assert self._file is not None
        if not shape.numel():
            return torch.empty(shape, dtype=dtype, device="cpu")
        data = bytearray(shape.numel() * dtype.itemsize)
        view = memoryview(data)
        self._file.seek(at)
        while view:
            if not (count := self._file.readinto(view)):
                raise OSError("the file ends too early")
            view = view[count:]
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def clear(self) -> None:
        """Forget all items, and keep the room."""
        self._records.clear()
        self.used = 0


def _unnamed(folder: Path, budget: int) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < budget:
        raise ConfigError(f"{folder} has less than budget_mb={budget / 1e6:g} free: give another")
    return tempfile.TemporaryFile(dir=folder, buffering=0)
