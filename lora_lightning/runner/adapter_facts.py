"""`print_facts`: what an adapter file, or a model's, holds, for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lora_lightning.model.adapter_file.container import contents
from lora_lightning.model.adapter_file.data_config import DATA
from lora_lightning.model.adapter_file.format import parsed
from lora_lightning.model.adapter_file.hub import fetched
from lora_lightning.model.adapter_file.save import read_header
from lora_lightning.model.adapter_file.schema import check


def print_facts(path: Path, console: Console) -> None:
    """Print what an adapter file holds, or one with a model's weights that says what it is for.

    Raises:
        AdapterFileError: the file is missing, damaged, or neither.
    """
    path = fetched(path)
    metadata, weights = contents(path)
    if data := _model_data(metadata, path):
        numbers = sum(tensor.numel() for tensor in weights.values())
        size = f"{len(weights)} tensors of a whole model, {numbers:,} numbers"
        console.print(_facts(path, {"weights": size, **_data(data)}))
        return
    header = read_header(path)
    versions = ", ".join(f"{k} {v}" for k, v in header.get("versions", {}).items())
    base = ", ".join(f"{k} {v}" for k, v in header["base"].items())
    settings = ", ".join(f"{k}={as_typed(v)}" for k, v in header["config"].items())
    whole = ", ".join([*header["extras"], *header["buffers"]]) or "–"
    facts = {
        "adapter": f"{header['name']} (format {header['format_version']})",
        "base": base,
        "made with": versions,
        "settings": settings,
        "in full": whole,
        **_data(header.get("data", {})),
    }
    console.print(_facts(path, facts))
    console.print(_targets(header))


def _facts(path: Path, facts: dict[str, str]) -> Table:
    table = Table(Column(), Column(overflow="fold"), box=None, show_header=False, pad_edge=False)
    for key, value in {"file": f"{path} ({path.stat().st_size:,} bytes)", **facts}.items():
        table.add_row(Text(key, style="bold"), Text(value))
    return table


def _model_data(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What the file of a whole model says of its items and classes; empty for other files."""
    data = parsed(metadata, "data", path) or {}
    if built := parsed(metadata, "recogniser", path):
        rate = dict(built.get("settings") or {}).get("sample_rate")
        data = {"labels": built.get("labels"), "sample_rate": rate}
    check(DATA, data, "the header", path)
    return data


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
    if labels := data.get("labels"):
        symbols = "".join(f"⟨{s}⟩" if len(s) != 1 else s for s in labels["symbols"][:100])
        blank = labels["blank"]
        facts["labels"] = f"{len(labels['symbols'])}: {symbols!r}, class {blank} is the blank"
    if "sample_rate" in data:
        facts["sound"] = f"{data['sample_rate']:,} Hz"
    return facts


def as_typed(value: Any) -> str:
    """A value as it is written after ``key=``."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(as_typed, value))}]"
    return str(value)
