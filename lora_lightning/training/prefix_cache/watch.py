"""Is the frozen beginning of a model still what it was when its results were stored?"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lora_lightning.lora.module_tree import join
from lora_lightning.training.prefix_cache.calls import storage
from lora_lightning.training.prefix_cache.observers import attributes, version
from lora_lightning.training.prefix_cache.replay import Prefix

_ROWS = 4096  # of a weight that are summed at once

Notes = dict[nn.Module, dict[str, Any]]  # of each module, its plain attributes


class Watch:
    """Notes weights, attributes, classes, hooks and adapters of a prefix; tells of changes.

    Args:
        prefix: What is watched, with the modules around it.
        touched: Storages that its forward reads.
        before: Attributes of all modules before the trial forwards. What a module around the
            prefix writes itself, a counter say, it writes in every forward: none of it is watched.
    """

    def __init__(self, prefix: Prefix, touched: set[int], before: Notes):
        self._prefix = prefix
        self._attributes: list[tuple[dict[str, Any], itemgetter[Any]]] = []
        self._places: list[tuple[dict[str, Any], str]] = []
        around = [(m, _unwritten(m, before)) for m in prefix.ancestors.values()]
        for module, plain in [*around, *((m, attributes(m)) for m in prefix.modules.values())]:
            tensors = {name: x for name, x in plain.items() if isinstance(x, Tensor)}
            if names := [name for name in plain if name not in tensors]:
                self._attributes.append((vars(module), itemgetter(*names)))
            tables: list[tuple[Any, Any]] = [(t, t) for t in (module._parameters, module._buffers)]
            self._places += [
                (table, name)
                for table, named in [*tables, (vars(module), tensors)]
                for name, tensor in named.items()
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

    def structure(self) -> list[Any]:
        """All but what the weights are: classes, modes, hooks, adapters, what is frozen."""
        found: list[Any] = [modes(self._prefix)]
        for table, name in self._places:
            tensor = table.get(name)
            found.append(tensor.requires_grad if isinstance(tensor, Tensor) else None)
        return found + self._modules()

    def _now(self) -> list[Any]:
        found: list[Any] = []
        for table, name in self._places:
            tensor = table.get(name)
            if not isinstance(tensor, Tensor):
                return []
            found.append((id(tensor), version(tensor), tensor.data_ptr(), tensor.requires_grad))
        return found + self._modules()

    def _modules(self) -> list[Any]:
        found: list[Any] = []
        for table, values in self._attributes:
            try:
                found.append((values(table), len(table) - ("forward" in table)))  # a replay's own
            except KeyError:  # deleted
                found.append(None)
        for module in self._prefix.modules.values():
            hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
            found.append((module.__class__, module.__dict__.get("lora_active"), hooks))
        for module in self._prefix.ancestors.values():
            found.append((module.__class__, module.__dict__.get("lora_active")))
        return found

    @torch.no_grad()
    def _checksums(self) -> list[float]:
        sums = [_checksum(table[name]) for table, name in self._places]
        return torch.stack(sums).nan_to_num(0.0).tolist() if sums else []


def _unwritten(module: nn.Module, before: Notes) -> dict[str, Any]:
    """Attributes that a trial forward left as they were, but a LightningModule's.

    These tell of the fit, not of the network.
    """
    if isinstance(module, LightningModule):
        return {}
    return {
        n: x for n, x in attributes(module).items() if _as_before(x, before[module].get(n, ...))
    }


def _as_before(value: Any, noted: Any) -> bool:
    tensors = isinstance(value, Tensor) or isinstance(noted, Tensor)
    return value is noted or (not tensors and bool(value == noted))


def _checksum(tensor: Tensor) -> Tensor:
    """A number that other values, or the same in other places, would hardly give."""
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    table = values.flatten(1) if values.ndim > 1 else values.reshape(1, -1)
    row, column = (
        torch.arange(1, n + 1, dtype=torch.float64, device=tensor.device) for n in table.shape
    )
    # In parts, so that no large weight is copied as a whole.
    parts = [table[i : i + _ROWS].double() @ column for i in range(0, len(row), _ROWS)]
    return torch.cat([column[:0], *parts]) @ row


def _owner(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, name = path.rpartition(".")
    return root.get_submodule(owner), name


def modes(prefix: Prefix) -> tuple[bool, ...]:
    """Which modules around the prefix, and of its own if they have a say, are in training mode."""
    around = tuple(m.training for m in prefix.ancestors.values())
    if prefix.settled:
        return around
    return (*around, *(m.training for m in prefix.modules.values()))


def set_modes(prefix: Prefix, wanted: tuple[bool, ...]) -> None:
    """Put these modules in such modes."""
    modules = [*prefix.ancestors.values(), *prefix.modules.values()]
    for module, training in zip(modules, wanted):  # noqa: B905
        module.training = training


def _modes(prefix: Prefix) -> list[tuple[str, nn.Module, bool]]:
    """Path, module and mode, of modules around the prefix and then of its own."""
    return [
        *((path, m, m.training) for path, m in prefix.ancestors.items()),
        *((path, m, m.training and not prefix.settled) for path, m in prefix.modules.items()),
    ]


def noise(prefix: Prefix) -> str:
    """What is random, or moves, in the prefix as it is; "" where nothing is."""
    for path, module, training in _modes(prefix):
        if not training:
            continue
        rate = module.__dict__.get("layer_drop") or 0
        if rate:
            where = join(path, "layer_drop")
            return f"{where} drops whole layers with probability {rate:g}; set it to 0"
        if path in prefix.ancestors:
            continue
        rate = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else 0
        rate = rate or module.__dict__.get("drop_prob") or 0
        if rate:
            return f"{path} ({type(module).__name__}) drops with probability {rate:g}"
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            return f"{path} ({type(module).__name__}) is in training mode: its statistics move"
    return ""


def recomputes(prefix: Prefix) -> str:
    """What computes activations again in the backward pass; "" where nothing does."""
    for path, module in prefix.ancestors.items():
        for name in ("grad_checkpointing", "gradient_checkpointing"):
            if module.__dict__.get(name) is True:
                return join(path, name)
    return ""
