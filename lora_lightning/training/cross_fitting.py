"""`cross_fit`: cross-validated fine-tuning on few labelled items, shrunk to the best share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.linalg.torch_settings import shuffled
from lora_lightning.lora.values import check_count
from lora_lightning.model.adapter_file.save import save_adapter
from lora_lightning.model.shrinkage import shrink, undone
from lora_lightning.training import checks
from lora_lightning.training.gain_test import FEWEST, SHARES, Choice, choose
from lora_lightning.training.lora_callback import LoRACallback
from lora_lightning.training.validation_losses import Loss, losses_of

Fit = Callable[[LightningModule, Any], Any]
_TOO_FEW = "the source model is kept: so few items prove nothing; expected at least"
BATCH = 32  # items of a forward pass without gradient


def cross_fit(
    pl_module: LightningModule,
    data: Any,
    fit: Fit,
    *,
    looked_at: Any = None,
    folds: int = 5,
    shares: Sequence[float] = SHARES,
    loss: Loss | None = None,
    mistakes: Loss | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    backbone: str = "model",
    seed: int = 0,
) -> Choice:
    r"""Fit an adapter to few items; its strength is chosen by K-fold cross-validation.

        def fit(module, items):
            loader = DataLoader(items, 16, shuffle=True)
            Trainer(max_epochs=30, callbacks=[LoRACallback(rank=4)]).fit(module, loader)

        choice = cross_fit(module, items, fit)

    The items are split into `folds`. A copy of the module is fitted to all folds but one, and its
    losses on that one are taken at several shares of what it learnt (`lora_lightning.shrink`),
    beside the source model's. Finally the module itself is fitted to all items, and shrunk to the
    share that `gain_test.choose` takes: 0, the source model, unless its losses are significantly
    lower, which fewer than 6 items never show. Costs `folds` + 1 fits. Stone 1974,
    "Cross-validatory choice and assessment of statistical predictions",
    doi:10.1111/j.2517-6161.1974.tb00994.x.

    Args:
        pl_module: Not adapted yet; afterwards with the adapter, at the share that was chosen. An
            adapter file that the fit's `LoRACallback` wrote is written again.
        data: A map-style dataset of labelled items.
        fit: From (module, dataset) trains an adapter on the module, with a new Trainer.
        looked_at: The same items without augmentation, for the losses; None: `data`.
        folds: Parts; no more than there are items, and then each is left out by itself.
        shares: To choose from, beside 0.
        loss: From (LightningModule, batch) to one value for each item, (B,); None: what
            ``training_step`` returns for each item by itself, which takes longer.
        mistakes: Likewise, of what will be measured, such as 1 where the predicted class is wrong;
            see `choose`. None: the loss alone decides.
        collate: Makes a batch of a list of items; None: the default.
        backbone: Attribute path of the adapted network in the module, which must hold all that
            is trained: what lies outside would not be restored with it.
        seed: Of the split.

    Raises:
        ConfigError: fewer than 2 folds, a share out of range, something trained outside the
            backbone, or a loss that is none.
        DataError: fewer than 2 items, or `looked_at` of another length.
    """
    check_count("folds", folds, 2)
    seen = data if looked_at is None else looked_at
    if len(data) < 2 or len(seen) != len(data):
        raise DataError(
            f"data hold {len(data)} items and looked_at {len(seen)}: they must be the same items, "
            "and at least 2"
        )
    checks.check_all_within(pl_module, backbone, "cross_fit")

    asked = [loss] if mistakes is None else [loss, mistakes]

    def values(module: LightningModule, items: Sequence[int]) -> Tensor:
        """(losses and mistakes, items)."""
        loaders = [
            DataLoader(Subset(seen, items), BATCH if f else 1, collate_fn=collate) for f in asked
        ]
        found = [losses_of(module, x, f) for x, f in zip(loaders, asked, strict=True)]
        if any(len(x) != len(items) for x in found):
            raise ConfigError(f"{len(found[0])} losses for {len(items)} items: return one for each")
        return torch.stack(found)

    source = values(pl_module, range(len(data)))
    if len(data) < FEWEST:
        choice = Choice(0.0, f"{_TOO_FEW} {FEWEST}, got {len(data)}", 1.0, source[0])
    else:
        found = {a: torch.empty_like(source) for a in shares}
        for rest, part in _dealt(len(data), folds, seed):
            copied = copy.deepcopy(pl_module)
            fit(copied, Subset(data, rest))
            for share in shares:
                with undone(checks.find_backbone(copied, backbone)) as network:
                    shrink(network, share)
                    found[share][:, part] = values(copied, part)
        wrong = (source[-1], {a: x[-1] for a, x in found.items()}) if mistakes else None
        choice = choose(source[0], {a: x[0] for a, x in found.items()}, wrong)
    fit(pl_module, data)
    _settle(pl_module, checks.find_backbone(pl_module, backbone), choice)
    return choice


def _dealt(count: int, folds: int, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """(the other folds' items, the fold's items) for each fold."""
    order = shuffled(count, seed).tolist()
    for fold in range(min(folds, count)):
        part = order[fold::folds]
        yield sorted(set(order) - set(part)), part


def _settle(pl_module: LightningModule, network: nn.Module, choice: Choice) -> None:
    """Shrink, log the choice, and rewrite the last fit's adapter file, or remove it."""
    shrink(network, choice.share)
    choice.say("cross_fit")
    callbacks: list[Any] = getattr(pl_module._trainer, "callbacks", [])
    for callback in callbacks:
        if not isinstance(callback, LoRACallback) or callback.adapter_path_ is None:
            continue
        path = callback.files.at_end  # what was shrunk, whichever checkpoint was the best
        if choice.share:
            callback.adapter_path_ = save_adapter(network, path, callback.name)
        else:  # as `LoRACallback` does where another callback keeps the source model
            path.unlink(missing_ok=True)
            callback.adapter_path_ = None
