"""`all_or_nothing`: a model that is changed as a whole, or stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_lightning.model.state import states_in
from lora_lightning.model.view import View

# Tables of a module that change with its adapters; those of the model's own hooks.
_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = (
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_Tables = list[tuple[Any, Any]]  # (container, a copy of what was in it)


@contextmanager
def all_or_nothing(view: View, name: str | None = None) -> Iterator[None]:
    """Within the block an adapter is put on, replaced or merged; what is raised undoes all of it.

    Whatever it is: a full memory and Ctrl-C included. The model is then what it was, bit for bit
    and object by object.

    Args:
        view: Of the model, as it is before.
        name: The adapter that is added, or replaced: its factors may be written to in place.
    """
    before = _Before(view, name)
    try:
        yield
    except BaseException:
        before.restore()
        raise


class _Before:
    """What a model was: its modules' tables, its tensors' values and flags, its adapters' state.

    Values of the base are kept by reference, as nothing writes into them; those of the adapter
    `name` are copied.
    """

    def __init__(self, view: View, name: str | None):
        self.classes = [(module, type(module)) for _, module in view.modules]
        self.tables: _Tables = []
        self.tensors = [(t, t.data, t.requires_grad) for t in view.tensors.values()]
        self.written: list[tuple[Any, Any, Any]] = []  # (factor, a copy of its values, gradient)
        for _, module in view.modules:
            self._keep_module(module)
        self._keep(*(view.model.__dict__.get(key, {}) for key in _HOOKS))
        for _, state in states_in(view):
            fields = vars(state)
            self._keep(fields, *(v for v in fields.values() if isinstance(v, (dict, list, set))))
            self._keep(*state.kinds.values())
        self.added: list[tuple[dict[str, Any], str]] = []
        for layer in view.adapted.values():
            self._keep_factors(layer, name)

    def _keep(self, *containers: Any) -> None:
        for each in containers:
            self.tables.append((each, each.copy()))

    def _keep_module(self, module: nn.Module) -> None:
        fields = module.__dict__
        tables = [fields.get(key) for key in _TABLES]
        self._keep(fields, *[t for t in tables if isinstance(t, dict)])  # TorchScript has others

    def _keep_factors(self, layer: Any, name: str | None) -> None:
        per_adapter, active = layer.lora._modules, layer.lora_active
        for of in {active, name}:
            for factors in layer.factors_of(of).values():
                self.tensors += [(t, t.data, t.requires_grad) for t in factors.tensors().values()]
        if name is None or name not in per_adapter:  # thousands of others are not copied
            self.added += [(per_adapter, name)] if name is not None else []
            return
        self._keep(per_adapter)
        for module in per_adapter[name].modules():
            self._keep_module(module)
        for factors in layer.factors_of(name).values():
            own = factors.tensors().values()
            self.written += [(t, t.detach().clone(), t.grad) for t in own]

    @torch.no_grad()
    def restore(self) -> None:
        """Make the model what it was."""
        for per_adapter, name in self.added:
            per_adapter.pop(name, None)
        for module, cls in self.classes:
            object.__setattr__(module, "__class__", cls)
        for container, copy in self.tables:
            _put_back(container, copy)
        for tensor, data, requires_grad in self.tensors:
            tensor.data = data
            tensor.requires_grad_(requires_grad)
        for tensor, values, gradient in self.written:
            tensor.data.copy_(values)
            tensor.grad = gradient


def _put_back(container: Any, copy: Any) -> None:
    if isinstance(container, list):
        container[:] = copy
    else:
        container.clear()
        container.update(copy)
