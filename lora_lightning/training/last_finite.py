"""`LastFinite`: stops a fit that has diverged, and restores the adapter's last finite values."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lora_lightning.lora.sharding import is_sharded, part
from lora_lightning.lora.values import finite
from lora_lightning.model.shrinkage import own_tensors
from lora_lightning.training import checks

LOOK_EVERY = 10  # steps on a device, which would have to be waited for at each look


class LastFinite:
    """The active adapter's values after the last step at which all of them were finite.

    They are kept where the adapter is, by operations that do not wait for it; only a look at
    whether a step has brought NaN or infinity does. So the fit stops at most `LOOK_EVERY` steps
    later on a device, and at once on a CPU; what is restored is the same.
    """

    def __init__(self) -> None:
        self._own: list[Tensor] = []  # parameters first
        self._kept = self._finite = torch.empty(0)
        self._step = self._looked = -1

    def start(self, trainer: Trainer, backbone: nn.Module) -> None:
        """Before the first step."""
        if not isinstance(trainer.strategy, checks.ALIKE):
            return  # flattened tensors
        # Of the buffers those that training moves; others may rightly hold infinity (masks).
        found = [t for name, t in own_tensors(backbone).items() if _trains(t) or _moves(name)]
        self._own = sorted(found, key=lambda t: not _trains(t))
        self._kept = self._values()
        self._step = self._looked = trainer.global_step

    def after_batch(self, trainer: Trainer, look: bool = False) -> bool:
        """Whether the fit has diverged, and is stopped; call before ranks are pruned."""
        if not self._own or trainer.global_step == self._step:
            return bool(self._own) and look and self._lost(trainer)
        self._step = trainer.global_step
        values = self._values()
        # Statistics of BatchNorm differ between processes, which must all stop at once.
        count = sum(part(t).numel() for t in self._own if trainer.world_size == 1 or _trains(t))
        self._finite = values[:count].isfinite().all()
        if any(map(is_sharded, self._own)):  # each process sees its part
            votes = self._finite.int()
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN)
            self._finite = votes.bool()
        if values.shape == self._kept.shape:
            torch.where(self._finite, values, self._kept, out=self._kept)
        elif bool(self._finite):  # ranks were pruned
            self._kept = values
        now = look or values.device.type == "cpu" or self._step - self._looked >= LOOK_EVERY
        return now and self._lost(trainer)

    def _lost(self, trainer: Trainer) -> bool:
        self._looked = self._step
        if self._finite.numel() == 0 or bool(self._finite):
            return False
        self._restore()
        for optimizer in trainer.optimizers:  # a checkpoint of it could not be resumed
            for parameter, state in list(optimizer.state.items()):
                if is_sharded(parameter) or not all(map(_is_finite, state.values())):
                    del optimizer.state[parameter]
        trainer.should_stop = True
        rank_zero_warn(
            f"the adapter holds NaN or infinity after step {self._step}: the fit has diverged and "
            "is stopped, and the adapter's values of the last finite step are kept. Lower the "
            "learning rate, clip gradients (gradient_clip_val), or train in float32 or bfloat16"
        )
        self._own = []
        return True

    @torch.no_grad()
    def _values(self) -> Tensor:
        device = self._own[0].device
        return torch.cat([part(t.detach()).reshape(-1).to(device) for t in self._own])

    @torch.no_grad()
    def _restore(self) -> None:
        sizes = [part(t).numel() for t in self._own]
        if len(self._kept) != sum(sizes):  # none were finite since ranks were pruned
            return
        for tensor, values in zip(self._own, torch.split(self._kept, sizes), strict=True):
            part(tensor).copy_(values.view_as(part(tensor)))


def _trains(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _moves(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def _is_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or finite(value)
