"""A shift to adapt to: labelled source, unlabelled target, and what judges the result.

Legend of shapes: N pictures, S side in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

STRANGER = -1  # label of a picture that shows none of the classes


class Pictures(NamedTuple):
    """Pictures (N, 3, S, S) as bytes, and their classes (N,)."""

    pictures: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, rows: Tensor) -> Pictures:
        """The pictures at these places."""
        return Pictures(self.pictures[rows], self.labels[rows])


@dataclass(frozen=True)
class Case:
    """One shift.

    Attributes:
        name: Suite, source and target.
        source: Names the source model: cases with the same one share its checkpoint.
        classes: Names of the classes.
        train: Of the source, to train on.
        held: Of the source, held out.
        target: The items to adapt to; their labels only judge.
        labelled: Other items of the target's domain: the reference with labels trains on them.
        strangers: (M, 3, S, S) pictures of no class, for an open set.
        flip: Whether a mirrored picture is of the same class.
        batch_size: Of the adaptation.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    train: Pictures
    held: Pictures
    target: Pictures
    labelled: Pictures
    strangers: Tensor
    flip: bool = True
    batch_size: int = 32


CONDITIONS = (
    "all", "3 classes", "5 classes", "10 to 1", "30 items", "batches of 8", "batches of 64",
    "class order", "open set", "noise", "upside down",
)  # fmt: skip
# Of these the answers of a method that trains nothing are those of "all".
OF_TRAINING_ONLY = ("batches of 8", "batches of 64", "class order")


def under(case: Case, condition: str, seed: int = 0) -> Case:
    """The case under one of `CONDITIONS`."""
    target = case.target
    if condition.startswith("batches of "):
        return replace(case, batch_size=int(condition.split()[-1]))
    if condition == "open set":
        few = case.strangers[: len(target) // 4]
        labels = torch.full((len(few),), STRANGER)
        mixed = Pictures(torch.cat([target.pictures, few]), torch.cat([target.labels, labels]))
        return replace(case, target=mixed)
    if condition == "noise":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randint(0, 256, target.pictures.shape, generator=generator)
        labels = torch.full_like(target.labels, STRANGER)
        return replace(case, target=Pictures(noise.to(torch.uint8), labels))
    if condition == "upside down":
        return replace(case, target=Pictures(target.pictures.flip(2), target.labels))
    return replace(case, target=target.at(kept(case, condition, seed)))


def kept(case: Case, condition: str, seed: int) -> Tensor:
    """Which items of the target, in which order, a condition leaves as they are."""
    labels, count = case.target.labels, len(case.classes)
    generator = torch.Generator().manual_seed(1000 + seed)
    order = torch.randperm(count, generator=generator).tolist()
    mixed = torch.randperm(len(labels), generator=generator)
    if condition == "class order":
        return labels.argsort(stable=True)
    if condition == "30 items":
        return mixed[:30].sort().values
    if condition.endswith(" classes"):
        parts = dict.fromkeys(order[: int(condition.split()[0])], 1.0)
    elif condition == "10 to 1":
        parts = {c: 10 ** (-k / (count - 1)) for k, c in enumerate(order)}
    elif condition == "all":
        parts = dict.fromkeys(order, 1.0)
    else:
        raise ValueError(f"condition must be one of {', '.join(CONDITIONS)}; got {condition!r}")
    of = {c: mixed[labels[mixed] == c] for c in parts}
    return torch.cat([x[: max(1, round(parts[c] * len(x)))] for c, x in of.items()]).sort().values
