"""Low-rank adapters for any timm backbone and any torchaudio model, from a Lightning Trainer.

    from lora_lightning import LoRACallback
    Trainer(callbacks=[LoRACallback(rank=8, backbone="model")]).fit(module, data)

Names load on first use, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning.bank.adapter_bank import AdapterBank
    from lora_lightning.callback import LoRACallback
    from lora_lightning.combination import combine
    from lora_lightning.compression import compress
    from lora_lightning.config import LoRAConfig
    from lora_lightning.cross_fitting import cross_fit
    from lora_lightning.errors import LoRALightningError
    from lora_lightning.files import read_header, save_adapter
    from lora_lightning.fit_guard import FitGuard
    from lora_lightning.injection import inject
    from lora_lightning.loading import load_adapter
    from lora_lightning.optim import parameter_groups
    from lora_lightning.plan import fused
    from lora_lightning.prefix.cache import PrefixCache
    from lora_lightning.rank_choice import choose_ranks
    from lora_lightning.shifts import shift
    from lora_lightning.shrinkage import shrink
    from lora_lightning.source_statistics import SourceStatistics
    from lora_lightning.starting import start_from_data
    from lora_lightning.switching import adapters, disabled, merge, remove, set_active, unmerge
    from lora_lightning.transduction.callback import PseudoLabelCallback
    from lora_lightning.transduction.task import TransductiveTask
    from lora_lightning.verification import verify

__version__ = "0.1.0"

_HOME = {
    "AdapterBank": "bank.adapter_bank",
    "FitGuard": "fit_guard",
    "LoRACallback": "callback",
    "LoRAConfig": "config",
    "LoRALightningError": "errors",
    "PrefixCache": "prefix.cache",
    "PseudoLabelCallback": "transduction.callback",
    "SourceStatistics": "source_statistics",
    "TransductiveTask": "transduction.task",
    "adapters": "switching",
    "choose_ranks": "rank_choice",
    "combine": "combination",
    "compress": "compression",
    "cross_fit": "cross_fitting",
    "disabled": "switching",
    "fused": "plan",
    "inject": "injection",
    "load_adapter": "loading",
    "merge": "switching",
    "parameter_groups": "optim",
    "read_header": "files",
    "remove": "switching",
    "save_adapter": "files",
    "set_active": "switching",
    "shift": "shifts",
    "shrink": "shrinkage",
    "start_from_data": "starting",
    "unmerge": "switching",
    "verify": "verification",
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
    if name not in _HOME:
        raise AttributeError(f"module 'lora_lightning' has no attribute {name!r}")
    module = importlib.import_module(f"lora_lightning.{_HOME[name]}")
    for public, home in _HOME.items():
        if home == _HOME[name]:
            globals()[public] = getattr(module, public)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
