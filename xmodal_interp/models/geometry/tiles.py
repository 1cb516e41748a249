"""Rules for images cut into tiles, with or without a thumbnail of the whole image.

* :class:`SplitTiles`: tiles and a thumbnail of the same size.
* :class:`SizedTiles`: tiles of one size and a thumbnail of another; the processor returns the rows
  and columns of each (LFM2-VL, MiniCPM-V).
* :class:`SeparateTiles`: tiles and the whole image in two inputs of the vision tower (Step-3.7,
  DeepSeek-OCR 2).

The functions after a class reproduce the tiling of the processors that its rule is used for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import (
    Cells,
    block_of,
    image_grid,
    joined,
    nowhere,
    patch_side,
    rectangle,
    shifted,
    with_breaks,
)
from xmodal_interp.models.geometry.grid import Box, ImageGrid
from xmodal_interp.models.geometry.processor_steps import (
    ImageOrVideo,
    Layout,
    Tiling,
    even,
    fitted,
    own_function,
    part_for,
    setting,
    settings_for,
    whole,
)
from xmodal_interp.models.geometry.whole_images import Show

End = Literal["first", "last"]


@dataclass(frozen=True)
class SplitTiles:
    """Tiles of one size, row by row, and a thumbnail before or after them.

    If the image fills a single tile, there is no thumbnail and tokens have no tile. Each side of
    the image is rounded to whole tiles independently, so the tiles fill the image exactly, unless
    the layout pads.

    Attributes:
        layout: Function that returns the tiles of an image, or None if it is not tiled.
        merge: The side of the block of patches that gives a token: a number, or a configuration
            attribute that holds it, its inverse, or the number of tokens of a tile.
        thumbnail: Whether the thumbnail is first or last.
        class_token: Whether the vision tower has a class token first or last in each tile; None if
            it has none.
        class_token_if: Boolean configuration attribute that enables the class token; always enabled
            if None.
        thumbnail_of_one: Whether an image of a single tile also has a thumbnail.
        shift: How far up and left of its block of patches a token's receptive field is centred, in
            blocks.
        halved_with: Name of an input whose presence halves the side of the blocks.
    """

    layout: Layout
    merge: str | int
    thumbnail: End = "last"
    class_token: End | None = None
    class_token_if: str | None = None
    thumbnail_of_one: bool = False
    shift: float = 0.0
    halved_with: str | None = None

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """Return one grid per image."""
        height, width = inputs["pixel_values"].shape[-2:]
        side = patch_side(config, processor)
        rows, cols = height // side, width // side
        block = block_of(config, self.merge, rows, cols)
        if self.halved_with is not None and self.halved_with in inputs:
            block //= 2
        has_class = self.class_token_if is None or bool(getattr(config, self.class_token_if))
        end = self.class_token if has_class else None
        grids = []
        for image in images:
            tiling = self.layout(processor, image)
            tokens = [
                shifted(part, self.shift)
                for part in self._arranged(tiling, rows // block, cols // block, image)
            ]
            patches = self._arranged(tiling, rows, cols, image)
            tower = [_with_class(part, end) for part in patches]
            grids.append(image_grid(image.size, tokens, tower))
        return grids

    def _arranged(
        self, tiling: Tiling | None, rows: int, cols: int, image: Image.Image
    ) -> list[Cells]:
        """Return the cells of each tile and of the thumbnail, in sequence order."""
        if tiling is None or (len(tiling.boxes) == 1 and not self.thumbnail_of_one):
            return [rectangle(rows, cols, whole(image) if tiling is None else tiling.boxes[0])]
        parts = on_tiles(tiling, rows, cols)
        small = [rectangle(rows, cols, whole(image), thumbnail=True)]
        return [*small, *parts] if self.thumbnail == "first" else [*parts, *small]


def on_tiles(tiling: Tiling, rows: int, cols: int) -> list[Cells]:
    """Return the cells of each tile, with rows and columns of the whole image."""
    return [
        rectangle(
            rows,
            cols,
            box,
            at=(number // tiling.cols * rows, number % tiling.cols * cols),
            tile=number,
        )
        for number, box in enumerate(tiling.boxes)
    ]


def _with_class(cells: Cells, end: End | None) -> Cells:
    if end is None:
        return cells
    return joined([nowhere(1), cells] if end == "first" else [cells, nowhere(1)])


Shape = tuple[int, int]
"""Rows and columns."""


@dataclass(frozen=True)
class SizedTiles:
    """Tiles of one size, row by row, and a thumbnail of another size before or after them.

    Each side of the image is rounded to whole blocks of patches independently, for the tiles and
    for the thumbnail, so both fill the image exactly. The vision tower reads the patches of each
    view row by row.

    Attributes:
        layout: Function that returns the tiles of an image, or None if it is not tiled.
        sizes: Name of the input with the rows and columns of patches of each view, in order.
        block: Function of processor and configuration that returns the side of the block of patches
            that gives one token.
        thumbnail: Whether the thumbnail is first or last.
        padded: Whether the patches of each view are padded to a common length for the tower.
    """

    layout: Layout
    sizes: str
    block: Callable[[Any, Any], int]
    thumbnail: End
    padded: bool = False

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """Return one grid per image.

        Raises:
            GeometryError: The number of sizes is not that of the tiles and thumbnails, or the tiles
                of an image differ in size.
        """
        tilings = [self.layout(processor, image) for image in images]
        counts = [self._count(processor, tiling) for tiling in tilings]
        shapes = [(rows, cols) for rows, cols in np.asarray(inputs[self.sizes]).tolist()]
        if sum(counts) != len(shapes):
            raise GeometryError(
                f"The processor returned {len(shapes)} {self.sizes}, but its settings lead to "
                f"{sum(counts)} tiles and thumbnails. Use the checkpoint's own processor settings."
            )
        block = self.block(processor, config)
        length = inputs["pixel_values"].shape[1] if self.padded else None
        grids, start = [], 0
        for image, tiling, count in zip(images, tilings, counts, strict=True):
            own = shapes[start : start + count]
            start += count
            tower = self._views(tiling, own, image)
            merged = [(rows // block, cols // block) for rows, cols in own]
            tokens = self._views(tiling, merged, image)
            if length is not None:
                tower = [part for view in tower for part in (view, nowhere(length - len(view)))]
            grids.append(image_grid(image.size, tokens, tower))
        return grids

    def _views(
        self, tiling: Tiling | None, shapes: Sequence[Shape], image: Image.Image
    ) -> list[Cells]:
        return sized_views(tiling, shapes, whole(image), self.thumbnail, input_name=self.sizes)

    def _count(self, processor: Any, tiling: Tiling | None) -> int:
        """Return the number of tiles of an image, thumbnail included."""
        if tiling is None or len(tiling.boxes) == 1:
            return 1
        return len(tiling.boxes) + bool(setting(processor, "use_thumbnail", default=True))


def sized_views(
    tiling: Tiling | None, shapes: Sequence[Shape], box: Box, thumbnail: End, *, input_name: str
) -> list[Cells]:
    """Return the cells of each tile of a picture and of its thumbnail, in sequence order.

    Args:
        tiling: The tiles of the picture; None if it is not tiled.
        shapes: Rows and columns of each tile and of the thumbnail, in sequence order.
        box: The box of the whole picture, px.
        thumbnail: Whether the thumbnail is first or last.
        input_name: Name of the input with the shapes, for messages.

    Raises:
        GeometryError: The tiles differ in rows or columns.
    """
    if tiling is None or len(shapes) == 1:
        return [rectangle(*shapes[0], box)]
    n_tiles = len(tiling.boxes)
    first = len(shapes) - n_tiles if thumbnail == "first" else 0
    of_tiles = set(shapes[first : first + n_tiles])
    if len(of_tiles) > 1:
        known = ", ".join(f"{rows} x {cols}" for rows, cols in sorted(of_tiles))
        raise GeometryError(
            f"The tiles of an image differ in rows and columns ({input_name}: {known}). Set the "
            "image processor to resize all tiles to one size."
        )
    parts = on_tiles(tiling, *of_tiles.pop())
    small = [
        rectangle(*shape, box, thumbnail=True)
        for shape in (*shapes[:first], *shapes[first + n_tiles :])
    ]
    return [*small, *parts] if thumbnail == "first" else [*parts, *small]


def large_on_canvas(processor: Any, image: Image.Image) -> Tiling | None:
    """Return tiles of an image with too many tokens, on the closest canvas (LFM2-VL)."""
    settings = processor.image_processor
    fewest, most = setting(processor, "min_tiles"), setting(processor, "max_tiles")
    if not setting(processor, "do_image_splitting", default=False) or fewest == most == 1:
        return None
    names = ("max_image_tokens", "encoder_patch_size", "downsample_factor", "max_pixels_tolerance")
    limits = {name: setting(processor, name) for name in names}
    if not settings._is_image_too_large(height=image.height, width=image.width, **limits):
        return None
    cols, rows, *_ = settings._get_grid_layout(
        image.height, image.width, fewest, most, setting(processor, "tile_size")
    )
    return even(rows, cols, whole(image))


def slices(processor: Any, picture: ImageOrVideo) -> Tiling | None:
    """Return slices of an image, or of the frames of a video, too large for one slice (MiniCPM-V).

    The image processor cuts images, the video processor frames, each by its own settings.
    """
    part = part_for(picture)
    if not setting(processor, "slice_mode", default=False, part=part):
        return None
    width, height = picture.size
    limits = (
        setting(processor, name, part=part) for name in ("max_slice_nums", "scale_resolution")
    )
    grid = settings_for(processor, picture).get_sliced_grid((height, width), *limits)
    if grid is None:
        return None
    rows, cols = grid
    return even(rows, cols, whole(picture))


def slice_block(processor: Any, _config: Any, part: str = "image") -> int:
    """Return the side of the block of patches that gives a token of a slice (MiniCPM-V)."""
    return 2 if setting(processor, "downsample_mode", part=part) == "4x" else 4


_MERGE, _SHIFT = 4, 1.5 / 4  # two convolutions with kernel 3 and stride 2


@dataclass(frozen=True)
class SeparateTiles:
    """Tokens of the tiles, then of the whole image; two convolutions merge patches into cells.

    The vision tower reads the whole image first (``pixel_values``), then the tiles
    (``pixel_values_local``). The receptive field of a cell is centred slightly up and left of its
    block of patches, within its tile.

    Attributes:
        layout: Function that returns the tiles of an image, or None if it is not tiled.
        show: Function that returns the part of the image that the whole view shows.
        encoded: Whether an encoder after the convolutions reads the cells. Its positions then are
            the positions of the tower.
        class_token: Whether that encoder has a class token before the cells.
        queries: Whether that encoder has one learned query per cell, after the cells. The queries
            then are the tokens, and are outside the grid.
        by_rows: Whether tokens are ordered row by row over all tiles side by side. Each row, also
            of the whole image, then ends with a newline token.
        after: Number of tokens outside the grid after all others.
    """

    layout: Layout
    show: Show
    encoded: bool = False
    class_token: bool = False
    queries: bool = False
    by_rows: bool = False
    after: int = 0

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """Return one grid per image.

        Raises:
            GeometryError: The processor returned another number of tiles than its settings give.
        """
        tilings = [self.layout(processor, image) for image in images]
        _check_tiles(tilings, inputs)
        side = patch_side(config, processor)
        large = inputs["pixel_values"]
        height, width = large.shape[-2:]
        shapes = [
            (pixels.shape[-2] // side, pixels.shape[-1] // side)
            for pixels in (large, inputs.get("pixel_values_local", large))
        ]
        merged = [(rows // _MERGE, cols // _MERGE) for rows, cols in shapes]
        grids = []
        for image, tiling in zip(images, tilings, strict=True):
            box = self.show(processor, image, width, height)
            cells = [_receptive_fields(view) for view in _views(tiling, box, *merged)]
            tower = _views(tiling, box, *shapes)
            if self.encoded:
                tower = [self._encoded(view) for view in cells]
            grids.append(image_grid(image.size, self._tokens(cells), tower))
        return grids

    def _encoded(self, cells: Cells) -> Cells:
        """Return the positions of the encoder."""
        n_queries = len(cells) if self.queries else 0
        return joined([nowhere(int(self.class_token)), cells, nowhere(n_queries)])

    def _tokens(self, cells: Sequence[Cells]) -> list[Cells]:
        """Return the tokens in sequence order, from the cells of the whole image and each tile."""
        views = [*cells[1:], cells[0]]
        if self.queries:
            views = [nowhere(len(view)) for view in views]
        elif self.by_rows:
            tiles = [_by_rows(joined(cells[1:]))] if len(cells) > 1 else []
            views = [*tiles, _by_rows(cells[0])]
        return [*views, nowhere(self.after)]


def _check_tiles(tilings: Sequence[Tiling | None], inputs: Mapping[str, Any]) -> None:
    wanted = [0 if tiling is None else len(tiling.boxes) for tiling in tilings]
    returned = np.asarray(inputs["num_local_patches"]).reshape(-1).tolist()
    if wanted != returned:
        raise GeometryError(
            f"The processor returned {returned} tiles for the images, but its settings lead to "
            f"{wanted}. Use the checkpoint's own processor settings."
        )


def _views(
    tiling: Tiling | None, box: Box, of_whole: tuple[int, int], of_tile: tuple[int, int]
) -> list[Cells]:
    """Return the cells of the whole image, then those of each tile."""
    tiles = [] if tiling is None else on_tiles(tiling, *of_tile)
    return [rectangle(*of_whole, box, thumbnail=tiling is not None), *tiles]


def _receptive_fields(cells: Cells) -> Cells:
    """Shift the boxes of a tile's cells to their receptive fields, within the tile."""
    boxes = shifted(cells, _SHIFT).boxes
    low, high = cells.boxes[:, :2].min(0), cells.boxes[:, 2:].max(0)
    return replace(cells, boxes=np.clip(boxes, np.tile(low, 2), np.tile(high, 2)))


def _by_rows(cells: Cells) -> Cells:
    """Order cells row by row, with a newline token after each row."""
    row, col = cells.places.T
    return with_breaks(cells[np.lexsort((col, row))], int(row.max()) + 1)


def windows(processor: Any, image: Image.Image) -> Tiling | None:
    """Return square tiles of an image whose sides are rounded to whole tiles (Step-3.7)."""
    plan = processor.image_processor._plan_patches(
        *image.size, setting(processor, "size")["height"], setting(processor, "patch_size")
    )
    window, cols, rows = plan[2:5]
    return even(rows, cols, squared(processor, image, 0, 0)) if window else None


def squared(processor: Any, image: Image.Image, _width: int, _height: int) -> Box:
    """Return the box of an image that is padded to a square if it is very narrow (Step-3.7)."""
    if not processor.image_processor._is_extreme_aspect(*image.size):
        return whole(image)
    side = float(max(image.size))
    return 0.0, 0.0, side, side


def large_pages(processor: Any, image: Image.Image) -> Tiling | None:
    """Return tiles of an image larger than one tile, on the closest canvas (DeepSeek-OCR 2)."""
    tile = setting(processor, "tile_size")
    if not setting(processor, "crop_to_patches", default=False) or max(image.size) <= tile:
        return None
    cols, rows = own_function(processor, "get_optimal_tiled_canvas")(
        (image.height, image.width),
        (tile, tile),
        setting(processor, "min_patches"),
        setting(processor, "max_patches"),
    )
    return even(rows, cols, whole(image))


def fitted_or_squeezed(processor: Any, image: Image.Image, width: int, height: int) -> Box:
    """Return the box of an image padded to a square, or stretched if small and not tiled."""
    cut = setting(processor, "crop_to_patches", default=False)
    if not cut and max(width, height) <= setting(processor, "maximum_pad_value"):
        return whole(image)
    return fitted(processor, image, width, height)
