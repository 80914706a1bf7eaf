"""Patterns by which users name modules.

=====================  ==========================================================
``"qkv"``              a name: the full dotted path, or its last whole components
``"blocks.*.mlp.fc?"`` a glob over the same (``*`` crosses dots)
``"re:.*attn\\.(q|k)"`` a regular expression for the full path, from end to end
``"type:Linear"``      a class by name or dotted path, subclasses included
=====================  ==========================================================
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import re
from dataclasses import dataclass

from torch import nn

from lora_lightning.errors import TargetError
from lora_lightning.lora.module_tree import join

KEYWORDS = ("auto", "all")  # no patterns, see `lora_lightning.model.targets`


@dataclass(frozen=True)
class Target:
    """One tensor to adapt: the module's path, the tensor's name on it, and how it is seen."""

    name: str
    module: nn.Module
    tensor: str
    bare: bool = False

    @property
    def path(self) -> str:
        """Full dotted name of the tensor."""
        return join(self.name, self.tensor)

    def hit_by(self, pattern: str) -> bool:
        """Whether a pattern names the module or the tensor."""
        return matches(pattern, self.name, self.module) or matches(pattern, self.path)


def matches(pattern: str, name: str, module: nn.Module | None = None) -> bool:
    """Whether a pattern of the table above matches a dotted name (and its module)."""
    if pattern.startswith("re:"):
        return _compiled(pattern).fullmatch(name) is not None
    if pattern.startswith("type:"):
        return module is not None and _is_type(module, pattern[5:])
    return _glob(pattern).match(name) is not None


def _is_type(module: nn.Module, name: str) -> bool:
    if "." not in name:
        return any(cls.__name__ == name for cls in type(module).__mro__)
    where, _, attribute = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(where), attribute)
    except (ImportError, AttributeError) as error:
        raise TargetError(f"type:{name} cannot be imported: {error}") from error
    return isinstance(module, cls)


@functools.lru_cache(1024)
def _glob(pattern: str) -> re.Pattern[str]:
    """For a whole name, or its last components from a dot on."""
    return re.compile(rf"(?s:.*\.)?{fnmatch.translate(pattern)}")


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern[3:])
    except re.error as error:
        raise TargetError(f"{pattern!r} is no regular expression: {error}") from error
