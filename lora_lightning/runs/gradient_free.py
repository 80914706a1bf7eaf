"""The methods of a classification run that train nothing: they read what the source model sees."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_lightning.results import Row
from lora_lightning.runs.context import Context
from lora_lightning.structure import classifier_modules
from lora_lightning.transduction import alignment
from lora_lightning.transduction.gradient_free import lame, recentred

Aligned = Callable[[Tensor, Tensor, Tensor], Tensor]


def lame_row(context: Context) -> list[Row]:
    """The source model's answers, made to agree among neighbours."""
    source, target = context.seen("source"), context.seen("target")
    start = time.perf_counter()
    answers = [lame(p.features, p.probabilities) for p in (source.said, target.said)]
    seconds = source.seconds + target.seconds + time.perf_counter() - start
    return context.score("LAME", torch.cat(answers), seconds)


def recentre_row(context: Context) -> list[Row]:
    """The source model with the target's features moved to the source's mean."""
    model = context.fresh()
    heads = sorted(classifier_modules(model))
    head = model.get_submodule(heads[0]) if len(heads) == 1 else None
    if not isinstance(head, nn.Linear):
        context.run.notes.append("The backbone has no linear head: no features to re-centre.")
        return []
    learnt, target = context.seen("learnt"), context.seen("target")
    moved = recentred(target.said.features, learnt.said.features.mean(dim=0), head)
    answers = torch.cat([context.seen("source").said.probabilities, moved])
    return context.score("feature re-centring", answers, learnt.seconds + target.seconds)


def aligned(name: str, align: Aligned) -> Callable[[Context], list[Row]]:
    """The method of this name: answers from what the source model sees.

    Args:
        name: Of the row.
        align: From source features (N, D), their labels, and features (M, D) of a domain to
            answers (M, outputs).
    """

    def row(context: Context) -> list[Row]:
        learnt = context.seen("learnt")
        answers, seconds = [], learnt.seconds
        for which in ("source", "target"):
            seen = context.seen(which)
            start = time.perf_counter()
            answers.append(align(learnt.said.features, learnt.labels, seen.said.features))
            seconds += seen.seconds + time.perf_counter() - start
        return context.score(name, torch.cat(answers), seconds)

    row.__doc__ = f"{name}: source features and target features aligned in closed form."
    return row


# Closed forms on features, each with the nearest class mean after it.
ALIGNED: dict[str, Callable[[Context], list[Row]]] = {
    "nearest_centroid": aligned("nearest centroid", alignment.nearest_centroid),
    "subspace": aligned("subspace alignment", alignment.subspace_alignment),
    "nmf_subspace": aligned("NMF subspace", alignment.nmf_subspace),
    "coral": aligned("CORAL", alignment.coral),
}
