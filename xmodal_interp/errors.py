"""What can go wrong, as users meet it.

Every message says the rule, what came, and what is known or what to do.
"""

from __future__ import annotations


class XmodalError(Exception):
    """Any refusal of this package; catch it to catch them all."""


class UnsupportedModelError(XmodalError, ValueError):
    """The model is of a type that has no family record, or it has no vision part."""


class InputError(XmodalError, ValueError):
    """An image, a prompt or an option that cannot be used."""


class CaptureError(XmodalError, RuntimeError):
    """Attention ran that was not seen, or the model cannot be listened to."""


class LayerError(XmodalError, LookupError):
    """A layer, head, tower or call that the model does not have."""


class PositionError(XmodalError, LookupError):
    """A query or key position outside the sequence."""


class PhraseError(XmodalError, LookupError):
    """A phrase that does not occur in the text, or more often than the caller allowed for."""


class NotRecordedError(XmodalError, LookupError):
    """Something that exists in the model but was not kept: values, rows, layers."""


class GeometryError(XmodalError, ValueError):
    """Token counts and image grid do not fit together."""


class StoreError(XmodalError, OSError):
    """A store that is missing, damaged, of another version, or made with other settings."""
