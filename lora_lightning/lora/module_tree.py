"""Fast traversal of a module tree: torch's own generator recurses for every element."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

Children = Mapping[str, nn.Module | None]
Modules = list[tuple[str, nn.Module]]


def walk(model: nn.Module, children: Callable[[nn.Module], Children] | None = None) -> Modules:
    """(dotted path, module) of every module once, in the order of ``named_modules``.

    `children` selects which of a module's children are visited; default: all.
    """
    found: Modules = [("", model)]
    seen = {id(model)}

    def visit(prefix: str, module: nn.Module) -> None:
        below = module._modules if children is None else children(module)
        for name, child in below.items():
            if child is None or id(child) in seen:
                continue
            seen.add(id(child))
            path = prefix + name
            found.append((path, child))
            if child._modules:  # most have none
                visit(f"{path}.", child)

    visit("", model)
    return found


def find(model: nn.Module, path: str) -> nn.Module:
    """A fast ``get_submodule``, by the tables of children rather than by attributes.

    Raises:
        AttributeError: there is no such module.
    """
    module = model
    for name in path.split(".") if path else ():
        children = module._modules  # TorchScript's has no `get`
        child = children[name] if name in children else None  # noqa: SIM401
        if child is None:
            return model.get_submodule(path)  # an attribute, or its error
        module = child
    return module


def join(path: str, name: str) -> str:
    """The dotted path of `name` under `path`, either of which may be empty."""
    return f"{path}.{name}" if path and name else path or name
