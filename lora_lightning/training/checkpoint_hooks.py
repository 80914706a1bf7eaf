"""Checkpoint hooks: frozen base weights are not saved, and adapters of another base not loaded."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning.pytorch import LightningModule
from torch import nn

from lora_lightning.errors import AdapterError, BaseMismatchError
from lora_lightning.lora.module_tree import join
from lora_lightning.model.fingerprint import fingerprint
from lora_lightning.model.owned_tensors import all_extras
from lora_lightning.model.state import state_of
from lora_lightning.model.view import View
from lora_lightning.training import checks

_PARTS = ("state_dict", "current_model_state")
_NOTES = "lora_lightning"


class Adapter(NamedTuple):
    """The adapter of a `LoRACallback`, as its checkpoint hooks need it."""

    backbone: str
    name: str
    config: dict[str, Any]


class _Hook:
    """Wraps one of a LightningModule's own checkpoint hooks.

    Lightning calls the module's hooks after every callback's and also for weights-only checkpoints,
    where callbacks are not called: only here is everything in place, the second copy that weight
    averaging adds included. A plain object with a reference to its module, so that it survives
    pickling and deep copies together with it.
    """

    method = ""

    def __init__(self, pl_module: LightningModule):
        self.pl_module = pl_module
        self.adapters: dict[str, Adapter] = {}

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Run the module's own hook, then this one."""
        getattr(type(self.pl_module), self.method)(self.pl_module, checkpoint)
        self.then(checkpoint)

    def then(self, checkpoint: dict[str, Any]) -> None:
        """Act on the checkpoint, after the module's own hook."""
        raise NotImplementedError

    def adapted(self, path: str) -> tuple[nn.Module, set[str]] | None:
        """This backbone, and its tensors trained in full; None where it has no adapters."""
        if not checks.has_backbone(self.pl_module, path):
            return None
        backbone = checks.find_backbone(self.pl_module, path)
        state = state_of(backbone)
        return None if state is None else (backbone, all_extras(backbone, state))


class SaveHook(_Hook):
    """Writes the base's fingerprint into a checkpoint; drops the frozen base weights."""

    method = "on_save_checkpoint"

    def then(self, checkpoint: dict[str, Any]) -> None:
        """Edit the checkpoint in place."""
        notes, frozen = checkpoint.setdefault(_NOTES, {}), frozen_names(self.pl_module)
        for key, own in self.adapters.items():
            if (found := self.adapted(own.backbone)) is not None:
                notes[key] = {"config": own.config, "base": fingerprint(*found)}
        for part in _PARTS:
            if part in checkpoint:
                kept = {k: v for k, v in checkpoint[part].items() if k not in frozen}
                checkpoint[part] = kept


def _frozen(pl_module: nn.Module, backbone: nn.Module, extras: set[str]) -> list[str]:
    """Names of its frozen base weights, under each name that the backbone itself has.

    `extras` are kept, even where the user froze them.
    """
    if View(backbone).merged:  # without factors the base is all there is
        return []
    own = View(backbone).parameters.items()
    frozen = [n for n, p in own if not p.requires_grad and n not in extras]
    places = pl_module.named_modules(remove_duplicate=False)
    return [join(path, n) for path, m in places if m is backbone for n in frozen]


def frozen_names(pl_module: LightningModule) -> set[str]:
    """Names of the frozen base weights that checkpoints of this module do not hold."""
    hook: Any = pl_module.__dict__.get(SaveHook.method)
    adapters = hook.adapters.values() if isinstance(hook, SaveHook) else ()
    found = [hook.adapted(own.backbone) for own in adapters]
    return {n for each in found if each is not None for n in _frozen(pl_module, *each)}


class LoadHook(_Hook):
    """Refuses a checkpoint whose adapters were trained on another base."""

    method = "on_load_checkpoint"

    def then(self, checkpoint: dict[str, Any]) -> None:
        """Raises `BaseMismatchError`, or `AdapterError` for a merged backbone."""
        for key, own in self.adapters.items():
            note, found = checkpoint.get(_NOTES, {}).get(key), self.adapted(own.backbone)
            if note is not None and found is not None and View(found[0]).merged:
                raise AdapterError(
                    f"{own.backbone or 'the backbone'} is merged and has no factors to load the "
                    f"checkpoint's adapter {own.name!r} into: call unmerge on it first"
                )
            if note is None or found is None or (base := fingerprint(*found)) == note["base"]:
                continue
            raise BaseMismatchError(
                f"the checkpoint's adapter {own.name!r} was trained on {note['base']}, and the "
                f"module's backbone is {base}. Checkpoints hold no base weights: build the module "
                "with the same pretrained weights as in the run that wrote it"
            )


def install(pl_module: LightningModule, key: str, adapter: Adapter) -> None:
    """Install both hooks for this adapter; a second call adds no second hook."""
    for made in (SaveHook, LoadHook):
        hook = pl_module.__dict__.get(made.method)
        if not isinstance(hook, made) or hook.pl_module is not pl_module:
            hook = pl_module.__dict__[made.method] = made(pl_module)
        hook.adapters[key] = adapter
