"""`parameter_groups` for an optimizer: LoRA+ learning rates, no decay of norms and biases."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_lightning.errors import AdapterNotFoundError
from lora_lightning.lora.factors import Factors
from lora_lightning.lora.values import check_number

_MATRICES = ("lora_A", "lora_B", "core")


def parameter_groups(
    module: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    lora_plus_ratio: float = 1.0,
    head_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Groups of all trainable parameters of `module`, ready for a torch optimizer.

    Args:
        module: An injected model, or a LightningModule that holds one.
        lr: Learning rate of A, and of parameters trained in full.
        weight_decay: For factors and matrices; norms, biases and magnitudes get 0.
        lora_plus_ratio: Learning rate of B over that of A. LoRA+ (Hayou et al. 2024,
            arXiv:2402.12354) advises values around 16 for large models.
        head_lr: Learning rate of parameters trained in full; None: `lr`.

    Returns:
        Up to five groups, each with ``name``, ``params``, ``lr`` and ``weight_decay``:
        ``lora_A``, ``lora_B``, ``core`` (of LoRA-XS, at `lr`), ``full`` and ``no_decay``.

    Raises:
        ConfigError: a rate or ratio is not above zero.
        AdapterNotFoundError: no factor of `module` is trainable.
    """
    for key, value in (("lr", lr), ("lora_plus_ratio", lora_plus_ratio), ("head_lr", head_lr)):
        if value is not None:
            check_number(key, value, "(0, inf)")
    split = _split(module)
    if not any(split[name] for name in _MATRICES):
        raise AdapterNotFoundError(
            "no trainable factor found: inject an adapter before making the optimizer "
            "(LoRACallback does so in its setup)"
        )
    full_lr = lr if head_lr is None else head_lr
    rates = {"lora_A": lr, "lora_B": lr * lora_plus_ratio, "core": lr}
    rates |= {"full": full_lr, "no_decay": full_lr}
    return [
        {
            "name": name,
            "params": parameters,
            "lr": rates[name],
            "weight_decay": 0.0 if name == "no_decay" else weight_decay,
        }
        for name, parameters in split.items()
        if parameters
    ]


def _split(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    split: dict[str, list[nn.Parameter]] = {n: [] for n in (*_MATRICES, "full", "no_decay")}
    seen: set[int] = set()
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(owner, Factors) and name in _MATRICES:
                split[name].append(parameter)
            else:
                split["no_decay" if parameter.dim() < 2 else "full"].append(parameter)
    return split
