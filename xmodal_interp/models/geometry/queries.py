"""Image tokens that are learned queries: each may look anywhere, so that none has a place.

Where a query looks is a question for its cross-attention to the patches, which do have places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np
from PIL import Image

from xmodal_interp.models.geometry.cells import Box, Cells, image_grid, joined, nowhere
from xmodal_interp.models.geometry.fixed import Show, squares
from xmodal_interp.models.geometry.grid import ImageGrid
from xmodal_interp.models.geometry.patches import patch_side
from xmodal_interp.models.geometry.replaying import setting, shown
from xmodal_interp.models.geometry.tiling import whole


@dataclass(frozen=True)
class QueryTokens:
    """So many tokens without a place; the vision tower's patches have theirs (Q-Former).

    Attributes:
        n_tokens: Attribute of the configuration that says how many queries an image has.
        class_token: Whether the vision tower has a class token before the patches.
        show: What the resized image shows.
        reason: Why the tokens have no place, where the family's record does not say so.
    """

    n_tokens: str
    class_token: bool = False
    show: Show = shown
    reason: str | None = None

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """One grid per image, without rows and columns of tokens."""
        n_tokens = attrgetter(self.n_tokens)(config)
        height, width = inputs["pixel_values"].shape[-2:]
        grids = []
        for image in images:
            box = self.show(processor, image, width, height)
            patches = squares(box, width, height, patch_side(config))
            tower = joined([nowhere(1), patches]) if self.class_token else patches
            grid = image_grid(image.size, [nowhere(n_tokens)], [tower])
            grids.append(replace(grid, reason=self.reason))
        return grids


def resampled_patches(
    processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """A perceiver reads each image, or its four quarters and all of it (Idefics2).

    The mask tells how many of the padded pixels are an image's. Patches on padding have no place.
    """
    n_tokens = config.perceiver_config.resampler_n_latents
    masks = np.asarray(inputs["pixel_attention_mask"]).astype(bool)
    height, width = masks.shape[-2:]
    side = patch_side(config)
    real = iter([mask for mask in masks.reshape(-1, height, width) if mask.any()])
    splits = setting(processor, "do_image_splitting", default=False)
    grids = []
    for image in images:
        boxes = _quarters(image) if splits else ()
        tower = [
            _padded(next(real), box, side, number)
            for number, box in enumerate((*boxes, whole(image)))
        ]
        grids.append(image_grid(image.size, [nowhere(n_tokens * len(tower))], tower))
    return grids


def _quarters(image: Image.Image) -> tuple[Box, ...]:
    middle_x, middle_y = float(image.width // 2), float(image.height // 2)
    xs, ys = (0.0, middle_x, float(image.width)), (0.0, middle_y, float(image.height))
    return tuple((xs[c], ys[r], xs[c + 1], ys[r + 1]) for r in range(2) for c in range(2))


def _padded(mask: np.ndarray, box: Box, side: int, number: int) -> Cells:
    """The patches of one picture, those on its padding without a place.

    Args:
        mask: Which pixels are the picture's, ``[height, width]``: those at the top left.
        box: What it shows.
        side: The side of a patch, px.
        number: Which of the pictures of an image: four quarters side by side, then all of it. Alone
            it is all of the image.
    """
    height, width = mask.shape
    rows, cols = height // side, width // side
    seen_h, seen_w = int(mask.any(1).sum()), int(mask.any(0).sum())
    seen = squares(box, seen_w, seen_h, side)
    seen_rows, seen_cols = seen_h // side, seen_w // side
    out = nowhere(rows * cols)
    index = (np.arange(seen_rows)[:, None] * cols + np.arange(seen_cols)).ravel()
    at = np.array([number // 2 * rows, number % 2 * cols]) if number < 4 else np.zeros(2, int)
    out.places[index] = seen.places + at
    out.boxes[index] = seen.boxes
    out.of_thumbnail[index] = number == 4
    return out
