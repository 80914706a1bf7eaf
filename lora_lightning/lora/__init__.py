"""One layer: its low-rank factors, where they start, and the module that bears them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
