"""One layer: low-rank factors, their initialisation, adapted modules, and merging."""

from lora_lightning.registry import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
