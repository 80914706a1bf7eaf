"""Is the frozen beginning of a model still what it was when its results were stored?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_lightning.prefix.calls import storage
from lora_lightning.prefix.replay import Prefix
from lora_lightning.tree import join


class Watch:
    """Notes weights, classes, hooks and adapters of a prefix, and tells when one has changed.

    Args:
        prefix: What is watched, with the modules around it.
        touched: Storages that its forward reads.
    """

    def __init__(self, prefix: Prefix, touched: set[int]):
        self._prefix = prefix
        owners = [*prefix.ancestors.values(), *prefix.modules.values()]
        tables = [table for m in owners for table in (m._parameters, m._buffers)]
        self._places: list[tuple[dict[str, Any], str]] = [
            (table, name)
            for table in tables
            for name, tensor in table.items()
            if tensor is not None and storage(tensor) in touched
        ]
        # Held, so that no other tensor can come to be at the same address.
        self._held = [table[name] for table, name in self._places]
        self._tree = [
            (owner._modules, name, module)
            for path, module in {**prefix.ancestors, **prefix.modules}.items()
            if path
            for owner, name in [_owner(prefix.root, path)]
        ]
        self._state, self._sums = self._now(), self._checksums()

    def changed(self) -> bool:
        """Whether anything was put in another's place, written to, adapted, unfrozen or hooked."""
        return self._now() != self._state or any(
            children.get(name) is not module for children, name, module in self._tree
        )

    def rewritten(self) -> bool:
        """Whether weights were written to past the version counters, through ``.data``."""
        return not self.changed() and self._checksums() != self._sums

    def _now(self) -> list[Any]:
        found: list[Any] = []
        for table, name in self._places:
            tensor = table.get(name)
            if tensor is None:
                return []
            version = 0 if tensor.is_inference() else tensor._version
            found.append((id(tensor), version, tensor.data_ptr(), tensor.requires_grad))
        for module in self._prefix.modules.values():
            hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
            found.append((module.__class__, module.__dict__.get("lora_active"), hooks))
        for module in self._prefix.ancestors.values():
            found.append((module.__class__, module.__dict__.get("lora_active")))
        return found

    @torch.no_grad()
    def _checksums(self) -> list[float]:
        dtype = torch.float64
        sums = [table[name].sum(dtype=dtype) for table, name in self._places]
        return torch.stack(sums).tolist() if sums else []


def _owner(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, name = path.rpartition(".")
    return root.get_submodule(owner), name


def modes(prefix: Prefix) -> tuple[bool, ...]:
    """Which modules of the prefix, and the model itself, are in training mode."""
    return (prefix.root.training, *(m.training for m in prefix.modules.values()))


def noise(prefix: Prefix) -> str:
    """What is random, or moves, in the prefix as it is; "" where nothing is."""
    for path, module in prefix.modules.items():
        if not module.training:
            continue
        rate = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else 0
        rate = rate or module.__dict__.get("drop_prob") or 0
        if rate:
            return f"{path} ({type(module).__name__}) drops with probability {rate:g}"
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            return f"{path} ({type(module).__name__}) is in training mode: its statistics move"
    for path, module in {**prefix.ancestors, **prefix.modules}.items():
        rate = module.__dict__.get("layer_drop") or 0
        if module.training and rate:
            where = join(path, "layer_drop")
            return f"{where} drops whole layers with probability {rate:g}; set it to 0"
    return ""


def recomputes(prefix: Prefix) -> str:
    """What computes activations again in the backward pass; "" where nothing does."""
    for path, module in prefix.ancestors.items():
        for name in ("grad_checkpointing", "gradient_checkpointing"):
            if module.__dict__.get(name) is True:
                return join(path, name)
    return ""
