"""`Registry`: tables of things by name, to which users and other packages can add; `face`.

    RULES: Registry[Rule] = Registry("rank rule")

    @RULES.register("explained-variance")
    def by_explained_variance(...): ...

Another package adds to them from a module that it names as an entry point of the group
`lora_lightning.plugins`; these are imported where a name is not known otherwise, or all are listed.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from lora_lightning.errors import ConfigError

T = TypeVar("T")
Added = TypeVar("Added")


def face(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], Any]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose names are imported on first use.

    They stand in the `__init__.pyi` beside `file`, each as ``from .home import name as name``. None
    may be that of a file beside it, which would take its place once somebody imports the file.
    """
    with open(os.path.splitext(file)[0] + ".pyi", encoding="utf-8") as stub:
        told = [line.split() for line in stub if line.startswith("from ")]
    homes = {name: home for _, home, _, name, *_ in told}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        thing = getattr(importlib.import_module(homes[name], package), name)
        setattr(sys.modules[package], name, thing)
        return thing

    return get, lambda: sorted(homes), sorted(homes)


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist, with the nearest ones that do."""
    import difflib

    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
    return f"unknown {kind} {name!r}; {hint}"


class Registry(Generic[T]):
    """Name → thing, in the order in which they were registered; those of plugins come last.

    Args:
        kind: What its things are called in an error.
    """

    _plugins_are_loaded = False  # of all registries together

    def __init__(self, kind: str):
        self.kind = kind
        self._known: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[Added], Added]:
        """Decorator that adds a thing by this name; raises ConfigError where that is taken.

        The same function or class once more, as from a notebook's cell, takes its own place.
        """

        def add(thing: Added) -> Added:
            if _origin(self._known.setdefault(name, thing)) != _origin(thing):
                raise ConfigError(f"there is another {self.kind} called {name!r}")
            self._known[name] = thing
            return thing

        return add

    def get(self, name: str) -> T:
        """The thing of this name; raises ConfigError with the nearest names where there is none."""
        if name not in self:
            raise ConfigError(unknown(self.kind, name, self._known))
        return self._known[name]  # type: ignore[no-any-return]

    __getitem__ = get

    def items(self) -> Iterator[tuple[str, T]]:
        """All of them, each with its name."""
        return ((name, self._known[name]) for name in self)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):  # a list, say, cannot be looked up
            return False
        if name not in self._known:
            Registry._load_plugins()
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        Registry._load_plugins()
        return iter(self._known)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @staticmethod
    def _load_plugins() -> None:
        from importlib.metadata import entry_points

        # Noted first: a plugin may look a name up.
        loaded, Registry._plugins_are_loaded = Registry._plugins_are_loaded, True
        for plugin in () if loaded else entry_points(group="lora_lightning.plugins"):
            try:
                plugin.load()
            except Exception as error:  # whatever another package's code may raise
                warnings.warn(f"plugin {plugin.name!r} cannot be used: {error!r}", stacklevel=2)


def _origin(thing: Any) -> Any:
    """Where a function, a class or what holds them was written; other things are themselves."""
    if hasattr(type(thing), "__dataclass_fields__"):
        return type(thing), _origin(tuple(vars(thing).values()))
    if isinstance(thing, tuple):
        return [_origin(part) for part in thing]
    name = getattr(thing, "__qualname__", "<locals>")
    return thing if "<locals>" in name else (thing.__module__, name)
