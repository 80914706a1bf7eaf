"""Debian's Fashion-MNIST, corrupted in 18 ways at three severities."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.suites.case import Case, Pictures
from benchmarks.suites.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from benchmarks.suites.fetch import FASHION, debian

CLASSES = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
TRAIN, HELD, TARGET, LABELLED = 2000, 300, 300, 1000


def names() -> list[str]:
    """Every corruption at every severity."""
    return [f"fashion/{name}-{s}" for name in CORRUPTIONS for s in SEVERITIES]


def load(name: str, seed: int) -> Case:
    """The case of this name; the seed draws the target's items and noise, one source for all."""
    kind, severity = name.split("/")[1].split("-")
    pictures, labels = read("train")
    test, test_labels = read("t10k")
    train, others = np.split(np.random.default_rng(0).permutation(len(labels)), [TRAIN])
    held, asked = np.split(np.random.default_rng(0).permutation(len(test_labels)), [HELD])
    rng = np.random.default_rng(seed)
    target, labelled = rng.permutation(asked)[:TARGET], rng.permutation(others)[:LABELLED]

    def bad(x: Any) -> Any:
        return corrupted(x, kind, int(severity), seed)

    from benchmarks.suites.digits import printed

    return Case(
        name, "fashion", CLASSES, _of(pictures[train], labels[train]),
        _of(test[held], test_labels[held]), _of(bad(test[target]), test_labels[target]),
        _of(bad(pictures[labelled]), labels[labelled]),
        coloured(bad(printed(seed, 100)[0])),
    )  # fmt: skip


def counts() -> Iterator[tuple[str, str, int]]:
    """Domain, package and number of pictures."""
    for split in ("train", "t10k"):
        yield f"fashion/{split}", FASHION, len(read(split)[1])


@cache
def read(split: str) -> tuple[Any, Any]:
    """Pictures (N, 28, 28) and classes (N,)."""
    root = debian(FASHION) / "usr/share/datasets/fashion-mnist"
    with gzip.open(root / f"{split}-images-idx3-ubyte.gz") as file:
        pictures = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(root / f"{split}-labels-idx1-ubyte.gz") as file:
        return pictures, np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)


def coloured(grey: Any) -> Tensor:
    """(N, S, S) → (N, 3, S, S)."""
    return torch.from_numpy(np.array(grey))[:, None].expand(-1, 3, -1, -1)


def _of(grey: Any, labels: Any) -> Pictures:
    return Pictures(coloured(grey), torch.from_numpy(np.array(labels)))
