"""Ranks and initial factors from the trainer's own batches, before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.model.calling import Forward
from lora_lightning.model.data_driven.initialise import start_from_data
from lora_lightning.model.data_driven.rank_choice import choose_ranks, set_ranks
from lora_lightning.model.injection_report import InjectionReport
from lora_lightning.model.state import named_factors, state_of
from lora_lightning.training.steps import (
    check_lasting,
    outside_training,
    own_pass,
    run_module,
    step,
    step_loss,
)


def start_in_trainer(
    trainer: Trainer,
    pl_module: LightningModule,
    backbone: nn.Module,
    name: str,
    data: Iterable[Any] | None,
    forward: Forward | None,
    loss: Forward | None,
) -> None:
    """`start_from_data`, with the module's own steps, on the trainer's own batches.

    Inputs are gathered by `forward`, else by the module's ``predict_step``, its forward, or the
    backbone where it has neither; gradients by `loss`, else by its ``training_step``.

    Raises:
        ConfigError: the trainer has not one training loader, but several.
    """
    batches = _single(trainer.train_dataloader, forward or loss) if data is None else data
    plugin = _precision(trainer, backbone)
    loss = loss or (lambda _, batch: _training_loss(pl_module, batch))
    with outside_training(pl_module):
        start_from_data(
            backbone,
            _Moved(batches, trainer, plugin),
            name,
            forward=_within(plugin, forward or _forward_of(pl_module, backbone)),
            loss=_within(plugin, loss),
            progress=_shows_progress(trainer),
        )
    if trainer.world_size > 1:  # each process saw a part of the data: rank 0's start for all
        own = [t for f in named_factors(backbone, name).values() for t in f.tensors().values()]
        # By the CPU: a GPU's are unpickled on rank 0's device, on which each rank would take room.
        given = trainer.strategy.broadcast([t.detach().cpu() for t in own], src=0)
        for tensor, value in zip(own, given, strict=True):
            tensor.data.copy_(value)


def choose_in_trainer(
    trainer: Trainer,
    pl_module: LightningModule,
    backbone: nn.Module,
    name: str,
    data: Iterable[Any] | None,
    forward: Forward | None,
) -> InjectionReport:
    """`choose_ranks` on the trainer's own batches, before there are optimizers.

    Raises:
        ConfigError: the trainer's loader cannot be had so early, or there are several.
    """
    batches = _early_loader(trainer, forward) if data is None else data
    plugin = _precision(trainer, backbone)
    pl_module.to(trainer.strategy.root_device)  # where the strategy is about to move it
    with outside_training(pl_module):
        report = choose_ranks(
            backbone,
            _Moved(batches, trainer, plugin),
            name,
            forward=_within(plugin, forward or _forward_of(pl_module, backbone)),
            progress=_shows_progress(trainer),
        )
    if trainer.world_size > 1:  # each process saw other batches: rank 0's choice for all
        state = state_of(backbone)
        assert state is not None
        own = {p: f.spec.rank for p, f in named_factors(backbone, name).items()}
        report = set_ranks(backbone, state, name, trainer.strategy.broadcast(own, src=0))
    return report


def _precision(trainer: Trainer, backbone: nn.Module) -> Precision:
    """The trainer's; none while the network is not in it, which comes after `setup`."""
    own = next((p.dtype for p in backbone.parameters() if p.is_floating_point()), torch.float32)
    plugin = trainer.precision_plugin
    given = plugin.convert_input(torch.zeros((), device="cpu"))
    return plugin if given.dtype is own else Precision()


def _within(plugin: Precision, step: Forward) -> Forward:
    """The step, where new tensors are of this precision."""

    def run(model: nn.Module, batch: Any) -> Any:
        # Not `forward_context`: what training starts from is computed once, without autocast.
        with plugin.tensor_init_context():
            return step(model, batch)

    return run


def _forward_of(pl_module: LightningModule, backbone: nn.Module) -> Forward:
    if is_overridden("predict_step", pl_module):
        return lambda _, batch: step(pl_module, "predict_step", batch)
    return lambda _, batch: run_module(pl_module, backbone, batch)


def _shows_progress(trainer: Trainer) -> bool:
    return trainer.progress_bar_callback is not None and trainer.is_global_zero


class _Moved:
    """A loader that moves batches to the module's device, and casts them to this precision."""

    def __init__(self, batches: Iterable[Any], trainer: Trainer, plugin: Precision):
        self.batches, self.strategy, self.plugin = batches, trainer.strategy, plugin

    def __iter__(self) -> Iterator[Any]:
        for batch in own_pass(self.batches):
            yield self.strategy.batch_to_device(self.plugin.convert_input(batch))

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def _early_loader(trainer: Trainer, forward: Forward | None) -> Iterable[Any]:
    """The training loader before Lightning itself asks for it."""
    source = trainer.fit_loop._data_source
    try:
        return _single(source.dataloader(), forward)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            "a rule as rank looks at the training batches before the optimizer is made, and the "
            f"module's train_dataloader cannot give them yet ({type(error).__name__}: {error}). "
            "Give LoRACallback(data=…), batches of the target"
        ) from error


def _single(loader: Any, given: Forward | None) -> Iterable[Any]:
    """The training loader; of several, which a user's function may know, the batches of them."""
    loaders = loader.iterables if isinstance(loader, CombinedLoader) else loader
    if not isinstance(loaders, (dict, list, tuple)):
        check_lasting(loaders)
        found: Iterable[Any] = loaders
        return found
    if given is None:
        raise ConfigError(
            "the trainer has several training loaders: give LoRACallback(data=…) the one with the "
            "target's batches to start from, or forward= (loss= for 'lora-ga'), a function from "
            "(backbone, batch), which runs the backbone on a batch of all of them"
        )
    combined = (
        loader if isinstance(loader, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
    )
    return (batch for batch, _, _ in combined)


def _training_loss(pl_module: LightningModule, batch: Any) -> Tensor:
    loss = step_loss(pl_module, batch)
    if not isinstance(loss, Tensor):
        raise ConfigError(
            "init='lora-ga' needs the loss that training_step returns, and it returns none (manual "
            "optimisation?): give LoRACallback(loss=…), a function from (backbone, batch)"
        )
    return loss
