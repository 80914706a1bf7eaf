"""`AdapterBank`: mixed batches, in which each item has its own adapter."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
