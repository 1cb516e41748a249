"""Geometry rules: rows, columns and boxes of image tokens in the original image.

A rule reproduces the steps of the image processor (resize, crop, tiling, merging) from the
processor's settings and outputs, and returns one :class:`ImageGrid` per image. Families may share a
rule. No rule guesses a grid from the number of tokens.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
