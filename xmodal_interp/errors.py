"""The exceptions of this package.

Each message states what is wrong with the value that was passed, then how to fix it.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 4, 200, 200, 60
_short.maxlist = _short.maxtuple = _short.maxset = _short.maxdict = _short.maxarray = 20


def quoted(value: Any) -> str:
    """Return the ``repr`` of a value for a message, shortened if it is long or deeply nested."""
    return _short.repr(value)


def counted(n: int, noun: str) -> str:
    """Return a number with its noun: ``1 sample``, ``2 samples``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def first_of(names: Sequence[str], most: int = 5) -> str:
    """Return the first names for a message, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


class XmodalError(Exception):
    """Base class of all exceptions of this package."""


class UnsupportedModelError(XmodalError, ValueError):
    """A model that is not supported.

    The model type has no family record, or the model has no vision tower, no attention modules or
    an adapter that adds positions without a token. Functions that require image tokens in the text
    also raise it for models with cross-attention to the image.
    """


class InputError(XmodalError, ValueError):
    """An invalid image, prompt or option."""


class CaptureError(XmodalError, RuntimeError):
    """Attention that was missed, or that cannot be recorded, joined or edited."""


class LayerError(XmodalError, LookupError):
    """A layer, head, tower or call that the model does not have."""


class PositionError(XmodalError, LookupError):
    """A query or key position outside the sequence."""


class PhraseError(XmodalError, LookupError):
    """A phrase that does not occur in the text, or occurs several times."""


class NotRecordedError(XmodalError, LookupError):
    """Layers, rows or values that the model has but that were not kept."""


class NoSampleError(XmodalError, IndexError):
    """A sample index outside the store."""


class GeometryError(XmodalError, ValueError):
    """Tokens or maps that do not match the grid of an image or a video.

    The number of tokens does not match the grid, the view does not exist, the places of the tokens
    are unknown, or a map does not have the shape of the grid on which it is drawn or compared.
    """


class StoreError(XmodalError, OSError):
    """A store that is missing or damaged, has another version, or was made with other settings."""
