"""Rules for image tokens that are learned queries.

Each query attends to the whole image and has no row and column. The patches do have rows and
columns; the cross-attention of a query shows which of them it uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np
from PIL import Image

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import (
    Cells,
    at_top_left,
    image_grid,
    joined,
    nowhere,
    patch_side,
)
from xmodal_interp.models.geometry.grid import NOWHERE, Box, ImageGrid
from xmodal_interp.models.geometry.processor_steps import (
    Tiling,
    setting,
    shown,
    split_canvas,
    whole,
)
from xmodal_interp.models.geometry.whole_images import Show, squares


@dataclass(frozen=True)
class QueryTokens:
    """Learned queries without rows and columns, and vision-tower patches on a grid (Q-Former).

    Attributes:
        n_tokens: Configuration attribute with the number of queries per image.
        class_token: Whether the vision tower has a class token before the patches.
        show: Function that returns the part of the image that the resized pixels show.
        reason: Why the tokens have no rows and columns, if the family's record has no reason.
        n_frames: Number of images that each prompt must have, for processors that take the images
            as the frames of one video and always insert the tokens of this many frames.
    """

    n_tokens: str
    class_token: bool = False
    show: Show = shown
    reason: str | None = None
    n_frames: int | None = None

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """Return one grid per image, without rows and columns of tokens.

        Raises:
            GeometryError: A prompt does not have ``n_frames`` images.
        """
        n_tokens = attrgetter(self.n_tokens)(config)
        if self.n_frames is not None and inputs["pixel_values"].shape[1] != self.n_frames:
            raise GeometryError(
                f"The model type {config.model_type!r} takes the {self.n_frames} frames of a video "
                f"as images; got {inputs['pixel_values'].shape[1]}. Give each prompt "
                f"{self.n_frames} images, the frames in order."
            )
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
    """Place patches that a perceiver resamples, of each image or its quarters (Idefics2).

    With image splitting, the four quarters are followed by the whole image. The pixel mask gives
    the size of the image in the padded pixels. Patches on padding, entirely or in part, are masked
    in the tower and outside the grid.
    """
    n_tokens = config.perceiver_config.resampler_n_latents
    masks = np.asarray(inputs["pixel_attention_mask"]).astype(bool)
    height, width = masks.shape[-2:]
    side = patch_side(config)
    real = iter([mask for mask in masks.reshape(-1, height, width) if mask.any()])
    splits = setting(processor, "do_image_splitting", default=False)
    grids = []
    for image in images:
        tiling = _quarters(image) if splits else None
        tower = [
            _padded(next(real), box, side, at, tile) for box, at, tile in _crops(tiling, image)
        ]
        if splits:
            all_of_it = _padded(next(real), whole(image), side)
            tower.append(replace(all_of_it, of_thumbnail=all_of_it.places[:, 0] >= 0))
        tokens = [_queries(n_tokens, part) for part in tower]
        grids.append(image_grid(image.size, tokens, tower))
    return grids


def query_crops(
    processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Place learned queries whose number depends on the number of patches of a view (Aria).

    An image or tile is at the top left of its pixels. Patches entirely on padding are masked in the
    tower and outside the grid.

    Raises:
        GeometryError: The configuration has no number of queries for this number of patches.
    """
    masks = np.asarray(inputs["pixel_mask"]).astype(bool)
    side = patch_side(config)
    n_patches = (masks.shape[-2] // side) * (masks.shape[-1] // side)
    known = config.projector_patch_to_query_dict
    if n_patches not in known:
        raise GeometryError(
            f"projector_patch_to_query_dict of the configuration has no number of queries for "
            f"{n_patches} patches. Resize images to one of {', '.join(map(str, known))} patches."
        )
    each = iter(masks)
    grids = []
    for image in images:
        tower = [
            _padded(next(each), box, side, at, tile, in_part=True)
            for box, at, tile in _crops(split_canvas(processor, image), image)
        ]
        tokens = [_queries(known[n_patches], part) for part in tower]
        grids.append(image_grid(image.size, tokens, tower))
    return grids


def _queries(n_tokens: int, patches: Cells) -> Cells:
    """Return the queries of some patches: outside the grid, but with the tile of the patches."""
    return replace(nowhere(n_tokens), tiles=np.full(n_tokens, patches.tiles.max(initial=NOWHERE)))


def _crops(tiling: Tiling | None, image: Image.Image) -> Iterator[tuple[Box, tuple[int, int], int]]:
    """Yield the box of each crop, its row and column among the crops, and its number."""
    if tiling is None:
        yield whole(image), (0, 0), NOWHERE
        return
    for number, box in enumerate(tiling.boxes):
        yield box, divmod(number, tiling.cols), number


def _quarters(image: Image.Image) -> Tiling:
    middle_x, middle_y = float(image.width // 2), float(image.height // 2)
    xs, ys = (0.0, middle_x, float(image.width)), (0.0, middle_y, float(image.height))
    boxes = tuple((xs[c], ys[r], xs[c + 1], ys[r + 1]) for r in range(2) for c in range(2))
    return Tiling(2, 2, boxes)


def _padded(
    mask: np.ndarray,
    box: Box,
    side: int,
    at: tuple[int, int] = (0, 0),
    tile: int = NOWHERE,
    *,
    in_part: bool = False,
) -> Cells:
    """Return the patches of one picture; those on its padding are outside the grid.

    Args:
        mask: True for pixels of the picture, ``[height, width]``; they are at the top left.
        box: The box that these pixels show.
        side: The side of a patch, px.
        at: Row and column of the picture among the tiles.
        tile: Number of the picture among the tiles.
        in_part: Whether patches that are partly on padding are on the grid.
    """
    height, width = mask.shape
    rows, cols = height // side, width // side
    seen_h, seen_w = int(mask.any(1).sum()), int(mask.any(0).sum())
    x0, y0, x1, y1 = box
    right, bottom = x0 + (x1 - x0) * width / seen_w, y0 + (y1 - y0) * height / seen_h
    everything = squares((x0, y0, right, bottom), width, height, side)
    part = (side - 1) * in_part
    seen_rows, seen_cols = (seen_h + part) // side, (seen_w + part) // side
    row, col = everything.places.T
    seen = everything[(row < seen_rows) & (col < seen_cols)]
    seen = replace(
        seen,
        places=seen.places + np.array(at) * (rows, cols),
        tiles=np.full(len(seen), tile),
    )
    return at_top_left(seen, min(seen_cols, cols), rows, cols)
