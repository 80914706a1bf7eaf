"""`AdapterBank`: mixed batches, in which each item has its own adapter."""

from lora_lightning.registry import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
