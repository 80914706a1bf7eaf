"""Injection into the backbone of a LightningModule, also one built in ``configure_model``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lora_lightning.errors import AdapterError
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.model.calling import Forward
from lora_lightning.model.injection import place
from lora_lightning.model.injection_report import InjectionReport
from lora_lightning.model.state import ModelState, state_of
from lora_lightning.model.switching import set_active
from lora_lightning.model.view import View
from lora_lightning.training import checks
from lora_lightning.training.launch import LaunchedCallback, check_returned


class InjectingCallback(LaunchedCallback):
    """A callback that injects an adapter into the network at an attribute path, before training."""

    backbone: str
    config: LoRAConfig
    name: str
    data: Iterable[Any] | None
    forward: Forward | None
    report_: InjectionReport | None = None

    def before_launch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Inject here already, where the strategy is about to start processes by itself."""
        self.report_ = None
        if checks.has_backbone(pl_module, self.backbone):
            network = checks.find_backbone(pl_module, self.backbone)
            if not View(network).merged:
                self.report_ = _placed(network, self.config, self.name)

    def inject(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Inject, or do so after ``configure_model``, where that builds the network.

        Raises:
            AdapterError: the model is merged, and about to be trained.
            TargetError: see `checks.find_backbone` and `lora_lightning.inject`.
        """
        if checks.has_backbone(pl_module, self.backbone):
            self._inject(trainer, pl_module)
        if self.report_ is None or checks.builds_late(pl_module):
            after_configure_model(pl_module, partial(self._inject, trainer, pl_module))

    def _inject(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Inject into the network, with ranks from the target where asked for."""
        network, name = checks.find_backbone(pl_module, self.backbone), self.name
        state = state_of(network)
        if state is not None and name in state.configs and View(network).merged:
            if trainer.training:
                raise AdapterError("the model is merged; call unmerge(model) before training it")
            self.report_ = state.reports[name]
            return
        if state is None or name not in state.configs:
            check_returned(trainer, self.backbone)
        self.report_ = _placed(network, self.config, name)
        # Before optimizer, EMA or DDP see the factors. A checkpoint brings its own ranks.
        if name in state_in(network).unranked and trainer.training and checks.is_new(trainer):
            from lora_lightning.training.data_driven import choose_in_trainer

            given = self.data, self.forward
            self.report_ = choose_in_trainer(trainer, pl_module, network, name, *given)


def _placed(network: nn.Module, config: LoRAConfig, name: str) -> InjectionReport:
    report = place(network, config, name)
    set_active(network, name)  # it may have been there, inactive
    return report


def state_in(network: nn.Module) -> ModelState:
    """The `ModelState` of an injected network."""
    state = state_of(network)
    assert state is not None
    return state


def after_configure_model(pl_module: LightningModule, then: Callable[[], None]) -> None:
    """Call `then` right after the module's own ``configure_model``, until `put_back`."""
    original = pl_module.configure_model

    def wrapped() -> None:
        original()
        then()

    # In __dict__: past the module's __setattr__.
    pl_module.__dict__["configure_model"] = wrapped


def put_back(pl_module: LightningModule) -> None:
    """Undo `after_configure_model`."""
    pl_module.__dict__.pop("configure_model", None)
