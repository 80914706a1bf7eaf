"""What runs a recipe: its YAML, the one runner, the common methods, its trainer."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
