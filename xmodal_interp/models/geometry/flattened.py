"""Patches flattened to vectors that start with their row and column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from PIL import Image

from xmodal_interp.models.geometry.cells import image_grid, nowhere, rectangle
from xmodal_interp.models.geometry.grid import ImageGrid
from xmodal_interp.models.geometry.replaying import setting
from xmodal_interp.models.geometry.tiling import whole


@dataclass(frozen=True)
class FlattenedPatches:
    """As many patches as fit at the image's aspect ratio, followed by padding (Pix2Struct).

    Each side is rounded down to whole patches independently, so the boxes fill the image exactly.
    If the processor draws the question above the image, rows and columns include it, and boxes are
    not known.

    Attributes:
        queries: Configuration attribute with the number of learned queries per image, if image
            tokens are learned queries.
    """

    queries: str | None = None

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """Return one grid per image."""
        headed = bool(setting(processor, "is_vqa", default=False))
        grids = []
        for image, patches in zip(images, np.asarray(inputs["flattened_patches"]), strict=True):
            rows, cols = patches[:, :2].max(0).astype(int).tolist()  # counted from 1, 0 on padding
            cells = rectangle(rows, cols, whole(image))
            if headed:
                cells.boxes[:] = np.nan
            tower = [cells, nowhere(len(patches) - rows * cols)]
            tokens = tower
            if self.queries is not None:
                tokens = [nowhere(attrgetter(self.queries)(config))]
            grids.append(image_grid(image.size, tokens, tower))
        return grids
