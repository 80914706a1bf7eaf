"""What a stored feature is found by, and where it is kept under a budget of bytes."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
    """

    def __init__(self, budget: int, folder: Path | None = None):
        self.budget, self.used = budget, 0
        self.records: dict[bytes, list[Tensor]] = {}  # views, not to be written to
        with torch.inference_mode(False):
            empty = torch.empty(0 if folder else budget, dtype=torch.uint8, device="cpu")
            self._block = _mapped(folder, budget) if folder else empty

    def put(self, key: bytes, parts: Sequence[Tensor]) -> None:
        """Store copies of contiguous tensors, if the key is new and there is room."""
        sizes = [-(-part.nbytes // 64) * 64 for part in parts]  # any dtype can be viewed there
        if key in self.records or self.used + sum(sizes) > self.budget:
            return
        self.records[key] = []
        for part, size in zip(parts, sizes, strict=True):
            place = self._block[self.used : self.used + part.nbytes]
            self.records[key].append(place.view(part.dtype).view(part.shape).copy_(part))
            self.used += size

    def clear(self) -> None:
        """Forget all items, and keep the room."""
        self.records.clear()
        self.used = 0


def _mapped(folder: Path, budget: int) -> Tensor:
    """A file without a name, mapped into memory, that is gone when it is closed."""
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < budget:  # to outgrow the disk would kill the process
        raise ConfigError(f"{folder} has less than budget_mb={budget / 1e6:g} free: give another")
    with tempfile.TemporaryFile(dir=folder) as file:
        return torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=(budget,)))
