"""Reports of runs: tables, files, plots and an HTML page. Independent of models."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
