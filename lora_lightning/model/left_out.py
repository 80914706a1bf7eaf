"""Layers that ``"auto"`` and ``"all"`` would adapt if they could, and why they cannot."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from lora_lightning.lora import layers
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.model.injection_report import InjectionReport
from lora_lightning.model.introspection import classifier_modules
from lora_lightning.model.patterns import KEYWORDS, matches
from lora_lightning.model.view import View

_QUANTISED = (
    "quantised, its weight is packed; adapt the model before it is quantised, and merge then"
)


def noted(report: InjectionReport, view: View, config: LoRAConfig) -> InjectionReport:
    """The report, with what a keyword in `target_modules` leaves out; a warning says so too."""
    keyword = next((k for k in KEYWORDS if k in config.target_modules), None)
    if keyword is not None and (found := _left_out(view, config)):
        report = replace(report, left_out=found)
        _tell(keyword, report)
    return report


def _left_out(view: View, config: LoRAConfig) -> dict[str, str]:
    """Path → reason, for every module with a weight of its own that is no known kind of layer.

    But for the classifier, and what the configuration names itself.
    """
    chosen = [*config.exclude_modules, *config.target_modules, *classifier_modules(view)]
    found: dict[str, str] = {}
    for name, module in view.modules:
        within = any(name.startswith(f"{outer}.") for outer in found)
        if name and not within and (why := reason(module)):
            found[name] = why
    return {
        name: why
        for name, why in found.items()
        if not any(matches(p, name, view.model.get_submodule(name)) for p in chosen)
    }


def reason(module: nn.Module) -> str | None:
    """Why a module with a weight cannot be adapted; ``None`` where it can, or has none."""
    cls = type(module)
    if layers.kind_of(cls) is not None:
        return None
    weights, fixed = _weights(module._parameters), _weights(module._buffers)
    packed = "_packed_params" in module._modules or "_packed_params" in module.__dict__
    if packed or any(not w.is_floating_point() for w in weights + fixed):
        return f"{cls.__name__}: {_QUANTISED}"
    if not weights:  # a buffer of numbers is a fixed transform, such as a cosine transform
        return None
    return (
        f"{cls.__name__}: no known kind of layer; lora_lightning.lora.layers.add_layer_kind"
        f"({cls.__name__}) lets it be adapted through its effective weight"
    )


def _weights(named: Mapping[str, Tensor | None]) -> list[Tensor]:
    return [t for name, t in named.items() if "weight" in name and t is not None and t.dim() > 1]


def _tell(keyword: str, report: InjectionReport) -> None:
    """Warn of what is left out, in a sentence for each reason."""
    for why in dict.fromkeys(report.left_out.values()):
        names = [name for name, other in report.left_out.items() if other == why]
        also = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(
            f'target_modules="{keyword}" adapts {len(report.rows)} tensors and leaves {names[0]}'
            f"{also} out ({why}). Name layers in target_modules or exclude_modules to choose "
            "yourself",
            stacklevel=5,
        )
