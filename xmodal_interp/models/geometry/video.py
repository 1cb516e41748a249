"""What a rule returns for a video: the tokens of its frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, eq=False)
class VideoGrid:
    """The tokens of one video, in sequence order.

    Attributes:
        width: Width of the original frames, px.
        height: Height of the original frames, px.
        frames: How many frames of tokens there are; one may stand for several of the video's.
        rows: Rows of tokens of a frame.
        cols: Columns of tokens of a frame.
        places: Frame, row and column of each token; ``NOWHERE`` for tokens without a place.
        boxes: ``(x0, y0, x1, y1)`` of each token in pixels of the original frames, NaN without a
            place.
        times: When each frame of tokens begins, in seconds; NaN where the processor was not told.
    """

    width: int
    height: int
    frames: int
    rows: int
    cols: int
    places: Int[np.ndarray, "token 3"]
    boxes: Float[np.ndarray, "token 4"]
    times: Float[np.ndarray, " frame"]

    @property
    def n_tokens(self) -> int:
        """Tokens this video takes."""
        return len(self.places)
