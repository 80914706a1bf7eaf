"""Adapter files by name, those used last in memory."""

from __future__ import annotations

import difflib
import os
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning import state as states
from lora_lightning.adapter import located, raw_tensor
from lora_lightning.bank.mix import Part
from lora_lightning.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterFileError,
    AdapterNotFoundError,
    ConfigError,
)
from lora_lightning.fileformat import read
from lora_lightning.loading import checked
from lora_lightning.tree import join
from lora_lightning.wording import si
from lora_lightning.xs import Basis

Source = (
    str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | Iterable[str | os.PathLike[str]]
)


class Store:
    """Name → adapter, read from its file when first asked for and again after it was dropped.

    Args:
        model: The base that all of them must fit.
        capacity: How many adapters are kept in memory.
        capacity_bytes: How many bytes they may take there; ``None``: as many as they do.
        check: As in `lora_lightning.load_adapter`.
    """

    def __init__(self, model: nn.Module, capacity: int, capacity_bytes: int | None, check: str):
        for key, value in (("capacity", capacity), ("capacity_bytes", capacity_bytes or 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{key} must be a whole number above 0, got {value!r}")
        if check not in ("weights", "structure"):
            raise ConfigError(f"check must be 'weights' or 'structure', got {check!r}")
        self.files: dict[str, Path] = {}
        self.held: OrderedDict[str, dict[str, Part]] = OrderedDict()  # used last: last
        self._model, self._check = model, check
        self._capacity, self._capacity_bytes = capacity, capacity_bytes
        self._kind: tuple[torch.device, torch.dtype] | None = None
        self._bases: dict[tuple[str, int], Basis] = {}

    def add(self, source: Source, overwrite: bool = False) -> list[str]:
        """Enter files, which are read later; returns their names."""
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
            self.held.pop(name, None)
        return list(found)

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
        live = states.base_tensors(self._model) if new else {}
        for name in new:
            self.held[name] = self._read(self.files[name], live)
        for name in names:
            self.held.move_to_end(name)
        found = {name: self.held[name] for name in names}
        self._drop(names)
        return found

    def _follow(self) -> None:
        """Forget what was read for a model in another precision or on another device."""
        first = next(self._model.parameters(), None)
        now = None if first is None else (first.device, first.dtype)
        if now != self._kind:
            self.held.clear()
            self._bases.clear()
        self._kind = now

    def check(self, names: Iterable[str]) -> None:
        """Raise `AdapterNotFoundError` for a name that the bank does not have."""
        for name in names:
            if name not in self.files:
                near = difflib.get_close_matches(name, self.files, 3)
                hint = f"; did you mean {_listed(near)}?" if near else ""
                raise AdapterNotFoundError(
                    f"no adapter {name!r} among the {len(self.files)} of this bank{hint}"
                )

    @property
    def nbytes(self) -> int:
        """Memory that the adapters held take."""
        return sum(part.nbytes for parts in self.held.values() for part in parts.values())

    def representatives(self) -> list[str]:
        """A few adapters that hold every tensor which those in memory do; else the first."""
        seen: set[str] = set()
        chosen = []
        for name, parts in self.held.items():
            if not parts.keys() <= seen:
                seen |= parts.keys()
                chosen.append(name)
        return chosen or list(self.files)[:1]

    def _drop(self, needed: Collection[str]) -> None:
        while len(self.held) > self._capacity:
            self.held.popitem(last=False)
        limit = self._capacity_bytes
        while limit is not None and self.nbytes > limit:
            if len(self.held) <= len(needed):
                raise AdapterError(
                    f"the {len(needed)} adapters of this batch take {si(self.nbytes, 'B')} and "
                    f"capacity_bytes is {si(limit, 'B')}: raise it"
                )
            self.held.popitem(last=False)

    @torch.no_grad()
    def _read(self, path: Path, live: dict[str, Tensor]) -> dict[str, Part]:
        header, tensors = read(path)
        _check_finite(tensors, path)
        _, bases, _ = checked(self._model, header, tensors, self._check, path, live, self._bases)
        parts = {}
        for target in header["targets"]:
            key = join(target["module"], target["tensor"])
            raw = raw_tensor(*located(self._model, key))
            parts[key] = _folded(target, key, tensors, bases.get(key), raw)
        for key in [*header["extras"], *header["buffers"]]:
            if tensors[key].is_floating_point():
                parts[key] = Part(full=_like(tensors[key], located(self._model, key)))
            elif not key.endswith("num_batches_tracked"):  # which counts, and is not computed with
                raise AdapterFileError(f"{path} holds {key} of dtype {tensors[key].dtype}")
        return parts


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    floats = {key: t.flatten() for key, t in tensors.items() if t.is_floating_point()}
    # A sum has every NaN and infinity in it; asking each tensor takes longer than reading it.
    if not floats or torch.cat([*floats.values()]).sum().isfinite():
        return
    for key, tensor in floats.items():
        if not tensor.isfinite().all():
            raise AdapterFileError(f"{path}: {key} holds NaN or infinity; train it again")


def _folded(
    target: dict[str, Any], key: str, tensors: dict[str, Tensor], basis: Basis | None, raw: Tensor
) -> Part:
    """Any form of factors as one pair, the scaling in B: LoRA-XS's core and a start's too."""
    if basis is not None:
        lora_B, lora_A = basis.lora_B @ tensors[f"{key}.core"].to(raw), basis.lora_A
    else:
        lora_B, lora_A = tensors[f"{key}.lora_B"].to(raw), tensors[f"{key}.lora_A"].to(raw)
    if target.get("offset"):
        lora_B = torch.cat([lora_B, -tensors[f"{key}.start_B"].to(raw)], dim=1)
        lora_A = torch.cat([lora_A, tensors[f"{key}.start_A"].to(raw)])
    lora_B = target["scaling"] * lora_B
    scale = None
    if target["dora"]:
        summed = raw.reshape(len(lora_B), -1) + lora_B @ lora_A
        norm = torch.linalg.vector_norm(summed, dim=1).clamp_min(torch.finfo(raw.dtype).tiny)
        scale = tensors[f"{key}.magnitude"].to(raw) / norm
    return Part(lora_A.clone(), lora_B, scale)


def _like(tensor: Tensor, place: tuple[Any, str]) -> Tensor:
    module, name = place
    live = module._buffers[name] if name in module._buffers else raw_tensor(module, name)
    return tensor.to(live, copy=True)


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
