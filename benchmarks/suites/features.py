"""Features and predictions of a case's items by its source model, computed once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.suites.case import Case, kept, under
from benchmarks.suites.fetch import folder
from benchmarks.suites.networks import inputs, source_model
from lora_lightning.adaptation.target import Target, predicted
from lora_lightning.adaptation.transductive_rounds import SOURCE_ITEMS
from lora_lightning.linalg.torch_settings import shuffled
from lora_lightning.model.batch_norm import reestimated, tracking
from lora_lightning.model.probing import preserved

BATCH = 64


class Seen(NamedTuple):
    """What the source model says of items.

    Attributes:
        features: (N, D).
        probabilities: (N, K).
        restated: The same two with BatchNorm's statistics of these items; None without BatchNorm.
    """

    features: Tensor
    probabilities: Tensor
    restated: tuple[Tensor, Tensor] | None


def seen(model: Any, items: Tensor, plain: tuple[Tensor, Tensor] | None = None) -> Seen:
    """Predict items (N, 3, S, S); `plain`: what is known of them."""
    plain = plain or _predicted(model, items)
    if not tracking(model):
        return Seen(*plain, None)
    with preserved(model), torch.no_grad():
        mixed = items[shuffled(len(items))].split(BATCH)
        reestimated(model, model, mixed, SOURCE_ITEMS)
        return Seen(*plain, _predicted(model, items))


def _predicted(model: Any, items: Tensor) -> tuple[Tensor, Tensor]:
    loader = Target(items).loader(BATCH, shuffle=False)
    found = predicted(model, model, loader, torch.device("cpu"))
    return found.features, found.probabilities


def of_case(case: Case, condition: str, seed: int, network: str) -> dict[str, Any]:
    """`held` and `target`, both `Seen`, their labels, and the head, from the cache."""
    name = f"{case.name.replace('/', '-')}-{condition}-{seed}-{network}.pt"
    path = folder("features") / name
    held = folder("features") / f"{case.source}-{network}.pt"
    if path.exists() and held.exists():
        return {**torch.load(held, weights_only=False), **torch.load(path, weights_only=False)}
    model, plain = source_model(case, network), None
    if not held.exists():
        said = tuple(seen(model, inputs(case.held.pictures, network)))
        head: nn.Linear = model.get_classifier()  # type: ignore[operator]
        torch.save({"held": said, "held_labels": case.held.labels, "head": head.state_dict()}, held)
    if condition.endswith(" classes") or condition in ("10 to 1", "30 items"):
        # The source model says of an item the same, whatever others there are.
        rows = kept(case, condition, seed)
        features, probabilities, _ = of_case(case, "all", seed, network)["target"]
        plain = features[rows], probabilities[rows]
    asked = under(case, condition, seed).target
    said = tuple(seen(model, inputs(asked.pictures, network), plain))
    torch.save({"target": said, "labels": asked.labels}, path)
    return of_case(case, condition, seed, network)
