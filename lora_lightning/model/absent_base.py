"""`AbsentBase`: what stands in a checkpoint for the weights of a frozen base."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import AdapterError, BaseMismatchError
from lora_lightning.model.fingerprint import fingerprint, sample
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


class AbsentTensor:
    """Stands in a checkpoint for one frozen weight, under a second name that a module has for it.

    Whoever loads it copies nothing, as the weight is the backbone's own: what is there is compared.
    """

    def __init__(self, tensor: Tensor):
        self.shape, self.sample = tensor.shape, sample(tensor)

    is_meta = False

    def size(self) -> torch.Size:
        """The weight's."""
        return self.shape

    def detach(self) -> Any:
        """What ``load_state_dict(assign=True)`` asks for, which would take the weight away."""
        raise AdapterError("a frozen weight under a second name cannot be assigned: assign=False")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """``live.copy_(self)``: leaves it as it is.

        Raises:
            BaseMismatchError: it holds other values.
        """
        live, absent = args
        if not live.is_meta and sample(live) != absent.sample:
            raise BaseMismatchError(
                "the checkpoint holds no values for this name, since it was another name of a "
                "frozen weight of the adapted backbone, and here it is a tensor with other values: "
                "build the module as in the run that wrote the checkpoint"
            )
        return live


# For torch.load(weights_only=True).
torch.serialization.add_safe_globals([AbsentBase, AbsentTensor])
