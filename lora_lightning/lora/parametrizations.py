"""Parametrised weights: weight norm, old and new style.

The adapter acts on the computed weight, W' = g·v/‖v‖ + s·BA. Merging writes W' back into g
and v, which weight norm can hold exactly up to rounding; other reparametrisations cannot, and
are refused by name (`refusal`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm


def refusal(module: nn.Module, tensor: str) -> str | None:
    """The reason why an adapter of this tensor cannot be merged; ``None`` where it can."""
    if parametrize.is_parametrized(module, tensor):
        steps: Any = module.parametrizations[tensor]  # type: ignore[index]
        if len(steps) == 1 and isinstance(steps[0], _WeightNorm):
            return None
        names = ", ".join(type(step).__name__ for step in steps)
        return (
            f"{tensor} is parametrised by {names}, into which a merged weight cannot be written; "
            "call torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if tensor in module._parameters or _weight_norm_hook(module, tensor) is not None:
        return None
    hooks = [type(h).__name__ for h in module._forward_pre_hooks.values()]
    return (
        f"{tensor} is computed by a forward hook ({', '.join(hooks) or 'unknown'}), into which a "
        "merged weight cannot be written; remove that hook first (remove_spectral_norm, "
        "prune.remove, …)"
    )


def originals(module: nn.Module, tensor: str, value: Tensor) -> dict[str, Tensor]:
    """The values that the parameters behind `tensor` must take for it to equal `value`."""
    if parametrize.is_parametrized(module, tensor):
        steps: Any = module.parametrizations[tensor]  # type: ignore[index]
        pair = steps[0].right_inverse(value)
        return {f"parametrizations.{tensor}.original{i}": t.clone() for i, t in enumerate(pair)}
    hook = _weight_norm_hook(module, tensor)
    if hook is not None:
        norm = torch.norm_except_dim(value, 2, hook.dim)
        return {f"{tensor}_g": norm, f"{tensor}_v": value}
    return {tensor: value}


def locate(module: nn.Module, key: str) -> Any:
    """The parameter under this dotted key."""
    path, _, name = key.rpartition(".")
    return module.get_submodule(path)._parameters[name]


def place(module: nn.Module, key: str, parameter: nn.Parameter) -> None:
    """Set a parameter under this dotted key, without its class's `__setattr__`."""
    path, _, name = key.rpartition(".")
    module.get_submodule(path)._parameters[name] = parameter


def recompute(module: nn.Module, tensor: str) -> None:
    """Bring the old weight-norm hook's cached weight up to date with g and v."""
    hook = _weight_norm_hook(module, tensor)
    if hook is not None and tensor in module.__dict__:
        module.__dict__[tensor] = hook.compute_weight(module)


def _weight_norm_hook(module: nn.Module, tensor: str) -> WeightNorm | None:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == tensor:
            return hook
    return None
