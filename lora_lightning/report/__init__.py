"""Reports of runs: tables, files, plots and an HTML page. Independent of models."""

from lora_lightning.registry import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
