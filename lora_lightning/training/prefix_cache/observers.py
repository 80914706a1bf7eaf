"""Who looks at a module besides its caller: hooks, and readers of what it leaves in attributes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_TABLES = ("_parameters", "_buffers", "_modules")
_PLAIN = (int, float, str, type(None), torch.dtype)  # bool is an int


def observed(module: nn.Module) -> bool:
    """Whether someone looks at what the module is given or gives."""
    return bool(module._forward_hooks) or len(_own_hooks(module)) < len(module._forward_pre_hooks)


def _own_hooks(module: nn.Module) -> dict[int, Any]:
    """Hooks by which torch computes weights: they are part of the module."""
    hooks = module._forward_pre_hooks
    return {i: h for i, h in hooks.items() if type(h).__module__.startswith("torch.nn.utils")}


@contextmanager
def silenced(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block nobody looks at these modules: a trial forward is none of their business."""
    kept = [(m, m._forward_hooks, m._forward_pre_hooks) for m in modules if observed(m)]
    for module, _, _ in kept:
        module._forward_pre_hooks = OrderedDict(_own_hooks(module))
        module._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for module, after, before in kept:
            module._forward_hooks, module._forward_pre_hooks = after, before


def left(module: nn.Module) -> list[tuple[Tensor, int]]:
    """Tensors in plain attributes of a module, in lists and dicts too, with their versions."""
    values = [value for name, value in vars(module).items() if name not in _TABLES]
    return [(x, version(x)) for x in tree_leaves(values) if isinstance(x, Tensor)]


def wrote(before: list[tuple[Tensor, int]], after: list[tuple[Tensor, int]]) -> bool:
    """Whether a tensor was put in an attribute, or written to there, between two looks."""
    return len(before) != len(after) or any(
        a is not b or i != j for (a, i), (b, j) in zip(before, after, strict=True)
    )


def version(tensor: Tensor) -> int:
    """How often a tensor was written to, as far as torch counts it."""
    return 0 if tensor.is_inference() else int(tensor._version)


def attributes(module: nn.Module) -> dict[str, Any]:
    """Plain attributes that a forward may read: numbers, strings, flags and tensors.

    Without `training`, and without weights that torch computes anew before each forward.
    """
    computed = {
        "training",
        "_is_full_backward_hook",
        *(getattr(h, "name", None) for h in _own_hooks(module).values()),
    }
    return {
        name: value
        for name, value in vars(module).items()
        if name not in computed and (isinstance(value, Tensor) or _plain(value))
    }


def _plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_plain, value)))
