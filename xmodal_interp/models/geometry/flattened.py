"""Patches that come flattened to vectors, each with its row and column in front."""

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
    """As many patches as fit, the image's aspect kept, and padding behind them (Pix2Struct).

    The sides are rounded down to whole patches, each for itself, so that the boxes fill the image
    exactly. Where the processor draws a question above the image, rows and columns are those of
    both, and no box is known.

    Attributes:
        queries: Attribute of the configuration that says how many learned queries read the patches
            of an image, if its tokens are such.
    """

    queries: str | None = None

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """One grid per image."""
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
