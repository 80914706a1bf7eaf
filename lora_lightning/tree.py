"""Walking a module tree quickly: `torch`'s own generator recurses for every element."""

from __future__ import annotations

from torch import nn


def walk(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(dotted path, module) of every module once, in the order of ``named_modules``."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((path, module))
        prefix = f"{path}." if path else ""
        children = [(prefix + n, m) for n, m in module._modules.items() if m is not None]
        stack.extend(reversed(children))
    return found
