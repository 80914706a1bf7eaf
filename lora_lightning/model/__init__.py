"""A whole network: selecting targets, injecting, switching, merging, saving, verifying."""

from lora_lightning.registry import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
