"""The hook by which a forward is served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Hook:
    """A hook of one model, which copies of the model, and files of it, do not take along."""

    def __init__(self, call: Callable[..., Any] | None, root: nn.Module | None):
        self.call, self.root = call, root

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """Whatever the hook does, on its own model."""
        if self.call is not None and module is self.root:
            return self.call(module, *args)
        return None

    def __deepcopy__(self, memo: Any) -> Hook:
        return Hook(None, None)

    def __reduce__(self) -> Any:
        return Hook, (None, None)


def hooked(root: nn.Module) -> bool:
    """Whether a model has such a hook, not one that it was copied with."""
    hooks = root._forward_pre_hooks.values()
    return any(isinstance(hook, Hook) and hook.call is not None for hook in hooks)


def last(root: nn.Module, handle: Any) -> bool:
    """Whether this is the last of the model's hooks: later ones may give it other arguments."""
    return bool(next(reversed(root._forward_pre_hooks), None) == handle.id)


def eager() -> bool:
    """Whether nobody is watching, tracing or transforming this forward."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
    )
