"""Checkpoint hooks: frozen base weights are not saved, and adapters of another base not loaded."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lora_lightning.lora.module_tree import every_name, join, unwrapped
from lora_lightning.model.absent_base import AbsentBase, AbsentTensor
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
        notes = checkpoint.setdefault(_NOTES, {})
        for key, own in self.adapters.items():
            if (found := self.adapted(own.backbone)) is not None:
                notes[key] = {"config": own.config, "base": fingerprint(*found)}
                absent = AbsentBase(notes[key]["base"], found[1])
                _leave_out(checkpoint, _frozen(self.pl_module, *found), absent)


class _Frozen(NamedTuple):
    """Names of frozen base weights in a LightningModule's state dict."""

    own: list[str]  # those that the backbone itself fills in where they are absent
    # every other name → the weight: of aliases of the backbone's parts, of ties
    others: dict[str, nn.Parameter]


def _leave_out(checkpoint: dict[str, Any], frozen: _Frozen, absent: AbsentBase) -> None:
    """Drop these tensors from each part; the first is replaced, and those under other names."""
    # Each process samples all of them: of a sharded model only the first holds a state dict.
    samples = {name: AbsentTensor(tensor) for name, tensor in frozen.others.items()}
    for part in _PARTS:
        if part in checkpoint:
            held, dropped = checkpoint[part], set(frozen.own)
            kept = {k: v for k, v in held.items() if k not in dropped}
            kept |= {k: v for k, v in samples.items() if isinstance(kept.get(k), Tensor)}
            checkpoint[part] = dict.fromkeys(frozen.own[:1], absent) | kept


def _frozen(pl_module: nn.Module, backbone: nn.Module, extras: set[str]) -> _Frozen:
    """The names of its frozen base weights, by whatever path the module has them.

    `extras` are kept, even where the user froze them.
    """
    live = View(backbone).parameters
    kept = {id(live[n]) for n in extras if n in live}
    frozen = {n: p for n, p in live.items() if not p.requires_grad and id(p) not in kept}
    if View(backbone).merged:  # without factors the base is all there is
        frozen = {}
    inner = unwrapped(backbone)
    # As in the state dict: with what wraps the backbone, or parts of it.
    within = {p: w for p, w, _ in every_name(inner)}
    whole = [join(within[n.rpartition(".")[0]], n.rpartition(".")[2]) for n in frozen]
    named = list(every_name(pl_module)) if frozen else []
    own = [join(w, n) for _, w, m in named if m is inner for n in whole]
    known, ids = set(own), {id(p) for p in frozen.values()}
    others = {
        name: p
        for _, w, m in named
        for n, p in m._parameters.items()
        if id(p) in ids and p is not None and (name := join(w, n)) not in known
    }
    return _Frozen(own, others)


def frozen_names(pl_module: LightningModule) -> set[str]:
    """Names of the frozen base weights that checkpoints of this module do not hold."""
    hook: Any = pl_module.__dict__.get(SaveHook.method)
    adapters = hook.adapters.values() if isinstance(hook, SaveHook) else ()
    found = [hook.adapted(own.backbone) for own in adapters]
    frozen = [_frozen(pl_module, *each) for each in found if each is not None]
    return {name for own, others in frozen for name in (*own, *others)}


class LoadHook(_Hook):
    """Puts an `AbsentBase` into checkpoints of versions that wrote the fingerprint aside alone."""

    method = "on_load_checkpoint"

    def then(self, checkpoint: dict[str, Any]) -> None:
        """Edit the checkpoint in place."""
        for part in _PARTS:
            held = checkpoint.get(part, {})
            if held and not any(isinstance(value, AbsentBase) for value in held.values()):
                checkpoint[part] = self._absent(checkpoint.get(_NOTES, {}), held) | held

    def _absent(self, notes: dict[str, Any], held: dict[str, Any]) -> dict[str, Any]:
        absent = {}
        for key, own in self.adapters.items():
            if key in notes and (found := self.adapted(own.backbone)) is not None:
                frozen = _frozen(self.pl_module, *found).own
                if frozen and held.keys().isdisjoint(frozen):
                    absent[frozen[0]] = AbsentBase(notes[key]["base"], found[1])
        return absent


def install(pl_module: LightningModule, key: str, adapter: Adapter) -> None:
    """Install both hooks for this adapter; a second call adds no second hook."""
    for made in (SaveHook, LoadHook):
        hook = pl_module.__dict__.get(made.method)
        if not isinstance(hook, made) or hook.pl_module is not pl_module:
            hook = pl_module.__dict__[made.method] = made(pl_module)
        hook.adapters[key] = adapter
