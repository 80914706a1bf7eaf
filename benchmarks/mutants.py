"""Mutants of real files, for `fuzz.py`: one thing changed in each."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from lora_lightning.model.adapter_file.format import checksum

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 3, 2**31, 10**400, 0.5, 1e20, -2.0, float("nan"), float("inf"), "", "x",
    "2", "nothing", "re:(", "\x1b[31m", "[/]", "x" * 5000, "\ud800", [], [1], [[]], {}, {"a": 1},
    ["re:(a+)+$"], [None], ["nothing"],
)  # fmt: skip
Parts = tuple[dict[str, torch.Tensor], dict[str, Any]]


class Files:
    """A real file, and mutants of it."""

    def __init__(self, path: Path, key: str, draw: random.Random):
        self.data, self.key, self.draw = path.read_bytes(), key, draw
        self.begin = 8 + int.from_bytes(self.data[:8], "little")
        self.metadata = json.loads(self.data[8 : self.begin])["__metadata__"]

    def mutant(self) -> tuple[str, bool, bytes]:
        """What was changed, whether it has a checksum of its own contents, the file."""
        kinds: list[Callable[[], tuple[str, bool, bytes]]] = [self._bytes, self._container]
        kinds += [self._header, self._tensors] * 2
        return self.draw.choice(kinds)()

    def _bytes(self) -> tuple[str, bool, bytes]:
        data, draw = bytearray(self.data), self.draw
        kind = draw.choice(
            ["bit of data", "bit of header", "bytes", "cut", "more", "noise", "zeros"]
        )
        if kind == "bit of data":
            data[draw.randrange(self.begin, len(data))] ^= 1 << draw.randrange(8)
        elif kind == "bit of header":
            data[draw.randrange(self.begin)] ^= 1 << draw.randrange(8)
        elif kind == "bytes":
            for _ in range(draw.randrange(1, 20)):
                data[draw.randrange(len(data))] = draw.randrange(256)
        elif kind == "cut":
            del data[draw.randrange(len(data)) :]
        elif kind == "more":
            data += bytes(draw.randrange(1, 2000))
        elif kind == "noise":
            data = bytearray(draw.randbytes(draw.randrange(2000)))
        else:
            start = draw.randrange(len(data))
            end = min(len(data), start + 4096)
            data[start:end] = bytes(end - start)
        return kind, False, bytes(data)

    def _container(self) -> tuple[str, bool, bytes]:
        draw, entries = self.draw, json.loads(self.data[8 : self.begin])
        names = [name for name in entries if name != "__metadata__"]
        name = draw.choice(names)
        field = draw.choice(
            ["dtype", "shape", "data_offsets", "swap", "metadata", "length", "deep"]
        )
        if field == "swap":
            other = draw.choice(names)
            entries[name], entries[other] = entries[other], entries[name]
        elif field == "metadata":
            entries["__metadata__"] = draw.choice(
                [{}, [], {self.key: draw.choice(["", "{", "[]"])}]
            )
        elif field not in ("length", "deep"):
            odd = ["F8_E4M3", "I32", "BOOL", "F64", [2**62, 4], [0], [-1, 4], [0, 2**63], *ODD]
            entries[name][field] = draw.choice(odd)
        head = json.dumps(entries).encode()
        if field == "deep":
            head = b'{"a":' + b"[" * draw.choice([100, 10**5, 3 * 10**7])
        head += b" " * (-len(head) % 8)
        length = draw.choice([2**63, 10**8, 0, 9]) if field == "length" else len(head)
        return (
            f"container: {field}",
            False,
            length.to_bytes(8, "little") + head + self.data[self.begin :],
        )

    def _parts(self) -> Parts:
        return dict(load(self.data)), json.loads(self.metadata[self.key])

    def _written(self, what: str, tensors: Any, header: Any) -> tuple[str, bool, bytes]:
        signed = self.draw.random() < 0.5 and isinstance(header, dict)
        if signed:
            header["checksum"] = checksum(header, tensors)
        return what, signed, save(tensors, {self.key: json.dumps(header)})

    def _header(self) -> tuple[str, bool, bytes]:
        tensors, header = self._parts()
        draw, places = self.draw, []

        def visit(node: Any) -> None:
            for key in node if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                if isinstance(node[key], (dict, list)):
                    visit(node[key])

        visit(header)
        node, key = draw.choice(places)
        how = draw.choice(["odd", "odd", "gone", "many", "other"])
        if how == "odd":
            node[key] = draw.choice(ODD)
        elif how == "gone":
            del node[key]
        elif how == "many":
            node[key] = [copy.deepcopy(node[key])] * 20_000
        elif isinstance(node[key], (int, float)):
            node[key] = draw.choice([node[key] + 1, node[key] * 1e6, -node[key]])
        elif isinstance(node[key], list):
            node[key] = node[key] + node[key]
        return self._written(f"header: {how}", tensors, header)

    def _tensors(self) -> tuple[str, bool, bytes]:
        tensors, header = self._parts()
        name, draw = self.draw.choice(sorted(tensors)), self.draw
        how = draw.choice(["NaN", "infinite", "type", "shape", "gone", "new", "renamed", "changed"])
        value = tensors[name]
        if how in ("NaN", "infinite") and value.is_floating_point():
            number = float("nan") if how == "NaN" else draw.choice([float("inf"), -float("inf")])
            value.view(-1)[draw.randrange(value.numel())] = number
        elif how == "type":
            kinds = [torch.float8_e5m2, torch.float16, torch.float64, torch.int64, torch.bool]
            tensors[name] = value.to(draw.choice([*kinds, torch.complex64]))
        elif how == "shape":
            tensors[name] = value.reshape(-1)[: draw.randrange(value.numel() + 1)].clone()
        elif how == "gone":
            del tensors[name]
        elif how == "new":
            tensors["more"] = torch.ones(2)
        elif how == "renamed":
            tensors[draw.choice(["x", name + ".lora_A", "head.weight"])] = tensors.pop(name)
        else:
            tensors[name] = value + 1
        return self._written(f"tensor: {how}", tensors, header)
