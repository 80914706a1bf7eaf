"""How names become things: tables to which this package, a user and other packages add by name.

    INITIALISATIONS: Registry[Method] = Registry("initialisation")

    @INITIALISATIONS.register("svd")
    def svd(...): ...

Another package adds to them from a module that it names as an entry point of the group
`lora_lightning.plugins`; such modules are imported when a name is not known otherwise.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from lora_lightning.errors import ConfigError

PLUGINS = "lora_lightning.plugins"
T = TypeVar("T")


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist, with the nearest ones that do."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
    return f"unknown {kind} {name!r}; {hint}"


class Registry(Generic[T]):
    """Name → thing, in the order in which they were registered.

    Args:
        kind: What its things are called in an error.
    """

    _plugins_are_loaded = False  # of all registries together

    def __init__(self, kind: str):
        self.kind = kind
        self._known: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a thing by this name; raises ConfigError where that is taken."""

        def add(thing: T) -> T:
            if self._known.setdefault(name, thing) is not thing:
                raise ConfigError(f"there is another {self.kind} called {name!r}")
            return thing

        return add

    def get(self, name: str) -> T:
        """The thing of this name; raises ConfigError with the nearest names where there is none."""
        if name not in self:
            raise ConfigError(unknown(self.kind, name, self._known))
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._known:
            Registry._load_plugins()
        return name in self._known

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    @staticmethod
    def _load_plugins() -> None:
        if not Registry._plugins_are_loaded:
            Registry._plugins_are_loaded = True  # first: a plugin may look a name up
            from importlib.metadata import entry_points

            for plugin in entry_points(group=PLUGINS):
                plugin.load()
