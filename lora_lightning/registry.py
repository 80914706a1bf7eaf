"""`Registry`: tables of things by name, to which users and other packages can add.

    RULES: Registry[Rule] = Registry("rank rule")

    @RULES.register("explained-variance")
    def by_explained_variance(...): ...

Another package adds to them from a module that it names as an entry point of the group
`lora_lightning.plugins`; these are imported where a name is not known otherwise, or all are listed.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from lora_lightning.errors import ConfigError

T = TypeVar("T")
Added = TypeVar("Added")


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist, with the nearest ones that do."""
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
        """Decorator that adds a thing by this name; raises ConfigError where that is taken."""

        def add(thing: Added) -> Added:
            if self._known.setdefault(name, thing) is not thing:
                raise ConfigError(f"there is another {self.kind} called {name!r}")
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
