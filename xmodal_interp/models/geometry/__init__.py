"""Geometry rules: rows, columns and boxes of image tokens in the original image.

A rule reproduces the steps of the image processor (resize, crop, tiling, merging) from the
processor's settings and outputs, and returns one :class:`ImageGrid` per image. Families may share a
rule. No rule guesses a grid from the number of tokens.
"""

from xmodal_interp.models.geometry.anyres import anyres_tiles
from xmodal_interp.models.geometry.applying import applied, name_of
from xmodal_interp.models.geometry.choosing import Chosen
from xmodal_interp.models.geometry.convolved import code_grid, code_rows, fused_stages
from xmodal_interp.models.geometry.cross import aspect_ratio_tiles
from xmodal_interp.models.geometry.fixed import FixedGrid, fixed_grid
from xmodal_interp.models.geometry.flattened import FlattenedPatches
from xmodal_interp.models.geometry.framing import framed
from xmodal_interp.models.geometry.grid import (
    NOWHERE,
    ImageGrid,
    Rule,
    Thumbnail,
    place_on_grid,
    raster,
    unplaced,
)
from xmodal_interp.models.geometry.merged import (
    MergedPatches,
    merged_patches,
    within_patches,
    within_tokens,
)
from xmodal_interp.models.geometry.overlapping import overlapping_crops
from xmodal_interp.models.geometry.padded import PaddedSquares, scaled, shrunk
from xmodal_interp.models.geometry.queries import QueryTokens, query_crops, resampled_patches
from xmodal_interp.models.geometry.replaying import at_the_top, fitted, shown_in_frames
from xmodal_interp.models.geometry.separate import (
    SeparateTiles,
    fitted_or_squeezed,
    large_pages,
    squared,
    windows,
)
from xmodal_interp.models.geometry.sized import PositionedPatches, counted_patches, sized_patches
from xmodal_interp.models.geometry.sized_tiles import (
    SizedTiles,
    large_on_canvas,
    slice_block,
    slices,
)
from xmodal_interp.models.geometry.tiles import SplitTiles
from xmodal_interp.models.geometry.tiling import (
    best_canvas,
    covering_canvas,
    crops,
    largest_canvas,
    longest_edge,
    padded_canvas,
    page_canvas,
)
from xmodal_interp.models.geometry.video import MergedFrames, SingleFrames, VideoGrid, VideoRule
from xmodal_interp.models.geometry.video_crops import pooled_frames, sliced_frames
from xmodal_interp.models.geometry.video_frames import (
    PositionedFrames,
    squeezed,
    within_video_tokens,
)

__all__ = [
    "NOWHERE",
    "Chosen",
    "FixedGrid",
    "FlattenedPatches",
    "ImageGrid",
    "MergedFrames",
    "MergedPatches",
    "PaddedSquares",
    "PositionedFrames",
    "PositionedPatches",
    "QueryTokens",
    "Rule",
    "SeparateTiles",
    "SingleFrames",
    "SizedTiles",
    "SplitTiles",
    "Thumbnail",
    "VideoGrid",
    "VideoRule",
    "anyres_tiles",
    "applied",
    "aspect_ratio_tiles",
    "at_the_top",
    "best_canvas",
    "code_grid",
    "code_rows",
    "counted_patches",
    "covering_canvas",
    "crops",
    "fitted",
    "fitted_or_squeezed",
    "fixed_grid",
    "framed",
    "fused_stages",
    "large_on_canvas",
    "large_pages",
    "largest_canvas",
    "longest_edge",
    "merged_patches",
    "name_of",
    "overlapping_crops",
    "padded_canvas",
    "page_canvas",
    "place_on_grid",
    "pooled_frames",
    "query_crops",
    "raster",
    "resampled_patches",
    "scaled",
    "shown_in_frames",
    "shrunk",
    "sized_patches",
    "slice_block",
    "sliced_frames",
    "slices",
    "squared",
    "squeezed",
    "unplaced",
    "windows",
    "within_patches",
    "within_tokens",
    "within_video_tokens",
]
