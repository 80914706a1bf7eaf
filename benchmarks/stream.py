"""Accuracy of `StreamAdapter` against the source model, over many orders of the items.

    python benchmarks/stream.py
    python benchmarks/stream.py --smoke --no-save

A small network with BatchNorm on generated features: groups around the axes, moved by a shift that
is drawn with the seed. A stream is an order of classes: mixed, runs of 20, 60, 200 and 600 of a
class, one class or three for ever, bursts of a class between mixed stretches, shares that drift,
shares of 90 to 1, and the mixed and the long runs through four shifts one after the other. `every
call` is the adapter without the condition on the classes and without an end to resets; `diverse` is
the default. Accuracy is that of the answers as they come, over the whole stream. Writes a CSV.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:  # from the repository's root, and as a script beside the other
    from benchmarks.machine import RESULTS, Table, setting
except ImportError:
    from machine import RESULTS, Table, setting

from lora_lightning import inject
from lora_lightning.adaptation import StreamAdapter
from lora_lightning.adaptation import stream as code

WIDTH = 16
RUNS = ("runs of 20", "runs of 60", "runs of 200", "runs of 600")
STREAMS = (
    "mixed", *RUNS, "one class", "all but one", "bursts", "drift", "90 to 1",
    "four shifts, mixed", "four shifts, runs of 600",
)  # fmt: skip
VARIANTS = ("every call", "diverse")


def order(name: str, count: int, classes: int, generator: torch.Generator) -> Tensor:
    """The classes of a stream, (count,)."""
    place = torch.arange(count)
    mixed = torch.randint(classes, (count,), generator=generator)
    if "runs of" in name:
        return place // int(name.rpartition(" ")[2]) % classes
    if name == "one class":
        return torch.zeros_like(mixed)
    if name == "all but one":
        return mixed % (classes - 1)
    if name == "bursts":
        burst = place // 300
        return torch.where(burst % 2 == 1, burst // 2 % classes, mixed)
    if name in ("drift", "90 to 1"):
        at = torch.linspace(0, classes - 1, count)[:, None] if name == "drift" else 0
        steep = 1.0 if name == "drift" else 4.5 / (classes - 1)
        shares = (-steep * (at - torch.arange(classes)).abs()).exp().expand(count, classes)
        return torch.multinomial(shares, 1, generator=generator)[:, 0]
    return mixed


def items(labels: Tensor, moves: Tensor, generator: torch.Generator) -> Tensor:
    """Features (N, WIDTH), in equal parts under each of the `moves` (shifts, WIDTH)."""
    found = 3 * torch.eye(WIDTH)[labels] + 0.6 * torch.randn(
        len(labels), WIDTH, generator=generator
    )
    return found + moves[torch.arange(len(labels)) * len(moves) // len(labels)]


def source_model(classes: int) -> nn.Module:
    """Trained on features without a shift."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    body = nn.Sequential(nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.ReLU())
    model = nn.Sequential(body, nn.Linear(32, classes))
    labels = torch.arange(100 * classes) % classes
    x = items(labels, torch.zeros(1, WIDTH), generator)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def shifts(size: float, classes: int, count: int, generator: torch.Generator) -> Tensor:
    """Directions (count, WIDTH) that favour some classes, of this length."""
    found = torch.randn(count, WIDTH, generator=generator)
    found[:, classes:] *= 0.5
    return size * found / found.norm(dim=1, keepdim=True)


def answered(source: nn.Module, x: Tensor, variant: str, batch: int, given: Any) -> Any:
    """Predicted classes (N,), and the adapter afterwards."""
    model = copy.deepcopy(source)
    torch.manual_seed(0)
    inject(model, rank=4, target_modules=["0.0"], trainable=[])
    code.PATIENCE = 3 if variant == "diverse" else 10**9
    adapter = StreamAdapter(model, diversity=given.diversity if variant == "diverse" else 0.0)
    return torch.cat([adapter(b).argmax(1) for b in x.split(batch)]), adapter


def held(adapter: StreamAdapter) -> int:
    """Bytes of what is kept of the stream."""
    return sum(
        t.untyped_storage().nbytes() for t in (adapter._kept, adapter._before) if t is not None
    )


def one(source: nn.Module, name: str, size: float, seed: int, given: Any) -> list[dict[str, Any]]:
    """A stream by each variant."""
    classes = source[-1].out_features  # type: ignore[index]
    generator = torch.Generator().manual_seed(1000 * seed + classes)
    moves = shifts(size, classes, 4 if name.startswith("four") else 1, generator)
    labels = order(name, given.items, classes, generator)
    x = items(labels, moves, generator)
    with torch.no_grad():
        before = source(x).argmax(1)
    rows = []
    for variant in given.variants:
        found, adapter = answered(source, x, variant, given.batch, given)
        right = [100 * float((f == labels).double().mean()) for f in (before, found)]
        rows.append({
            "stream": name, "classes": classes, "shift": size, "seed": seed, "variant": variant,
            "diversity": adapter.diversity,
            "batch": given.batch, "items": len(x), "source": round(right[0], 2),
            "adapted": round(right[1], 2), "change": round(right[1] - right[0], 2),
            "resets": len(adapter.resets_), "bytes": held(adapter),
        })  # fmt: skip
    return rows


def main() -> None:
    """Run what the arguments choose; a line of the CSV each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11])
    parser.add_argument("--shifts", type=float, nargs="+", default=[2.5, 3.5])
    parser.add_argument("--classes", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--streams", nargs="+", default=list(STREAMS), choices=STREAMS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--diversity", type=float, default=0.95)
    parser.add_argument("--smoke", action="store_true", help="a minute's worth: few items")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    given = parser.parse_args()
    if given.smoke:
        given.items, given.batch, given.seeds, given.classes = 600, 8, given.seeds[:1], [4]
        given.shifts = given.shifts[:1]
    torch.set_num_threads(1)
    table = None if given.no_save else Table("stream", setting(), given.out)
    for classes in given.classes:
        source = source_model(classes)
        for name in given.streams:
            for size in given.shifts:
                for seed in given.seeds:
                    for row in one(source, name, size, seed, given):
                        print(*row.values(), flush=True)
                        if table is not None:
                            table.add(**row)


if __name__ == "__main__":
    main()
