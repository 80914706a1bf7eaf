"""`FirstBatch`: verification of adapters on the first training batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import VerificationError
from lora_lightning.lora.factors import Factors
from lora_lightning.model.calling import Call
from lora_lightning.model.verification import verify

_ITEMS = 2


class FirstBatch:
    """Records the backbone's input, and verifies with it after the backward pass.

    A backbone that is never *called* (``self.model.forward_features(x)``) leaves no input;
    then the gradients of the training step itself must show that the factors are alive.
    """

    def __init__(self, backbone: nn.Module):
        self.backbone = backbone
        self._call: Call | None = None
        self._handle = backbone.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call is None and torch.is_grad_enabled():
            self._call = (_few(args), kwargs) if not kwargs else (args, kwargs)

    def close(self) -> None:
        """Stop recording."""
        self._handle.remove()

    @property
    def reached(self) -> bool:
        """Whether the backward pass that was reached any adapter."""
        return any(f.matrices()[-1].grad is not None for _, f in self._trained())

    def verify(self) -> None:
        """Raises `VerificationError` where an adapter is dead."""
        self.close()
        if not self.reached:
            raise VerificationError(
                "no adapter got a gradient: the loss does not depend on the backbone. Is its "
                "output detached, or computed under no_grad?"
            )
        if self._call is None:
            self._check_gradients()
            return
        args, kwargs = self._call
        given = _detached(args, self.backbone)
        verify(self.backbone, given, forward=lambda model, batch: model(*batch, **kwargs))

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


def _few(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The first two items of a batch of images; other inputs whole."""
    if len(args) == 1 and isinstance(args[0], Tensor) and args[0].dim() == 4:
        return (args[0][:_ITEMS],)
    return args


def _detached(args: tuple[Any, ...], model: nn.Module) -> tuple[Any, ...]:
    """Detached, and in the model's precision, as autocast no longer applies."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return tuple(
        a.detach().to(dtype if a.is_floating_point() else None) if isinstance(a, Tensor) else a
        for a in args
    )
