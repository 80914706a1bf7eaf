"""`FirstBatch`: verification of adapters on the first training batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lora_lightning.errors import VerificationError
from lora_lightning.lora.factors import Factors
from lora_lightning.model.verification import verify
from lora_lightning.training.prefix_cache.store import Inputs

_ITEMS = 2
_ELSEWHERE = "the adapters fail on the first batch of another process, whose error says which"


class FirstBatch:
    """Records the backbone's input, and verifies with it after the backward pass.

    Two items will do; the whole batch is looked at where they fail. Precision is that of the
    training step. A backbone that is never *called* (``self.model.forward_features(x)``) leaves no
    input; then the gradients of the training step itself must show that the factors are alive.
    """

    def __init__(self, backbone: nn.Module):
        self.backbone = backbone
        self._call: Inputs | None = None
        self._handle = backbone.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call is None and torch.is_grad_enabled():
            kind = next(module.parameters()).device.type
            state = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
            self._call, self._autocast = Inputs(args, kwargs), partial(torch.autocast, kind, *state)

    def close(self) -> None:
        """Stop recording."""
        self._handle.remove()

    @property
    def reached(self) -> bool:
        """Whether the backward pass that was reached any adapter."""
        return any(f.matrices()[-1].grad is not None for _, f in self._trained())

    def verify(self, trainer: Trainer) -> None:
        """Verify on every process; all raise where one does, as the others would wait for it.

        Raises:
            VerificationError: an adapter is dead, here or on another process.
        """
        self.close()
        agreed = trainer.strategy.reduce_boolean_decision  # on all processes equally often
        if agreed((few := self._failure(trainer, _ITEMS)) is None):
            return
        # What is out of memory with two items has no room for more.
        full = isinstance(few, torch.OutOfMemoryError)
        if agreed((whole := few if full else self._failure(trainer, None)) is None):
            return
        if whole is None:
            raise VerificationError(_ELSEWHERE)
        raise few if isinstance(few, VerificationError) else whole

    def _failure(self, trainer: Trainer, items: int | None) -> Exception | None:
        try:
            self._verify(trainer, items)
        except Exception as error:  # of two items a model may say anything
            return error
        return None

    def _verify(self, trainer: Trainer, items: int | None) -> None:
        if not self.reached:
            raise VerificationError(
                "no adapter got a gradient: the loss does not depend on the backbone. Is its "
                "output detached, or computed under no_grad?"
            )
        if self._call is None:
            self._check_gradients()
            return
        given = self._call
        if items is not None and given.size > items:
            given = given.rows(range(items))
        args, kwargs = tree_map_only(Tensor, torch.detach, (given.args, given.kwargs))

        def forward(model: nn.Module, batch: Any) -> Any:
            with trainer.precision_plugin.forward_context(), self._autocast():
                return model(*batch, **kwargs)

        verify(self.backbone, args, forward=forward)

    def _trained(self) -> list[tuple[str, Factors]]:
        return [
            (n, f)
            for n, f in self.backbone.named_modules()
            if isinstance(f, Factors) and f.matrices()[-1].requires_grad
        ]

    def _check_gradients(self) -> None:
        factors = self._trained()
        dead = [n for n, f in factors if f.matrices()[-1].grad is None]
        if dead:
            raise VerificationError(
                f"{len(dead)} of {len(factors)} adapters got no gradient from the first batch: "
                f"{', '.join(dead[:10])}. The model does not use these weights; exclude them"
            )
