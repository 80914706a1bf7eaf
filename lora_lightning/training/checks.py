"""Checks that a Trainer, its callbacks and its optimizers suit an adapter, before training."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lora_lightning.errors import AdapterError, ConfigError, TargetError
from lora_lightning.model.batch_norm import tracking
from lora_lightning.model.owned_tensors import all_extras
from lora_lightning.model.state import state_of
from lora_lightning.model.view import View

# Whose optimizers hold the module's own parameters.
ALIKE = (DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy)
AVERAGES = (WeightAveraging, StochasticWeightAveraging)


def is_new(trainer: Trainer) -> bool:
    """Whether the fit starts from no checkpoint (the step is restored after `on_fit_start`)."""
    return trainer.global_step == 0 and trainer.ckpt_path is None


def has_backbone(pl_module: LightningModule, path: str) -> bool:
    """Whether the network exists already (it may be built in `setup` or `configure_model`)."""
    return isinstance(_get(pl_module, path), nn.Module)


def find_backbone(pl_module: LightningModule, path: str) -> nn.Module:
    """The network at this attribute path.

    Raises:
        TargetError: there is none; the message names the attributes there are.
    """
    found = _get(pl_module, path)
    if isinstance(found, nn.Module):
        return found
    children = [name for name, _ in pl_module.named_children()]
    raise TargetError(
        f"backbone={path!r}: {type(pl_module).__name__} has no module there; "
        f"its modules are {children}"
    )


def builds_late(pl_module: LightningModule) -> bool:
    """Whether the module may replace its network after the callbacks' `setup`."""
    return is_overridden("configure_model", pl_module) or is_overridden("setup", pl_module)


def _get(pl_module: LightningModule, path: str) -> Any:
    if not path:
        return pl_module
    try:
        return operator.attrgetter(path)(pl_module)
    except AttributeError:
        return None


def check_callbacks(trainer: Trainer, own: Callback) -> None:
    """Refuse callbacks that would undo the adapter, or copy the model before it exists."""
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    for other in callbacks:
        if isinstance(other, BaseFinetuning):
            raise ConfigError(
                f"{type(other).__name__} unfreezes the base that LoRACallback freezes: use one of "
                "the two (LoRACallback's `trainable` says what else to train)"
            )
        twin = type(other) is type(own) and other is not own
        if twin and other.backbone == getattr(own, "backbone", None):
            raise ConfigError(
                f"two LoRACallbacks for backbone={other.backbone!r}: one adapter is active at a "
                "time, so the other would never be trained. Use one callback, or several runs"
            )
        if twin and other.name.lower() == getattr(own, "name", "").lower():
            raise ConfigError(
                f"two LoRACallbacks with name={other.name!r} would write the same adapter file: "
                "give each a name of its own"
            )
        early = own in callbacks and callbacks.index(other) < callbacks.index(own)
        if isinstance(other, AVERAGES):
            _check_average(trainer, own, other, early)


def _check_average(trainer: Trainer, own: Any, other: Callback, early: bool) -> None:
    """Averages hold values only: neither tensors that are added later nor their meaning."""
    who = type(other).__name__
    if early:
        raise ConfigError(
            f"put LoRACallback before {who} in `callbacks`: the average is a copy of the module, "
            "which must hold the factors already"
        )
    if own.config.prune_to is not None:
        raise ConfigError(
            f"prune_to drops and turns directions while it trains, and {who} would average them "
            "with what they were before, so that none is dropped: leave one of the two out"
        )
    if not isinstance(other, StochasticWeightAveraging):
        return
    if not has_backbone(trainer.lightning_module, own.backbone):
        raise ConfigError(
            f"{who} copies the module before backbone={own.backbone!r} is built: build it in the "
            "module's __init__, or use WeightAveraging"
        )
    norms = tracking(find_backbone(trainer.lightning_module, own.backbone))
    if norms and own._batch_norm.policy == "frozen":
        raise ConfigError(
            f"{who} forgets the statistics of BatchNorm ({next(iter(norms))} …) to estimate them "
            "again, which batch_norm='frozen' forbids: they would be lost. Use "
            'LoRACallback(batch_norm="adapt") or WeightAveraging'
        )


def watched(trainer: Trainer, guard: Callback, kind: type[Any]) -> Any:
    """The one `LoRACallback` (`kind`) that a `FitGuard` acts on.

    Raises:
        ConfigError: there is none or several, or something would undo the guard's choice.
    """
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    for other in callbacks:
        if isinstance(other, AVERAGES):
            raise ConfigError(
                f"{type(other).__name__} copies its average over the model that FitGuard has "
                "chosen at the end, or FitGuard drops the average: use one of the two"
            )
    found = [c for c in callbacks[: callbacks.index(guard)] if isinstance(c, kind)]
    if len(found) != 1:
        raise ConfigError(
            f"FitGuard watches one LoRACallback, and {len(found)} stand before it in "
            "`callbacks`: use [LoRACallback(...), FitGuard()]"
        )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise ConfigError(
            "FitGuard compares whole adapters with the source, and ModelParallelStrategy shards "
            "them: leave it out, or fit with DDP or one process"
        )
    if found[0].config.prune_to is not None:
        raise ConfigError(
            "FitGuard brings the best epoch back, whose ranks may not have fallen yet: leave "
            "prune_to out (it lowers ranks itself, lower_rank=True), or the guard"
        )
    return found[0]


def source_kept(trainer: Trainer, path: Path) -> bool:
    """Whether a callback has kept the source model, so that there is no adapter to write."""
    kept = any(getattr(c, "keeps_source", False) for c in trainer.callbacks)  # type: ignore[attr-defined]
    if kept:
        old = f"; {path} is of an earlier fit" if path.exists() else ""
        rank_zero_info(f"The source model is kept: no adapter file is written{old}.")
    return kept


def check_all_within(pl_module: LightningModule, path: str, who: str) -> None:
    """Refuse trained tensors outside the backbone, which `who` cannot restore."""
    backbone = find_backbone(pl_module, path)
    within = {id(part) for part in (*backbone.modules(), *backbone.parameters())}
    norms = [(n, m) for n, m in tracking(pl_module).items() if m.training]
    trained = [(n, p) for n, p in pl_module.named_parameters() if p.requires_grad]
    loose = [name for name, part in [*trained, *norms] if id(part) not in within]
    if loose:
        more = " …" if len(loose) > 1 else ""
        raise ConfigError(
            f"{who} goes back towards the source in backbone={path!r} alone, and {len(loose)} of "
            f"the module's parts outside it would stay as trained ({loose[0]}{more}). Name a "
            'backbone that holds all that is trained (backbone="": the whole module), or freeze '
            "the rest (requires_grad_(False), and eval() for BatchNorm)"
        )


def check_unused_parameters(trainer: Trainer, backbone: nn.Module) -> None:
    """Layers that are dropped at random leave factors without gradient, which DDP refuses."""
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy):
        return
    dropping = [n for n, m in backbone.named_modules() if (getattr(m, "layer_drop", None) or 0) > 0]
    if dropping and not strategy._ddp_kwargs.get("find_unused_parameters", False):
        raise ConfigError(
            f"{dropping[0]}.layer_drop is above 0: layers dropped at random leave their factors "
            'without gradient. Use strategy="ddp_find_unused_parameters_true" or layer_drop=0'
        )


def check_still_frozen(backbone: nn.Module) -> None:
    """Raises `AdapterError` where the base was unfrozen during training."""
    state = state_of(backbone)
    if state is None or not state.frozen:
        return
    whole = all_extras(backbone, state)
    own = View(backbone).parameters
    trained = {id(own[n]) for n in whole}  # a tied parameter has several names
    loose = [n for n, p in own.items() if p.requires_grad and id(p) not in trained]
    if loose:
        raise AdapterError(
            f"{len(loose)} base parameters require a gradient again ({loose[0]} …): something "
            "unfroze the base after injection. List what you want to train in `trainable`"
        )
