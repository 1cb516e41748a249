"""Rows of values in 8 bits.

``code = round(254 sqrt(value / largest))``, where ``largest`` is the largest value of the row; 255
for a key that the mask hides. The page decodes ``value = largest (code / 254)^2``. The error is at
most 0.4% of ``largest``, and small values have small errors.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

LEVELS = 254
"""Largest code of a value."""

HIDDEN = 255
"""Code of a key that the mask hides from the query."""

ERROR = 0.004
"""Largest error of a decoded value, as a share of the largest value of its row."""


def encoded(
    values: Float[np.ndarray, "*row key"],
) -> tuple[UInt8[np.ndarray, "*row key"], Float[np.ndarray, "*row"], float]:
    """Encode rows of values of at least 0 in 8 bits; NaN is ``HIDDEN``.

    Returns:
        The codes, the largest value of each row (float32), and the largest error of a decoded
        value.
    """
    seen = ~np.isnan(values)
    filled = np.where(seen, values, 0.0)
    largest = filled.max(-1).astype(np.float32)
    scale = np.where(largest > 0, largest, 1.0).astype(np.float64)[..., None]
    levels = np.clip(np.round(LEVELS * np.sqrt(filled / scale)), 0, LEVELS).astype(np.uint8)
    codes = np.where(seen, levels, np.uint8(HIDDEN))
    error = np.abs(np.where(seen, decoded(codes, largest), 0.0) - filled)
    return codes, largest, float(error.max(initial=0.0))


def decoded(
    codes: UInt8[np.ndarray, "*row key"], largest: Float[np.ndarray, "*row"]
) -> Float[np.ndarray, "*row key"]:
    """Return the values of codes; NaN for ``HIDDEN``. The page computes the same."""
    values = (codes / LEVELS) ** 2 * largest[..., None].astype(np.float64)
    return np.where(codes == HIDDEN, np.nan, values)
