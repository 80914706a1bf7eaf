"""Running recipes: YAML configuration, the runner, the common methods, the trainer."""

from lora_lightning.registry import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
