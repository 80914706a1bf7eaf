"""Validation of settings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_lightning.errors import ConfigError


def plain(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings in a mapping, also an OmegaConf one; an empty dictionary for None."""
    if config is None:
        return {}
    if type(config).__module__.startswith("omegaconf"):
        from omegaconf import OmegaConf

        return dict(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    return dict(config)


def patterns(key: str, value: Any) -> list[str]:
    """A list of pattern strings from a string, a class, or an iterable of both."""
    if isinstance(value, (str, type)):
        value = [value]
    if value is None or isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise ConfigError(f"{key} must be a string, a class or a list of them, got {value!r}")
    found = []
    for item in value:
        if isinstance(item, type):
            item = f"type:{item.__module__}.{item.__qualname__}"
        if not isinstance(item, str) or not item.strip():
            raise ConfigError(f"{key} holds {item!r}; expected a pattern (a string) or a class")
        found.append(item)
    return found


def keyed(key: str, mapping: Any) -> dict[str, Any]:
    """Name of each value in errors → the value."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{key} must map patterns to numbers, got {mapping!r}")
    return {f"{key}[{pattern!r}]": value for pattern, value in mapping.items()}


def check_choice(key: str, value: Any, choices: Collection[str]) -> None:
    """Raise ConfigError for a value that is not one of these names."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def is_whole(value: Any) -> bool:
    """Whether this is a whole number; True is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Whether this is a number; True is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
