"""`AbsentBase`: what stands in a checkpoint for the weights of a frozen base."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lora_lightning.errors import AdapterError, BaseMismatchError
from lora_lightning.model.fingerprint import fingerprint
from lora_lightning.model.view import View


class AbsentBase:
    """Names the base whose frozen weights a checkpoint leaves out, in the place of the first.

    So whatever loads the checkpoint meets it: an injected model compares its own base with it, and
    in a model without adapters torch asks whether it is a tensor, which raises, strict or not.

    Args:
        base: The fingerprint, see `lora_lightning.model.fingerprint`.
        extras: Names of the tensors trained in full, which are no part of it.
    """

    def __init__(self, base: dict[str, str], extras: Iterable[str]):
        self.base, self.extras = base, sorted(extras)

    @property
    def __torch_function__(self) -> Any:
        """Raise `AdapterError`: read where a state dict is loaded into a model without adapters."""
        raise AdapterError(
            "the checkpoint holds adapters and no weights of their frozen base "
            f"({self.base['architecture']}), and this model has no adapters to load them into: "
            "call inject(self.model, ...) in the module's __init__, with the configuration of the "
            "run, or load it through a Trainer with the LoRACallback"
        )

    def check(self, view: View) -> None:
        """Raise `BaseMismatchError` where the adapters were trained on another base."""
        if (own := fingerprint(view, self.extras)) != self.base:
            raise BaseMismatchError(
                f"the checkpoint's adapters were trained on {self.base}, and the model's base is "
                f"{own}. Checkpoints hold no base weights: build the module with the same "
                "pretrained weights as in the run that wrote it"
            )


torch.serialization.add_safe_globals([AbsentBase])  # for torch.load(weights_only=True)
