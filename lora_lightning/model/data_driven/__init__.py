"""Data-driven initialisation: activations, initial factors, ranks, pruning."""

from lora_lightning.registry import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
