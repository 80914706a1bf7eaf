"""`cross_fit`: adapt to a handful of labelled items, and no further than they can vouch for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lora_lightning import trainer_checks as checks
from lora_lightning.callback import LoRACallback
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.files import save_adapter
from lora_lightning.fitting import SHARES, Choice, choose
from lora_lightning.held_out import Loss, losses_of
from lora_lightning.shrinkage import shrink, undone

Fit = Callable[[LightningModule, Any], Any]
FEWEST = 4  # items: with fewer the paired test can hardly say yes


def cross_fit(
    pl_module: LightningModule,
    data: Any,
    fit: Fit,
    *,
    looked_at: Any = None,
    folds: int = 5,
    shares: Sequence[float] = SHARES,
    loss: Loss | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    backbone: str = "model",
    seed: int = 0,
) -> Choice:
    r"""Fit an adapter to few items; each of them is judged by an adapter that has not seen it.

        def fit(module, items):
            loader = DataLoader(items, 16, shuffle=True)
            Trainer(max_epochs=30, callbacks=[LoRACallback(rank=4)]).fit(module, loader)

        choice = cross_fit(module, items, fit)

    The items are dealt into `folds`. A copy of the module is fitted to all folds but one, and its
    losses on that one are taken at several shares of what it learnt (`lora_lightning.shrink`),
    beside the source model's. At last the module itself is fitted to all items, and shrunk to the
    share that `lora_lightning.fitting.choose` takes: 0, the source model, unless its losses are
    lower beyond doubt. Costs `folds` + 1 fits. Stone 1974, "Cross-validatory choice and assessment
    of statistical predictions", doi:10.1111/j.2517-6161.1974.tb00994.x.

    Args:
        pl_module: Not adapted yet; afterwards with the adapter, at the share that was chosen. An
            adapter file that the fit's `LoRACallback` wrote is written again.
        data: A map-style dataset of labelled items.
        fit: From (module, dataset) trains an adapter on the module, with a new Trainer.
        looked_at: The same items without augmentation, for the losses; None: `data`.
        folds: Parts; no more than there are items, and then each is left out by itself.
        shares: To choose from, beside 0.
        loss: From (LightningModule, batch of one item) to its loss; None: ``training_step``'s.
        collate: Makes a batch of a list of items; None: the default.
        backbone: Attribute path of the adapted network in the module.
        seed: Of the dealing.

    Raises:
        ConfigError: fewer than 2 folds, a share out of range, or a loss that is none.
        DataError: fewer than 4 items, or `looked_at` of another length.
    """
    if folds < 2:
        raise ConfigError(f"folds must be at least 2, got {folds}")
    seen = data if looked_at is None else looked_at
    _check(data, seen)

    def losses(module: LightningModule, items: Sequence[int]) -> Tensor:
        loader = DataLoader(Subset(seen, items), collate_fn=collate)
        return losses_of(module, loader, loss)

    source = losses(pl_module, range(len(data)))
    found = {a: torch.empty_like(source) for a in shares}
    for rest, part in _dealt(len(data), folds, seed):
        copied = copy.deepcopy(pl_module)
        fit(copied, Subset(data, rest))
        network = checks.find_backbone(copied, backbone)
        for share in shares:
            with undone(network):
                shrink(network, share)
                found[share][part] = losses(copied, part)
    fit(pl_module, data)
    choice = choose(source, found)
    network = checks.find_backbone(pl_module, backbone)
    shrink(network, choice.share)
    _rewrite(pl_module, network)
    choice.say("cross_fit")
    return choice


def _check(data: Any, seen: Any) -> None:
    if len(data) < FEWEST:
        raise DataError(
            f"{len(data)} items are too few to judge an adapter by: at least {FEWEST} are needed"
        )
    if len(seen) != len(data):
        raise DataError(
            f"looked_at holds {len(seen)} items and data {len(data)}: they must be the same items"
        )


def _dealt(count: int, folds: int, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """(the other folds' items, the fold's items) for each fold."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    for fold in range(min(folds, count)):
        part = order[fold::folds]
        yield sorted(set(order) - set(part)), part


def _rewrite(pl_module: LightningModule, network: nn.Module) -> None:
    """Write the adapter files of the last fit again, with what is left of the adapter."""
    callbacks: list[Any] = getattr(pl_module._trainer, "callbacks", [])
    for callback in callbacks:
        if isinstance(callback, LoRACallback) and callback.adapter_path_ is not None:
            save_adapter(network, callback.adapter_path_, callback.name)
