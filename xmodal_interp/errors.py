"""What can go wrong, as users meet it.

Every message says the rule, what came, and what is known or what to do.
"""

from __future__ import annotations

import reprlib
from typing import Any

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 4, 200, 200, 60
_short.maxlist = _short.maxtuple = _short.maxset = _short.maxdict = _short.maxarray = 20


def quoted(value: Any) -> str:
    """What was given, for a message: its ``repr``, cut where it is long or deeply nested."""
    return _short.repr(value)


class XmodalError(Exception):
    """Any refusal of this package; catch it to catch them all."""


class UnsupportedModelError(XmodalError, ValueError):
    """A model that cannot be read.

    Its type has no family record, or it has no vision part, no attention modules, an adapter that
    adds positions without a token, or text that reaches the image by cross-attention where image
    tokens are asked for.
    """


class InputError(XmodalError, ValueError):
    """An image, a prompt or an option that cannot be used."""


class CaptureError(XmodalError, RuntimeError):
    """Attention that was not seen, or that cannot be listened to, put together or edited."""


class LayerError(XmodalError, LookupError):
    """A layer, head, tower or call that the model does not have."""


class PositionError(XmodalError, LookupError):
    """A query or key position outside the sequence."""


class PhraseError(XmodalError, LookupError):
    """A phrase that does not occur in the text, or more often than the caller allowed for."""


class NotRecordedError(XmodalError, LookupError):
    """Something that exists in the model but was not kept: values, rows, layers."""


class NoSampleError(XmodalError, IndexError):
    """A sample beyond the end of a store."""


class GeometryError(XmodalError, ValueError):
    """No places for image or video tokens.

    Counts and grid do not fit together, a view or a rule for videos is missing, or maps do not fit
    the grid they are to be drawn or compared on.
    """


class StoreError(XmodalError, OSError):
    """A store that is missing, damaged, of another version, or made with other settings."""
