"""Keys of state dicts that were written with, or without, a wrapper around the model or its parts.

`torch.compile` adds ``_orig_mod.`` to names, DataParallel and DistributedDataParallel ``module.``.
Adapters, files and reports have the names of the unwrapped model; a state dict has the wrappers'.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_lightning.lora.module_tree import every_name, inner_name, join

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module)\.")


def look_through(model: nn.Module) -> None:
    """Let a wrapper load the state dicts of what it wraps; of other models nothing is changed."""
    if inner_name(model) and _rename not in [
        getattr(hook, "hook", hook) for hook in model._load_state_dict_pre_hooks.values()
    ]:
        model.register_load_state_dict_pre_hook(_rename)  # type: ignore[no-untyped-call]


def _rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    to_own(state_dict, prefix, to_plain(module, state_dict, prefix))


def to_plain(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> dict[str, str]:
    """Rename the keys to those of the unwrapped model.

    Returns:
        Plain → own key of the module's tensors, for `to_own`; empty where nothing is wrapped.
    """
    own = {
        join(path, name): join(whole, name)
        for path, whole, part in every_name(module)
        for name in (*part._parameters, *part._buffers)
    }
    plain = {real: name for name, real in own.items()}
    bare = {_WRAPPERS.sub("", name): name for name in own}
    names = {}
    for key in [k[len(prefix) :] for k in state_dict if k.startswith(prefix)]:
        if key not in own and (stripped := _WRAPPERS.sub("", key)) != key:
            names[key] = plain.get(key) or bare.get(stripped, key)
    to_own(state_dict, prefix, names)
    return own if any(name != real for name, real in own.items()) else {}


def to_own(state_dict: dict[str, Any], prefix: str, names: Mapping[str, str]) -> None:
    """Rename keys, where the new one is free."""
    for old, new in names.items():
        if old != new and prefix + old in state_dict and prefix + new not in state_dict:
            state_dict[prefix + new] = state_dict.pop(prefix + old)
