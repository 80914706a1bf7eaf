"""Low-rank adapters for any timm backbone and any torchaudio model, from a Lightning Trainer.

    from lora_lightning import LoRACallback
    Trainer(callbacks=[LoRACallback(rank=8, backbone="model")]).fit(module, data)

Names load on first use, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning.adaptation.pseudo_label_callback import PseudoLabelCallback
    from lora_lightning.adaptation.shift.measure import shift
    from lora_lightning.adaptation.shift.source_statistics import SourceStatistics
    from lora_lightning.adaptation.transductive_task import TransductiveTask
    from lora_lightning.bank.adapter_bank import AdapterBank
    from lora_lightning.errors import LoRALightningError
    from lora_lightning.lora.config import LoRAConfig
    from lora_lightning.lora.fused.plan import fused
    from lora_lightning.model.adapter_file.load import load_adapter
    from lora_lightning.model.adapter_file.save import read_header, save_adapter
    from lora_lightning.model.combination import combine
    from lora_lightning.model.compression import compress
    from lora_lightning.model.data_driven.initialise import start_from_data
    from lora_lightning.model.data_driven.rank_choice import choose_ranks
    from lora_lightning.model.injection import inject
    from lora_lightning.model.parameter_groups import parameter_groups
    from lora_lightning.model.shrinkage import shrink
    from lora_lightning.model.switching import (
        adapters,
        disabled,
        merge,
        remove,
        set_active,
        unmerge,
    )
    from lora_lightning.model.verification import verify
    from lora_lightning.training.cross_fitting import cross_fit
    from lora_lightning.training.fit_guard import FitGuard
    from lora_lightning.training.lora_callback import LoRACallback
    from lora_lightning.training.prefix_cache.callback import PrefixCache

_HOME = {
    "AdapterBank": "bank.adapter_bank",
    "FitGuard": "training.fit_guard",
    "LoRACallback": "training.lora_callback",
    "LoRAConfig": "lora.config",
    "LoRALightningError": "errors",
    "PrefixCache": "training.prefix_cache.callback",
    "PseudoLabelCallback": "adaptation.pseudo_label_callback",
    "SourceStatistics": "adaptation.shift.source_statistics",
    "TransductiveTask": "adaptation.transductive_task",
    "adapters": "model.switching",
    "choose_ranks": "model.data_driven.rank_choice",
    "combine": "model.combination",
    "compress": "model.compression",
    "cross_fit": "training.cross_fitting",
    "disabled": "model.switching",
    "fused": "lora.fused.plan",
    "inject": "model.injection",
    "load_adapter": "model.adapter_file.load",
    "merge": "model.switching",
    "parameter_groups": "model.parameter_groups",
    "read_header": "model.adapter_file.save",
    "remove": "model.switching",
    "save_adapter": "model.adapter_file.save",
    "set_active": "model.switching",
    "shift": "adaptation.shift.measure",
    "shrink": "model.shrinkage",
    "start_from_data": "model.data_driven.initialise",
    "unmerge": "model.switching",
    "verify": "model.verification",
}

__all__ = [
    "AdapterBank",
    "FitGuard",
    "LoRACallback",
    "LoRAConfig",
    "LoRALightningError",
    "PrefixCache",
    "PseudoLabelCallback",
    "SourceStatistics",
    "TransductiveTask",
    "adapters",
    "choose_ranks",
    "combine",
    "compress",
    "cross_fit",
    "disabled",
    "fused",
    "inject",
    "load_adapter",
    "merge",
    "parameter_groups",
    "read_header",
    "remove",
    "save_adapter",
    "set_active",
    "shift",
    "shrink",
    "start_from_data",
    "unmerge",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("lora-lightning")
    if name not in _HOME:
        raise AttributeError(f"module 'lora_lightning' has no attribute {name!r}")
    module = importlib.import_module(f"lora_lightning.{_HOME[name]}")
    for public, home in _HOME.items():
        if home == _HOME[name]:
            globals()[public] = getattr(module, public)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
