"""From a base and an adapter to what others can use: files for other programs, and a service."""

from lora_lightning.registry import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
