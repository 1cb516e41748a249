"""Analyses: each takes a sample, a list of samples or a store and returns a tidy table."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
