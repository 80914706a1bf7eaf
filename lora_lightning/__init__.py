"""Low-rank adapters for any timm backbone and any torchaudio model, from a Lightning Trainer.

    from lora_lightning import LoRACallback
    Trainer(callbacks=[LoRACallback(rank=8, backbone="model")]).fit(module, data)

The public names stand in `__init__.pyi` beside this file, for readers, editors and type checkers;
so do those of each room. They load on first use: importing the package costs next to nothing.
"""

from __future__ import annotations

from lora_lightning.registry import face

_load, __dir__, __all__ = face(__name__, __file__)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from lora_lightning.report.versions import installed

        return installed()
    return _load(name)
