"""Forward and backward passes of factorised layers that keep and compute less."""

from lora_lightning.registry import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
