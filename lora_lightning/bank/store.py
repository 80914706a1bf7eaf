"""Adapter files by name, with a least-recently-used cache in memory."""

from __future__ import annotations

import difflib
import os
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_lightning.bank.mix import Part
from lora_lightning.bank.reading import parts_of
from lora_lightning.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterFileError,
    AdapterNotFoundError,
    ConfigError,
)
from lora_lightning.lora.values import check_choice, check_count
from lora_lightning.lora.xs import Basis
from lora_lightning.model.view import View
from lora_lightning.report.metrics import si

Source = (
    str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | Iterable[str | os.PathLike[str]]
)


class Store:
    """Name → adapter, read from its file when first needed, and again after it was evicted.

    Args:
        model: The base that all of them must fit.
        capacity: How many adapters are kept in memory.
        capacity_bytes: How many bytes they may take there; ``None``: no limit.
        check: As in `lora_lightning.load_adapter`.
    """

    def __init__(self, model: nn.Module, capacity: int, capacity_bytes: int | None, check: str):
        for key, value in (("capacity", capacity), ("capacity_bytes", capacity_bytes or 1)):
            check_count(key, value)
        check_choice("check", check, ("weights", "structure"))
        self.files: dict[str, Path] = {}
        self.held: OrderedDict[str, dict[str, Part]] = OrderedDict()  # used last: last
        self.data: dict[str, dict[str, Any]] = {}  # in their headers
        self._model, self._check = model, check
        self._capacity, self._capacity_bytes = capacity, capacity_bytes
        self._kind: tuple[torch.device, torch.dtype] | None = None
        self._bases: dict[tuple[str, int], Basis] = {}

    def add(self, source: Source, overwrite: bool = False) -> list[str]:
        """Add files, which are read later; returns their names."""
        found = _named(source)
        taken = sorted(found.keys() & self.files.keys())
        if taken and not overwrite:
            raise AdapterExistsError(
                f"the bank has {_listed(taken)} already: choose other names, or overwrite=True"
            )
        missing = [path for path in found.values() if not path.is_file()]
        if missing:
            raise AdapterFileError(f"no such file: {_listed(map(str, missing))}")
        self.files |= found
        for name in taken:
            self._forget(name)
        return list(found)

    def remove(self, names: Collection[str]) -> None:
        """Forget these adapters; their files stay."""
        self.check(names)
        for name in names:
            del self.files[name]
            self._forget(name)

    def take(self, names: Collection[str]) -> dict[str, dict[str, Part]]:
        """The adapters of these names, all of them in memory.

        Raises:
            AdapterNotFoundError: a name is unknown.
            AdapterError: they are more than the capacity.
            AdapterFileError: a file is damaged, does not fit the model, or holds NaN.
        """
        self.check(names)
        if len(names) > self._capacity:
            raise AdapterError(
                f"the batch has {len(names)} different adapters and capacity is {self._capacity}: "
                "raise it to the largest batch at least"
            )
        self._follow()
        new = [name for name in names if name not in self.held]
        view = View(self._model)
        # All are read before any is kept: a file that cannot be read leaves no others behind.
        read = {name: self._read(self.files[name], view) for name in new}
        self.held |= {name: parts for name, (parts, _) in read.items()}
        self.data |= {name: data for name, (_, data) in read.items()}
        for name in names:
            self.held.move_to_end(name)
        found = {name: self.held[name] for name in names}
        self._drop(names)
        return found

    def _read(self, path: Path, view: View) -> tuple[dict[str, Part], dict[str, Any]]:
        return parts_of(view, path, self._check, self._bases)

    def _follow(self) -> None:
        """Drop adapters that were read for another precision or device of the model."""
        first = next(self._model.parameters(), None)
        now = None if first is None else (first.device, first.dtype)
        if now != self._kind:
            self.held.clear()
            self.data.clear()
            self._bases.clear()
        self._kind = now

    def check(self, names: Iterable[str]) -> None:
        """Raise `AdapterNotFoundError` for a name that the bank does not have.

        Raises:
            ConfigError: something that is no name.
        """
        for name in names:
            if not isinstance(name, str):
                raise ConfigError(f"an adapter's name is a text, or None for the source: {name!r}")
            if name not in self.files:
                near = difflib.get_close_matches(name, self.files, 3)
                hint = f"; did you mean {_listed(near)}?" if near else ""
                raise AdapterNotFoundError(
                    f"no adapter {name!r} among the {len(self.files)} of this bank{hint}"
                )

    @property
    def nbytes(self) -> int:
        """Memory of the adapters held, in bytes."""
        parts = {id(part): part for held in self.held.values() for part in held.values()}
        return sum(part.nbytes for part in parts.values())

    def representatives(self) -> list[str]:
        """A few adapters that cover all tensors of those in memory; else the first."""
        seen: set[str] = set()
        chosen = []
        for name, parts in self.held.items():
            if not parts.keys() <= seen:
                seen |= parts.keys()
                chosen.append(name)
        return chosen or list(self.files)[:1]

    def _forget(self, name: str) -> None:
        self.held.pop(name, None)
        self.data.pop(name, None)

    def _drop(self, needed: Collection[str]) -> None:
        while len(self.held) > self._capacity:
            self._forget(next(iter(self.held)))
        limit = self._capacity_bytes
        while limit is not None and self.nbytes > limit:
            if len(self.held) <= len(needed):
                raise AdapterError(
                    f"the {len(needed)} adapters of this batch take {si(self.nbytes, 'B')} and "
                    f"capacity_bytes is {si(limit, 'B')}: raise it"
                )
            self._forget(next(iter(self.held)))


def _named(source: Source) -> dict[str, Path]:
    """Name → file of a folder, a mapping or a list."""
    if isinstance(source, Mapping):
        found = {name: Path(path) for name, path in source.items()}
    else:
        paths = _paths(source)
        found = {path.stem: path for path in paths}
        if len(found) < len(paths):
            twice = sorted({p.stem for p in paths if sum(q.stem == p.stem for q in paths) > 1})
            raise ConfigError(
                f"several files are called {_listed(twice)}: pass a mapping from name to path"
            )
    wrong = [name for name in found if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise ConfigError(f"names must be texts that are not empty, got {wrong[0]!r}")
    return found


def _paths(source: Any) -> list[Path]:
    if not isinstance(source, (str, os.PathLike)):
        return [Path(path) for path in source]
    folder = Path(source)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise AdapterFileError(f"{folder} does not exist; expected a folder of adapter files")
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise AdapterFileError(f"{folder} holds no adapter file (.safetensors)")
    return found


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:5])) + (" …" if len(names) > 5 else "")
