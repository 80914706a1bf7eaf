"""Matrix decompositions: SVD, QR, NMF, streaming SVD."""

from lora_lightning.registry import face

__getattr__, __dir__, __all__ = face(__name__, __file__)
