"""Merging one layer: W is replaced by W + s·BA, and restored bit for bit.

The merged weight is a *new* parameter; the raw one is kept as the same object. So a layer with a
tied weight is not changed, an optimizer's reference stays valid, and unmerging copies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterError
from lora_lightning.lora import parametrizations
from lora_lightning.lora.adapted_module import adapted_class, raw_tensor
from lora_lightning.lora.layers import refresh
from lora_lightning.lora.module_tree import join

_ATTRIBUTE = "_lora_merged"


@dataclass
class Merged:
    """What a merged layer keeps to be unmerged exactly."""

    base: type[nn.Module]
    tensors: tuple[str, ...]
    active: str | None
    lora: nn.Module
    raw: dict[str, nn.Parameter]
    placed: dict[str, nn.Parameter]
    sums: dict[str, tuple[torch.dtype, Tensor]]
    written: frozenset[str] = frozenset()  # when the module was copied or saved
    versions: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.versions = {key: p._version for key, p in self.placed.items()}

    def __getstate__(self) -> dict[str, Any]:
        known = {key for key, p in self.placed.items() if p._version != self.versions[key]}
        return {**vars(self), "written": self.written | known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()  # reading a file counts as writing to the tensors

    def changed(self, module: nn.Module) -> list[str]:
        """Parameters written to since the merge.

        Its version counts them; its sum detects writes through ``.data``, which versions do not
        count. A model that was converted since has other sums rightly.
        """
        live = {key: _located(module, key) for key in self.placed}
        return [
            k
            for k, p in self.placed.items()
            if live[k] is not p
            or k in self.written
            or p._version != self.versions[k]
            or (p.dtype == self.sums[k][0] and not _close(_sum(p), self.sums[k][1]))
        ]


@torch.inference_mode(False)  # whose tensors could not be unmerged elsewhere
@torch.no_grad()
def merge_layer(module: nn.Module) -> None:
    """Replace the raw weights by the effective ones; the class is the base's own again."""
    live: Any = module
    for tensor in live._adapted_tensors:
        parametrizations.recompute(module, tensor)
    effective = {
        tensor: factors.effective(raw_tensor(module, tensor), dropout=False)
        for tensor in live._adapted_tensors
        if (factors := live.factors(tensor)) is not None
    }
    base, tensors, active = live._adapted_base, live._adapted_tensors, live.lora_active
    lora = module._modules.pop("lora")
    assert lora is not None
    live.__class__ = base
    del module.__dict__["lora_active"]
    raw: dict[str, nn.Parameter] = {}
    placed: dict[str, nn.Parameter] = {}
    for tensor, value in effective.items():
        for key, new in parametrizations.originals(module, tensor, value).items():
            raw[key] = parametrizations.locate(module, key)
            placed[key] = nn.Parameter(new, raw[key].requires_grad)
            parametrizations.place(module, key, placed[key])
        parametrizations.recompute(module, tensor)
    module.__dict__["_apply"] = partial(_apply_with_kept, module)
    sums = {key: (p.dtype, _sum(p)) for key, p in placed.items()}
    module.__dict__[_ATTRIBUTE] = Merged(base, tensors, active, lora, raw, placed, sums)
    refresh(module)


def check_unchanged(module: nn.Module) -> None:
    """Raises `AdapterError` where unmerging would lose changes made since the merge."""
    merged: Merged = module.__dict__[_ATTRIBUTE]
    if changed := merged.changed(module):
        raise AdapterError(
            f"{', '.join(changed)} of a merged {type(module).__name__} changed since merge(); "
            "unmerging would lose that. Pass discard_changes=True to drop the changes."
        )


def unmerge_layer(module: nn.Module) -> None:
    """Undo `merge_layer`: the raw parameters themselves are restored, bit for bit."""
    merged: Merged = module.__dict__[_ATTRIBUTE]
    live: Any = module
    for key, raw in merged.raw.items():
        now = _located(module, key)
        raw.data = raw.data.to(device=now.device, dtype=now.dtype)
        parametrizations.place(module, key, raw)
    for tensor in merged.tensors:
        parametrizations.recompute(module, tensor)
    del module.__dict__[_ATTRIBUTE], module.__dict__["_apply"]
    module._modules["lora"] = merged.lora
    module.__dict__["lora_active"] = merged.active
    live.__class__ = adapted_class(merged.base, merged.tensors)
    refresh(module)
    # A move of the merged module did not move the factors.
    reference = next(iter(merged.raw.values()), None)
    if reference is not None and not reference.is_meta:
        merged.lora.to(device=reference.device, dtype=reference.dtype)
    merged.lora.train(module.training)


def _apply_with_kept(module: nn.Module, *args: Any, **options: Any) -> nn.Module:
    """`nn.Module._apply` of a merged layer: what it keeps follows to another device.

    Not to another precision, from which it would not come back.
    """
    type(module)._apply(module, *args, **options)  # type: ignore[no-untyped-call]
    merged: Merged = module.__dict__[_ATTRIBUTE]
    first = next(iter(merged.placed), None)
    with suppress(AdapterError):  # it is gone, which `unmerge_layer` reports
        device = _located(module, first).device if first else None
        if device is not None and device.type != "meta":
            merged.lora.to(device)
            nn.ParameterList(merged.raw.values()).to(device)
    return module


def _located(module: nn.Module, key: str) -> Any:
    try:
        return parametrizations.locate(module, key)
    except (AttributeError, KeyError) as error:
        raise AdapterError(
            f"{key} of a merged {type(module).__name__} is gone since merge(): its weight norm was "
            "removed (torch.jit.script does that to wav2vec2, even to the original when a copy is "
            "scripted), so that the source's weights have no place to come back to: load the "
            "source model again"
        ) from error


def overflowing(layers: Mapping[str, nn.Module]) -> list[str]:
    """Paths of merged layers that hold NaN or infinity where the raw weights hold none."""
    kept = {path: layer.__dict__[_ATTRIBUTE] for path, layer in layers.items()}
    keys = [(path, key) for path, merged in kept.items() for key in merged.sums]
    sums = [kept[path].sums[key][1] for path, key in keys]
    # One wait for the device, not one a layer.
    finite = torch.stack([s.to(sums[0].device) for s in sums]).isfinite().tolist() if sums else []
    bad = [place for place, right in zip(keys, finite, strict=True) if not right]
    return list(dict.fromkeys(p for p, k in bad if math.isfinite(_sum(kept[p].raw[k]))))


def is_merged(module: nn.Module) -> bool:
    """Whether this layer holds merged weights."""
    return _ATTRIBUTE in module.__dict__


def raw_parameters(merged: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Full name → the base's parameter that these merged layers keep in place of the live one."""
    return {
        join(path, key): raw
        for path, module in merged.items()
        for key, raw in module.__dict__[_ATTRIBUTE].raw.items()
    }


def _sum(parameter: nn.Parameter) -> Tensor:
    # Not as a number, for which a merge would wait for the device at each layer.
    if parameter.is_meta:
        return torch.zeros((), device="cpu")
    return parameter.detach().abs().sum(dtype=torch.float64)


def _close(one: Tensor, other: Tensor) -> bool:
    a, b = float(one), float(other)
    # Other devices sum in another order. NaN is not even equal to itself.
    if not (math.isfinite(a) and math.isfinite(b)):
        return repr(a) == repr(b)
    return abs(a - b) <= 1e-9 * max(abs(a), abs(b))
