"""An adapter's start from the trainer's own training batches, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.starting import Forward, call, start_from_data
from lora_lightning.state import named_factors


def start_in_trainer(
    trainer: Trainer,
    pl_module: LightningModule,
    backbone: nn.Module,
    name: str,
    data: Iterable[Any] | None,
    loss: Forward | None,
) -> None:
    """`start_from_data`, with the module's own steps, on the trainer's own batches.

    Inputs are gathered by the module's ``predict_step``, or its forward on the batch's first
    element where it has none; gradients by its ``training_step``.

    Raises:
        ConfigError: the trainer has not one training loader, but several.
    """
    batches = _loader(trainer) if data is None else data
    forward = pl_module.predict_step if is_overridden("predict_step", pl_module) else None
    # The order of the training that follows must not depend on this look at its data.
    devices = [pl_module.device] if pl_module.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), silent(pl_module):
        moved = _Moved(batches, lambda batch: trainer.strategy.batch_to_device(batch))
        start_from_data(
            backbone,
            moved,
            name,
            forward=lambda _, batch: forward(batch, 0) if forward else call(pl_module, batch),
            loss=loss or (lambda _, batch: _training_loss(pl_module, batch)),
            progress=trainer.progress_bar_callback is not None and trainer.is_global_zero,
        )
    if trainer.world_size > 1:  # each process saw a part of the data: one start for all
        for factors in named_factors(backbone, name).values():
            for tensor in factors.tensors().values():
                tensor.data.copy_(trainer.strategy.broadcast(tensor.detach(), src=0))


class _Moved:
    """A loader whose batches come on the module's device."""

    def __init__(self, batches: Iterable[Any], move: Callable[[Any], Any]):
        self.batches, self.move = batches, move

    def __iter__(self) -> Iterator[Any]:
        return map(self.move, self.batches)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def _loader(trainer: Trainer) -> Iterable[Any]:
    loader: Any = trainer.train_dataloader
    if isinstance(loader, (dict, list, tuple)):
        raise ConfigError(
            "the trainer has several training loaders: give LoRACallback(data=…) the one with the "
            "target's batches to start from"
        )
    found: Iterable[Any] = loader
    return found


def _training_loss(pl_module: LightningModule, batch: Any) -> Tensor:
    found: Any = pl_module.training_step(batch, 0)
    loss = found["loss"] if isinstance(found, dict) else found
    if not isinstance(loss, Tensor):
        raise ConfigError(
            "init='lora-ga' needs the loss that training_step returns, and it returns none (manual "
            "optimisation?): give LoRACallback(loss=…), a function from (backbone, batch)"
        )
    return loss


@contextmanager
def silent(pl_module: LightningModule) -> Iterator[None]:
    """What the steps log here belongs to no step of the training."""
    kept = {n: pl_module.__dict__.get(n) for n in ("log", "log_dict")}
    for name in kept:
        pl_module.__dict__[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del pl_module.__dict__[name]
            else:
                pl_module.__dict__[name] = value
