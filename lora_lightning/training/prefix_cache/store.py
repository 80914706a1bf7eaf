"""Features of items under a budget of bytes, in memory or in a file that is mapped into it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_lightning.errors import ConfigError
from lora_lightning.report.metrics import si

_ALIGNMENT = 64  # bytes; any dtype can be viewed there


class Store:
    """Key → tensors, one after the other in one block of memory that is there from the start.

    The system gives out pages when they are written to, so a budget that is not used up costs
    nothing. What is stored stays: when items come round in turns, as in epochs, dropping the
    oldest would drop each just before it is wanted again.

    Args:
        budget: Bytes.
        folder: Where to put the file; None: in memory.

    Attributes:
        used: Bytes taken.
        reserved: Bytes of the budget that are taken elsewhere.
        refused: Items for which there was no room.

    Raises:
        ConfigError: there is not so much memory, or not so much free space in the folder.
    """

    def __init__(self, budget: int, folder: Path | None = None):
        self.budget, self.folder = budget, folder
        self.used = self.refused = self.reserved = 0
        self._records: dict[bytes, list[Tensor]] = {}
        self._file: Path | None = None
        # Not inference tensors, even when the first batch comes from a validation.
        with torch.inference_mode(False):
            self._block = _memory(budget) if folder is None else self._mapped(folder)

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: bytes) -> bool:
        return key in self._records

    def get(self, key: bytes) -> list[Tensor] | None:
        """The tensors stored under this key: views, not to be written to."""
        return self._records.get(key)

    def put(self, key: bytes, parts: Sequence[Tensor]) -> bool:
        """Store copies of contiguous tensors; whether there was room."""
        sizes = [-(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for part in parts]
        if self.used + self.reserved + sum(sizes) > self.budget:
            self.refused += 1
            return False
        record = []
        for part, size in zip(parts, sizes, strict=True):
            place = self._block[self.used : self.used + part.nbytes]
            view = place.view(part.dtype).view(part.shape)
            view.copy_(part)
            record.append(view)
            self.used += size
        self._records[key] = record
        return True

    def clear(self) -> None:
        """Forget all items, and keep the room."""
        self._records.clear()
        self.used = self.refused = self.reserved = 0

    def close(self) -> None:
        """Give memory and file back."""
        self._records.clear()
        self._block = torch.empty(0, dtype=torch.uint8)
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _mapped(self, folder: Path) -> Tensor:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise ConfigError(f"{folder} is a file, and features go into a folder") from error
        free = shutil.disk_usage(folder).free
        if free < self.budget:  # a mapped file that outgrows its disk kills the process
            raise ConfigError(
                f"budget_mb={self.budget / 1e6:g}, and {folder} has {si(free, 'B')} free: give a "
                "smaller budget or another folder"
            )
        handle, name = tempfile.mkstemp(".features", "prefix-", folder)
        os.close(handle)
        block = torch.from_file(name, shared=True, size=self.budget, dtype=torch.uint8)
        try:
            os.unlink(name)  # it lives as long as it is mapped, and no crash leaves it behind
        except OSError:  # Windows does not let go of a mapped file
            self._file = Path(name)
        return block


def _memory(budget: int) -> Tensor:
    try:
        return torch.empty(budget, dtype=torch.uint8)
    except RuntimeError as error:
        raise ConfigError(
            f"budget_mb={budget / 1e6:g} is more memory than there is: give a smaller budget, or a "
            "folder for a file"
        ) from error
