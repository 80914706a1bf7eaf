"""The last word when Lightning saves: no frozen base weight goes into a checkpoint."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule

from lora_lightning import trainer_checks as checks
from lora_lightning.state import merged_layers, state_of
from lora_lightning.structure import base_parameters

_METHOD = "on_save_checkpoint"
_PARTS = ("state_dict", "current_model_state")


class SaveHook:
    """Stands in for a LightningModule's own ``on_save_checkpoint``, and calls it first.

    Lightning calls the module's hook after every callback's and also for weights-only
    checkpoints, where callbacks are not asked: only here is everything in place, the second
    copy that weight averaging adds included. A plain object with a reference to its module, so
    that it survives pickling and deep copies together with it.
    """

    def __init__(self, pl_module: LightningModule):
        self.pl_module = pl_module
        self.backbones: list[str] = []

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Run the module's own hook, then drop the frozen base weights."""
        type(self.pl_module).on_save_checkpoint(self.pl_module, checkpoint)
        frozen = {name for path in self.backbones for name in self._frozen(path)}
        for part in _PARTS:
            if part in checkpoint:
                kept = {k: v for k, v in checkpoint[part].items() if k not in frozen}
                checkpoint[part] = kept

    def _frozen(self, path: str) -> list[str]:
        if not checks.has_backbone(self.pl_module, path):
            return []
        backbone = checks.find_backbone(self.pl_module, path)
        # Without factors the base is all there is.
        if state_of(backbone) is None or merged_layers(backbone):
            return []
        prefix = f"{path}." if path else ""
        own = base_parameters(backbone).items()
        return [f"{prefix}{name}" for name, p in own if not p.requires_grad]


def install(pl_module: LightningModule, backbone: str) -> None:
    """Prune the checkpoints of this module from now on; twice is once."""
    hook = pl_module.__dict__.get(_METHOD)
    if not isinstance(hook, SaveHook) or hook.pl_module is not pl_module:
        hook = SaveHook(pl_module)
        pl_module.__dict__[_METHOD] = hook
    if backbone not in hook.backbones:
        hook.backbones.append(backbone)
