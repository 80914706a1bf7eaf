"""Descriptions of a recipe's settings, from its recipe.yaml or from docstrings."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

from omegaconf import OmegaConf

from lora_lightning.runner.loading import find_recipe, load_recipe


def comments(name: str | Path) -> dict[str, str]:
    """Dotted key → description: from recipe.yaml, else from the configuration's docstring."""
    config = load_recipe(name)
    said = dict(_docstrings(OmegaConf.get_type(config) or object))
    return said | yaml_comments(find_recipe(name).read_text(encoding="utf-8"))


def yaml_comments(text: str) -> dict[str, str]:
    """Dotted key → its comment: the lines above it, and the one at its end."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    above: list[str] = []
    for line in text.splitlines():
        key = re.match(r"( *)([A-Za-z_]\w*):(?: .*?| *)(?:\s#\s*(.*))?$", line)
        if key is None:
            note = re.match(r" *# ?(.*)", line)
            above = [*above, note[1]] if note else []  # an empty line ends a comment
            continue
        indent = len(key[1])
        path = [(i, k) for i, k in path if i < indent] + [(indent, key[2])]
        comment = " ".join([*above, key[3] or ""]).strip()
        if comment:
            found[".".join(k for _, k in path)] = comment
        above = []
    return found


def _docstrings(cls: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key → the first sentence of its entry in the dataclass's docstring."""
    hints = typing.get_type_hints(cls)
    # Fields of a base class need not be described again.
    bases = [inspect.cleandoc(base.__doc__ or "") for base in reversed(cls.__mro__)]
    said = {name: text for doc in bases for name, text in _entries(doc).items()}
    for field in fields(cls) if is_dataclass(cls) else ():
        if is_dataclass(hints[field.name]):
            yield from _docstrings(hints[field.name], f"{prefix}{field.name}.")
        elif field.name in said:
            first = re.split(r"\. (?=[A-Z])", said[field.name])[0]
            yield f"{prefix}{field.name}", first.rstrip(".").replace("`", "")


def _entries(doc: str) -> dict[str, str]:
    """Name → text of each indented ``name: text``, lines that go on indented further."""
    found: dict[str, str] = {}
    name = ""
    for line in doc.splitlines():
        if entry := re.match(r" {4}(\w+): (.+)", line):
            name, found[entry[1]] = entry[1], entry[2]
        elif name and line.startswith(" " * 8):
            found[name] += f" {line.strip()}"
        else:
            name = ""
    return found
