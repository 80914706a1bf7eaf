"""Translation: data, models, methods and settings of the recipe."""

from lora_lightning.registry import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
