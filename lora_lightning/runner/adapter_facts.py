"""`print_facts`: what an adapter file holds, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lora_lightning.model.adapter_file.save import read_header


def print_facts(path: Path, console: Console) -> None:
    """Print what an adapter file holds.

    Args:
        path: Of the file.
        console: On which.
    """
    header = read_header(path)
    facts = Table(Column(), Column(overflow="fold"), box=None, show_header=False, pad_edge=False)
    versions = ", ".join(f"{k} {v}" for k, v in header.get("versions", {}).items())
    base = ", ".join(f"{k} {v}" for k, v in header["base"].items())
    settings = ", ".join(f"{k}={as_typed(v)}" for k, v in header["config"].items())
    whole = ", ".join([*header["extras"], *header["buffers"]]) or "–"
    for key, value in {
        "file": f"{path} ({path.stat().st_size:,} bytes)",
        "adapter": f"{header['name']} (format {header['format_version']})",
        "base": base,
        "made with": versions,
        "settings": settings,
        "in full": whole,
        **_data(header.get("data", {})),
    }.items():
        facts.add_row(Text(key, style="bold"), Text(value))
    console.print(facts)
    console.print(_targets(header))


def _targets(header: dict[str, Any]) -> Table:
    table = Table(title=f"{len(header['targets'])} adapted tensors", title_justify="left")
    for column in ("tensor", "kind", "path"):
        table.add_column(column, overflow="fold")
    for column in ("shape", "rank"):
        table.add_column(column, justify="right")
    for t in header["targets"]:
        where = f"{t['module']}.{t['tensor']}".lstrip(".")
        shape = "×".join(map(str, t["shape"]))
        table.add_row(*map(Text, (where, t["kind"], t["path"], shape, str(t["rank"]))))
    return table


def _data(data: dict[str, Any]) -> dict[str, str]:
    """What a header says of classes and pictures."""
    facts: dict[str, str] = {}
    if names := data.get("class_names", []):
        more = " …" if len(names) > 20 else ""
        facts["classes"] = f"{len(names)}: {', '.join(names[:20])}{more}"
    if "input_size" in data:
        _, height, width = data["input_size"]
        others = [f"{key} {as_typed(data[key])}" for key in ("mean", "std") if key in data]
        if "crop_pct" in data:
            others.insert(0, f"{data['crop_pct']:g} of the resized side")
        resized = [data["interpolation"]] if "interpolation" in data else []
        facts["pictures"] = ", ".join([f"{height} × {width} pixels", *resized, *others])
    return facts


def as_typed(value: Any) -> str:
    """A value as it is written after ``key=``."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(as_typed, value))}]"
    return str(value)
