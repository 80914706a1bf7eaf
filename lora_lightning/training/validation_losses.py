"""Losses on held-out batches, one value for each item where possible."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.model.probing import evaluating, loss_in_eval
from lora_lightning.training.steps import check_lasting, outside_training, own_pass, step_loss

Loss = Callable[[LightningModule, Any], Any]
MOST = 256  # items that run in batches of one


def training_items(trainer: Trainer) -> int:
    """How many items the fit trains on; 0 where that is not known."""
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else 0


def held_out_batches(
    trainer: Trainer, given: Iterable[Any] | None, loss: Loss | None
) -> Iterable[Any]:
    """The held-out batches given to `FitGuard`, or else the trainer's validation batches.

    Raises:
        ConfigError: there are none, or several loaders.
    """
    batches: Any = _validation(trainer) if given is None else given
    if batches is None:
        raise ConfigError(
            "FitGuard has nothing held out to judge by: give the fit a validation loader, or "
            "FitGuard(held_out=...); for a few dozen items in all use lora_lightning.cross_fit"
        )
    if isinstance(batches, (list, tuple, dict)):
        raise ConfigError(
            "there are several held-out loaders: give FitGuard(held_out=...) the one with the "
            "target's items"
        )
    return one_by_one(batches) if loss is None else batches


def _validation(trainer: Trainer) -> Any:
    """The trainer's validation loaders, also where Lightning would ask for them epochs later."""
    if trainer.val_dataloaders is None and trainer.enable_validation:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        trainer.training = True
    return trainer.val_dataloaders


def one_by_one(batches: Iterable[Any]) -> Iterable[Any]:
    """The same items in batches of one, where `batches` is a DataLoader of at most 256.

    Two models are compared by paired losses: many items give a stronger test than few batches.
    """
    plain = isinstance(batches, DataLoader) and type(batches.batch_sampler) is BatchSampler
    if not plain or isinstance(batches.dataset, IterableDataset):  # type: ignore[attr-defined]
        return batches
    loader: Any = batches
    if len(loader.sampler) > MOST:
        return batches
    return DataLoader(loader.dataset, sampler=loader.sampler, collate_fn=loader.collate_fn)


@torch.no_grad()
def losses_of(pl_module: LightningModule, batches: Iterable[Any], loss: Loss | None) -> Tensor:
    """(N,) losses in eval mode, one for each item or batch; the module stays as it is.

    Raises:
        ConfigError: the loss is no tensor of shape () or (B,).
        DataError: there is no batch.
    """
    device = pl_module.device
    # In the precision of the fit; before the first one there is none.
    plugin = pl_module._trainer.precision_plugin if pl_module._trainer else Precision()
    found = []
    with evaluating(pl_module), outside_training(pl_module):
        for batch in batches:
            moved = pl_module.transfer_batch_to_device(plugin.convert_input(batch), device, 0)
            with plugin.forward_context():
                value = loss_in_eval(pl_module, partial(loss or step_loss, pl_module, moved))
            found.append(_values(value, loss is None))
    if not found:
        raise DataError("the held-out data hold no batch: give at least one item")
    return torch.cat(found)


def _values(loss: Any, of_step: bool) -> Tensor:
    if isinstance(loss, Tensor) and loss.is_floating_point() and loss.ndim <= 1:
        return loss.detach().double().cpu().reshape(-1)
    got = f"{type(loss).__name__}" + (f" {tuple(loss.shape)}" if isinstance(loss, Tensor) else "")
    who = "training_step returns" if of_step else "the function `loss` returns"
    raise ConfigError(
        f"{who} {got}; expected a loss of shape () or (B,). Give `loss=`, a function from "
        "(LightningModule, batch) to such a tensor"
    )


def first_batches(batches: Any) -> Iterator[Any]:
    """The first batches: enough to know the source model's loss on the training items."""
    # Lazily: shuffling draws random numbers, which must happen where the random state is restored.
    check_lasting(batches)
    yield from itertools.islice(own_pass(batches), 16)
