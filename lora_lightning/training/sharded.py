"""Fits whose model is sharded: FSDP2, by Lightning's `ModelParallelStrategy`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from lora_lightning.errors import AdapterFileError, ConfigError
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.initialisation import METHODS
from lora_lightning.lora.sharding import is_sharded
from lora_lightning.training import checks
from lora_lightning.training.checkpoint_hooks import frozen_names

_USE = "ModelParallelStrategy(data_parallel_size=…, tensor_parallel_size=1)"
_LOAD = "load_checkpoint"


def check_strategy(trainer: Trainer, config: LoRAConfig) -> None:
    """Refuse, before anything is built, what cannot train in pieces.

    Raises:
        ConfigError: FSDP1; or what needs whole weights, or changes their sizes, during the fit.
    """
    if isinstance(trainer.strategy, FSDPStrategy):
        raise ConfigError(
            "FSDPStrategy (FSDP1) flattens parameters, so that no layer has a weight to adapt: use "
            f"{_USE} and fully_shard in configure_model, see docs/scale.md"
        )
    if not is_sharded_fit(trainer):
        return
    needs = METHODS[config.init].needs
    asks = {
        f'rank="{config.rank}"': config.by_rule,
        f"init={config.init!r}": needs != "nothing",
        "prune_to": config.prune_to is not None,
    }
    others: list[Callback] = list(trainer.callbacks)  # type: ignore[attr-defined]
    copying = {type(c).__name__: isinstance(c, checks.AVERAGES) for c in others}
    for what, asked in (asks | copying).items():
        if asked:
            raise ConfigError(
                f"{what} needs whole weights during the fit, which ModelParallelStrategy shards: "
                "leave it out, or fit with DDP or one process"
            )


def is_sharded_fit(trainer: Trainer) -> bool:
    """Whether `ModelParallelStrategy` runs this trainer's stages."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def writes(trainer: Trainer) -> bool:
    """Whether this process takes part in writing an adapter file: all do where it is gathered."""
    return trainer.is_global_zero or is_sharded_fit(trainer)


def check_sharded(trainer: Trainer, pl_module: LightningModule) -> None:
    """What is trained must be sharded over all processes, or its gradients are never averaged.

    Raises:
        ConfigError: a tensor that trains is held by each process alone, or offloaded to the CPU.
    """
    if not is_sharded_fit(trainer) or trainer.world_size == 1:
        return
    for name, parameter in pl_module.named_parameters():
        if not parameter.requires_grad:
            continue
        mesh = getattr(parameter, "device_mesh", None)
        if not is_sharded(parameter) or mesh is None or mesh.size() < trainer.world_size:
            raise ConfigError(
                f"{name} trains and is not sharded over all {trainer.world_size} processes, which "
                "would each train another one. In configure_model call fully_shard(module, "
                'mesh=self.device_mesh["data_parallel"]) on a module that holds it, with '
                f"{_USE}"
            )
        if parameter.device.type != mesh.device_type:
            raise ConfigError(
                f"{name} is offloaded to the {parameter.device.type} (CPUOffloadPolicy), where its "
                "parts cannot be gathered into a file: leave offload_policy out"
            )


def load_without_base(trainer: Trainer, pl_module: LightningModule) -> None:
    """Let the strategy load checkpoints that hold no frozen base weights, until `put_back`."""
    if not is_sharded_fit(trainer) or _LOAD in trainer.strategy.__dict__:
        return
    original = trainer.strategy.load_checkpoint

    def load(path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        with _without_base(pl_module):
            _check_keys(Path(trainer.strategy.broadcast(path)), pl_module)
            loaded: dict[str, Any] = original(path, *args, **options)
            return loaded

    trainer.strategy.__dict__[_LOAD] = load


def put_back(trainer: Trainer) -> None:
    """Undo `load_without_base`."""
    trainer.strategy.__dict__.pop(_LOAD, None)


@contextmanager
def _without_base(pl_module: LightningModule) -> Iterator[None]:
    """Within the block the module's state dict is what its checkpoints hold."""

    def drop(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
        for name in frozen_names(pl_module):
            state_dict.pop(name, None)

    handle = pl_module.register_state_dict_post_hook(drop)  # type: ignore[no-untyped-call]
    strict, pl_module.strict_loading = pl_module.strict_loading, False
    try:
        yield
    finally:
        handle.remove()
        pl_module.strict_loading = strict


def _check_keys(path: Path, pl_module: LightningModule) -> None:
    """Strictness, which Lightning would apply to the base too; a folder's keys torch checks."""
    if not path.is_file():
        return
    given = torch.load(path, mmap=True, map_location="meta", weights_only=False)["state_dict"]
    if missing := sorted(pl_module.state_dict().keys() - given.keys()):
        raise AdapterFileError(
            f"{path} lacks {len(missing)} of the tensors that the module trains or keeps (first: "
            f"{missing[0]}): build the module, and LoRACallback, as in the run that wrote it"
        )
