"""`check_optimizers`: whether all that an adapter trains is in an optimizer."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lora_lightning.errors import AdapterError
from lora_lightning.model.owned_tensors import all_extras
from lora_lightning.model.state import named_factors, state_of
from lora_lightning.model.view import View
from lora_lightning.training.checks import ALIKE


def check_optimizers(
    trainer: Trainer, pl_module: LightningModule, backbone: nn.Module, name: str
) -> None:
    """Every trainable factor must be in an optimizer; frozen parameters need not be.

    Raises:
        AdapterError: factors are missing, and would never be trained.
    """
    if not trainer.optimizers or not isinstance(trainer.strategy, ALIKE):
        return
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    captured = {id(p) for group in groups for p in group["params"]}
    wanted = {
        f"{path}.{key}": parameter
        for path, factors in named_factors(backbone, name).items()
        for key, parameter in factors.named_parameters()
        if parameter.requires_grad
    }
    if not wanted:
        raise AdapterError(
            f"adapter {name!r} has no trainable factor: another adapter is active, or something "
            "froze it after injection"
        )
    missing = [path for path, p in wanted.items() if id(p) not in captured]
    if missing:
        raise AdapterError(
            f"configure_optimizers holds {len(wanted) - len(missing)} of {len(wanted)} factors "
            f"(missing: {missing[0]} …). Give it self.parameters(), or "
            "lora_lightning.parameter_groups(self, lr=...)"
        )
    state = state_of(backbone)
    whole = all_extras(backbone, state) if state else set()
    left = [
        n
        for n, p in View(backbone).parameters.items()
        if n in whole and p.requires_grad and id(p) not in captured
    ]
    if left:
        rank_zero_warn(
            f"configure_optimizers leaves out {len(left)} parameters that the adapter trains in "
            f"full ({left[0]} …): they stay as they are. Give it self.parameters(), or "
            "lora_lightning.parameter_groups(self, lr=...), or leave them out of `trainable`."
        )
    idle = [n for n, p in pl_module.named_parameters() if not p.requires_grad and id(p) in captured]
    if idle:
        rank_zero_warn(
            f"configure_optimizers captured {len(idle)} frozen parameters ({idle[0]} …). They are "
            "not updated; to pass only what is trained use "
            "lora_lightning.parameter_groups(self, lr=...) or filter on requires_grad."
        )
