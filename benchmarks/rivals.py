"""Adaptation without labels as other papers define it: TENT, SHOT, NRC, plain pseudo-labels.

Legend of shapes: N items, B of a batch, D features, K classes, k neighbours. A method is
``(model, items, views, factor)`` → a function from inputs to logits: `model` is a timm classifier
and is changed, `items` are all inputs of the target, ``views(indices)`` gives augmented ones, and
`factor` multiplies the learning rate. Where a paper trains BatchNorm alone, a network without it
trains LayerNorm (Niu et al. 2023, arXiv:2302.12400). No guard: whatever comes out is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.adaptation.objectives import (
    entropy,
    information_maximisation,
    neighbour_consistency,
)

BATCH, EPOCHS, RATE = 64, 15, 1e-3
NEIGHBOURS, EXPANDED, WEAK = 4, 3, 0.1  # of NRC: k, those of each of them, weight of the others

Predictor = Callable[[Tensor], Tensor]
Views = Callable[[Tensor], Tensor]  # indices (B,) → augmented inputs
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # indices, features (B, D), logits (B, K)


def evaluated(model: nn.Module) -> Predictor:
    """Logits in eval mode."""
    model.eval()
    return torch.no_grad()(lambda x: torch.cat([model(b) for b in x.split(256)]))


def tent(model: nn.Module, items: Tensor, views: Views, factor: float = 1.0) -> Predictor:
    """Wang et al. 2021: entropy, the norms' affine weights, the batch's statistics, one pass."""
    model.train()
    model.requires_grad_(False)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    if not norms:
        model.eval()  # nothing else depends on the mode but dropout, which the paper leaves off
    others = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    affine = [p.requires_grad_() for norm in norms or others for p in norm.parameters()]
    optimizer = torch.optim.Adam(affine, lr=RATE * factor)
    outputs = []
    for batch in items.split(BATCH):
        logits = model(batch)
        outputs.append(logits.detach())
        optimizer.zero_grad()
        entropy(logits).backward()
        optimizer.step()
    online = torch.cat(outputs)
    after = torch.no_grad()(lambda x: torch.cat([model(b) for b in x.split(BATCH)]))
    return lambda x: online if x.shape == items.shape and torch.equal(x, items) else after(x)


def shot(model: Any, items: Tensor, views: Views, factor: float = 1.0) -> Predictor:
    """Liang et al. 2020: all weights but the head, BatchNorm in training mode, 15 epochs."""
    model.get_classifier().requires_grad_(False)
    labels = torch.zeros(len(items), dtype=torch.int64)

    def begin() -> None:
        labels.copy_(_centroids(model, items))

    def loss(index: Tensor, _: Tensor, logits: Tensor) -> Tensor:
        pseudo = F.cross_entropy(logits, labels[index])
        return information_maximisation(logits) + 0.3 * pseudo

    return _trained(model, len(items), views, factor, loss, begin)


def nrc(model: Any, items: Tensor, views: Views, factor: float = 1.0) -> Predictor:
    """Yang et al. 2021: agreement with neighbours and theirs, all weights, 15 epochs."""
    with torch.no_grad():
        model.eval()
        features = _features(model, items)
        scores = model.get_classifier()(features).softmax(1)
    bank = F.normalize(features, dim=1)

    def loss(index: Tensor, features: Tensor, logits: Tensor) -> Tensor:
        bank[index], scores[index] = (
            F.normalize(features.detach(), dim=1),
            logits.detach().softmax(1),
        )
        near = _near(bank[index], bank, NEIGHBOURS)
        further = _near(bank[near].flatten(0, 1), bank, EXPANDED).unflatten(0, near.shape)
        mutual = (further == index[:, None, None]).any(2)
        weights = torch.where(mutual, 1.0, WEAK)
        own = neighbour_consistency(logits, scores[near], weights)
        theirs = neighbour_consistency(logits, scores[further.flatten(1)]) * WEAK
        # The diversity term alone, without the entropy of each item.
        return own + theirs + information_maximisation(logits) - entropy(logits)

    return _trained(model, len(items), views, factor, loss, decays=False)


def pseudo(model: Any, items: Tensor, views: Views, factor: float = 1.0) -> Predictor:
    """Lee 2013: each item's own most likely class, all weights, 15 epochs."""

    def loss(_: Tensor, __: Tensor, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, logits.detach().argmax(1))

    return _trained(model, len(items), views, factor, loss)


RIVALS = {"tent": tent, "shot": shot, "nrc": nrc, "pseudo": pseudo}


def _trained(
    model: Any,
    count: int,
    views: Views,
    factor: float,
    loss: Loss,
    begin: Callable[[], None] | None = None,
    decays: bool = True,
) -> Predictor:
    """Stochastic gradient descent on all weights that are not frozen, as SHOT's and NRC's code."""
    live, rate = [p for p in model.parameters() if p.requires_grad], RATE * factor
    optimizer = torch.optim.SGD(live, lr=rate, momentum=0.9, weight_decay=1e-3, nesterov=True)
    steps, done = EPOCHS * math.ceil(count / BATCH), 0
    for _ in range(EPOCHS):
        if begin is not None:
            begin()
        for index in torch.randperm(count).split(BATCH):
            if len(index) < 2:  # too few for BatchNorm
                continue
            model.train()
            features = _features(model, views(index))
            optimizer.zero_grad()
            loss(index, features, model.get_classifier()(features)).backward()
            done += 1
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 + 10 * (done - 1) / steps) ** -0.75 if decays else rate
            optimizer.step()
    return evaluated(model)


def _features(model: Any, x: Tensor) -> Tensor:
    """What the classifier takes, (N, D)."""
    maps = torch.cat([model.forward_features(b) for b in x.split(256)])
    found: Tensor = model.forward_head(maps, pre_logits=True)
    return found


def _near(z: Tensor, bank: Tensor, count: int) -> Tensor:
    """The most similar rows of `bank`, but the first, which is the item itself: (B, count)."""
    similarities = z @ bank.T
    return similarities.topk(min(count + 1, len(bank)), dim=1).indices[:, 1:]


@torch.no_grad()
def _centroids(model: Any, items: Tensor) -> Tensor:
    """The class of the nearest centroid, (N,)."""
    model.eval()
    z = _features(model, items)
    p = model.get_classifier()(z).softmax(1)
    z = F.normalize(torch.cat([z, torch.ones(len(z), 1)], 1), dim=1)
    labels = p
    for _ in range(2):
        centres = labels.T @ z / (labels.sum(0)[:, None] + 1e-8)
        nearest = (z @ F.normalize(centres, dim=1).T).argmax(1)
        labels = F.one_hot(nearest, p.shape[1]).float()
    return nearest
