"""What a stored feature is found by, and where it is kept under a budget of bytes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lora_lightning.errors import ConfigError
from lora_lightning.report.metrics import si

_ALIGNMENT = 64  # bytes; any dtype can be viewed there
CONSTANTS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


class Inputs:
    """Arguments of one call, item by item.

    An item's key is a hash of its own bytes in every argument, and of all that the items of a
    batch share: shapes (so the length to which a recording was padded), precision, autocast, and
    arguments that are no batch. So the order and company of items may change.

    Attributes:
        size: B, the items: the first dimension of the first tensor. A tensor whose first
            dimension is B too (`batched`) holds a row for each item, any other is shared.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.args, self.kwargs = args, kwargs
        self.leaves, self.spec = tree_flatten((args, kwargs))
        tensors = [(i, x) for i, x in enumerate(self.leaves) if isinstance(x, Tensor) and x.ndim]
        self.size = len(tensors[0][1]) if tensors else 0
        self.batched = [i for i, x in tensors if len(x) == self.size]
        # Rows cannot be taken out alone where a second argument may tell their lengths.
        self.separable = len(self.batched) == 1

    @property
    def obstacle(self) -> str:
        """Why no key can be taken of the arguments; "" where one can."""
        for value in (*self.args, *self.kwargs.values()):
            inside = tree_flatten(value)[0]
            if inside != [value] and any(isinstance(x, (int, float, str)) for x in inside):
                return f"an argument holds a {type(value).__name__} of values; give a tensor"
        for leaf in self.leaves:
            if not isinstance(leaf, (Tensor, *CONSTANTS)):
                return f"an argument holds a {type(leaf).__name__}, of which no hash can be taken"
            if isinstance(leaf, Tensor) and leaf.layout is not torch.strided:
                return f"an argument is a tensor of layout {leaf.layout}"
        return "" if self.size else "no argument is a tensor with a row for each item"

    def kind(self) -> Hashable:
        """What the path through a model may depend on: structure and constants, no sizes."""
        return str(self.spec), autocast(), tuple(
            (x.dtype, x.ndim, i in self.batched) if isinstance(x, Tensor) else (type(x), x)
            for i, x in enumerate(self.leaves)
        )  # fmt: skip

    def rows(self, index: Sequence[int]) -> Inputs:
        """A copy of these items, in this order; an index may come twice."""
        leaves = list(self.leaves)
        for i in self.batched:
            leaves[i] = leaves[i][list(index)]
        return Inputs(*tree_unflatten(leaves, self.spec))

    def shared(self) -> bytes:
        """A hash of what all items of the batch have in common."""
        found = hashlib.sha1(repr((self.spec, autocast())).encode(), usedforsecurity=False)
        for i, leaf in enumerate(self.leaves):
            rows = i in self.batched
            if isinstance(leaf, Tensor):
                shape = tuple(leaf.shape[rows:])
                found.update(repr((rows, shape, leaf.dtype, str(leaf.device))).encode())
                found.update(b"" if rows else _bytes(leaf[None])[0])
            else:
                found.update(repr(leaf).encode())
        return found.digest()

    def keys(self, shared: bytes) -> list[bytes]:
        """A key for each item."""
        found = [hashlib.sha1(shared, usedforsecurity=False) for _ in range(self.size)]
        for i in self.batched:
            for key, row in zip(found, _bytes(self.leaves[i]), strict=True):
                key.update(row)
        return [key.digest() for key in found]


def _bytes(tensor: Tensor) -> Any:
    """(B, bytes of a row) as a NumPy array."""
    rows = tensor.detach().cpu().reshape(len(tensor), -1).contiguous()
    return rows.resolve_conj().resolve_neg().view(torch.uint8).numpy()


def autocast() -> tuple[Any, ...]:
    """The precision of autocast on each kind of device; None where it is off."""
    return tuple(
        torch.get_autocast_dtype(k) if torch.is_autocast_enabled(k) else None
        for k in ("cpu", "cuda")
    )


class Store:
    """Key → tensors, one after the other in one block of memory that is there from the start.

    The system gives out pages when they are written to, so a budget that is not used up costs
    nothing. What is stored stays: when items come round in turns, as in epochs, dropping the
    oldest would drop each just before it is wanted again.

    Raises:
        ConfigError: there is not so much memory, or not so much free space in the folder.
    """

    def __init__(self, budget: int, folder: Path | None = None):
        self.budget = budget
        self.used = self.refused = 0  # bytes taken; items for which there was no room
        self.records: dict[bytes, list[Tensor]] = {}  # views, not to be written to
        # Not inference tensors, even when the first batch comes from a validation.
        with torch.inference_mode(False):
            self._block = _memory(budget) if folder is None else _mapped(folder, budget)

    def put(self, key: bytes, parts: Sequence[Tensor]) -> bool:
        """Store copies of contiguous tensors; whether there was room."""
        sizes = [-(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for part in parts]
        if self.used + sum(sizes) > self.budget:
            self.refused += 1
            return False
        self.records[key] = []
        for part, size in zip(parts, sizes, strict=True):
            place = self._block[self.used : self.used + part.nbytes]
            self.records[key].append(place.view(part.dtype).view(part.shape).copy_(part))
            self.used += size
        return True

    def clear(self) -> None:
        """Forget all items, and keep the room."""
        self.records.clear()
        self.used = self.refused = 0

    def close(self) -> None:
        """Give memory and file back."""
        self.clear()
        self._block = torch.empty(0, dtype=torch.uint8)


def _memory(budget: int) -> Tensor:
    try:
        return torch.empty(budget, dtype=torch.uint8)
    except RuntimeError as error:
        raise ConfigError(
            f"budget_mb={budget / 1e6:g} is more memory than there is: give a smaller budget, or a "
            "folder for a file"
        ) from error


def _mapped(folder: Path, budget: int) -> Tensor:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ConfigError(f"{folder} is a file, and features go into a folder") from error
    free = shutil.disk_usage(folder).free
    if free < budget:  # a mapped file that outgrows its disk kills the process
        raise ConfigError(
            f"budget_mb={budget / 1e6:g}, and {folder} has {si(free, 'B')} free: give a smaller "
            "budget or another folder"
        )
    handle, name = tempfile.mkstemp(".features", "prefix-", folder)
    os.close(handle)
    block = torch.from_file(name, shared=True, size=budget, dtype=torch.uint8)
    with contextlib.suppress(OSError):  # Windows does not let go of a mapped file
        os.unlink(name)  # it lives as long as it is mapped, and no crash leaves it behind
    return block
