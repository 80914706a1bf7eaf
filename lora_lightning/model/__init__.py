"""A whole network: what is adapted, put on, switched, merged, combined, saved and verified."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
