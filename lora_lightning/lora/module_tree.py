"""Fast traversal of a module tree: torch's own generator recurses for every element."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import nn

Children = Mapping[str, nn.Module | None]
Modules = list[tuple[str, nn.Module]]
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module within `torch.compile`, DataParallel and DistributedDataParallel."""
    inside = inner_name(module)
    return module if not inside else unwrapped(module._modules[inside])  # type: ignore[arg-type]


def inner_name(module: nn.Module) -> str:
    """The name of the module that this one wraps; empty where it wraps none."""
    if "_orig_mod" in module._modules:
        return "_orig_mod"
    return "module" if isinstance(module, _PARALLEL) else ""


def walk(model: nn.Module, children: Callable[[nn.Module], Children] | None = None) -> Modules:
    """(dotted path, module) of every module once, in the order of ``named_modules``.

    What wraps a module is left out, so that paths are the unwrapped model's: see `unwrapped`.
    `children` selects which of a module's children are visited; default: all.
    """
    model = unwrapped(model)
    found: Modules = [("", model)]
    seen = {id(model)}

    def visit(prefix: str, module: nn.Module) -> None:
        below = module._modules if children is None else children(module)
        for name, child in below.items():
            if child is None:
                continue
            child = unwrapped(child)
            if id(child) in seen:
                continue
            seen.add(id(child))
            path = prefix + name
            found.append((path, child))
            if child._modules:  # most have none
                visit(f"{path}.", child)

    visit("", model)
    return found


def every_name(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(path as in `walk`, path with what wraps modules, module) under each of its names."""

    def visit(path: str, whole: str, module: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        while inside := inner_name(module):
            whole, module = join(whole, inside), module._modules[inside]  # type: ignore[assignment]
        yield path, whole, module
        for name, child in module._modules.items():
            if child is not None:
                yield from visit(join(path, name), join(whole, name), child)

    return visit("", "", model)


def find(model: nn.Module, path: str) -> nn.Module:
    """A fast ``get_submodule``, by the tables of children rather than by attributes.

    Raises:
        AttributeError: there is no such module.
    """
    module = unwrapped(model)
    for name in path.split(".") if path else ():
        children = module._modules  # TorchScript's has no `get`
        child = children[name] if name in children else None  # noqa: SIM401
        if child is None:
            return model.get_submodule(path)  # an attribute, or its error
        module = unwrapped(child)
    return module


def join(path: str, name: str) -> str:
    """The dotted path of `name` under `path`, either of which may be empty."""
    return f"{path}.{name}" if path and name else path or name
