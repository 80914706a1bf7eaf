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


def join(path: str, name: str) -> str:
    """The dotted path of `name` under `path`, either of which may be empty."""
    return f"{path}.{name}" if path and name else path or name
