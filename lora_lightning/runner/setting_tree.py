"""The tree of a recipe's settings, and what is said of a value that does not fit into it."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_lightning.errors import ConfigError

RESOLVERS = "LORA_LIGHTNING_RESOLVERS"  # set where recipes may call resolvers
_REFERENCE = re.compile(r"\$\{[^{}:]*\}")
_CALL = re.compile(r"\$\{[^{}]*:[^{}]*\}?")


def settings(config: DictConfig, prefix: str = "") -> dict[str, Any]:
    """Dotted key → value of every setting."""
    found: dict[str, Any] = {}
    for key in map(str, config):
        value, path = config[key], f"{prefix}{key}"
        if isinstance(value, DictConfig) and is_dataclass(OmegaConf.get_type(value)):
            found |= settings(value, f"{path}.")
        else:
            found[path] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return found


def leaves(given: Any, prefix: str = "") -> Iterator[str]:
    """Dotted key of each value in nested dictionaries, lists included."""
    for key, value in given.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def inside_free(key: str, config: DictConfig) -> bool:
    """Whether a key is in a mapping with free keys, such as `rank_pattern`."""
    return any(key.startswith(f"{k}.") for k, v in settings(config).items() if isinstance(v, dict))


def explained(error: Exception, config: DictConfig, given: Any) -> str:
    """What is said of values, `given`, that `config` does not take."""
    if said := misfit(config, OmegaConf.to_container(given)):
        return said
    key, first = getattr(error, "full_key", None) or "", str(error).splitlines()[0]
    if isinstance(OmegaConf.select(config, key) if key else None, DictConfig) or (
        "not a subclass" in first
    ):
        return "this is a group of settings; set those in it, one by one"
    return f"{key}: {first}" if key else first


def misfit(config: DictConfig, given: Any, prefix: str = "") -> str | None:
    """What is said of the first list, mapping or single value that should be another of these."""
    hints = typing.get_type_hints(OmegaConf.get_type(config) or object)
    for key, value in given.items() if isinstance(given, dict) else ():
        hint, name = hints.get(key, Any), f"{prefix}{key}"
        if is_dataclass(hint):
            if said := misfit(config[key], value, f"{name}."):
                return said
            continue
        form = next((t for t in (list, dict) if f"{t.__name__}[" in str(hint)), None)
        reference = isinstance(value, str) and "${" in value
        found = next((t for t in (list, dict) if isinstance(value, t)), None)
        nested = found is list and [v for v in value if isinstance(v, list | dict)]
        if hint is Any or value is None or reference or (found is form and not nested):
            continue
        return f"{name} must be {_example(form, config[key])}; got {value!r:.100}"
    return None


def _example(form: type | None, now: Any) -> str:
    if form is list:
        return f"a list, such as [{', '.join(map(str, now or ['a', 'b']))}]"
    return "a mapping, such as {a: 1}" if form is dict else f"one value, such as {now or 'a'}"


def refuse_calls(given: DictConfig, path: Path) -> None:
    """Raise ConfigError where a value calls a resolver, as ``${oc.env:TOKEN}`` does.

    Recipes are shared, and a report shows what is in them.
    """
    if os.environ.get(RESOLVERS):
        return
    for key, value in _texts(OmegaConf.to_container(given)):
        before = ""
        while before != value:  # from the inside out
            before, value = value, _REFERENCE.sub("_", value)
            if called := _CALL.search(before):
                raise ConfigError(
                    f"{path}: {key} holds {called[0]}, which is not resolved: a recipe could read "
                    f"your environment with it. Give {key}=… on the command line, or set "
                    f"{RESOLVERS}=1 if you trust the recipe"
                )


def _texts(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key → each text in nested mappings and lists."""
    if isinstance(node, str):
        yield prefix, node
    elif isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _texts(value, f"{prefix}.{key}".lstrip("."))
