"""Lightning: the callbacks, their checks, early stopping and checkpoints."""

from lora_lightning.registry import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
