from .anyres import anyres_tiles
from .applying import applied, name_of
from .choosing import Chosen
from .convolved import code_grid, code_rows, fused_stages
from .cross import aspect_ratio_tiles
from .fixed import FixedGrid, fixed_grid
from .flattened import FlattenedPatches
from .framing import framed
from .grid import (
    NOWHERE,
    ImageGrid,
    Rule,
    Thumbnail,
    place_on_grid,
    raster,
    unplaced,
)
from .merged import (
    MergedPatches,
    merged_patches,
    within_patches,
    within_tokens,
)
from .overlapping import overlapping_crops
from .padded import PaddedSquares, scaled, shrunk
from .queries import QueryTokens, query_crops, resampled_patches
from .replaying import at_the_top, fitted, shown_in_frames
from .separate import (
    SeparateTiles,
    fitted_or_squeezed,
    large_pages,
    squared,
    windows,
)
from .sized import PositionedPatches, counted_patches, sized_patches
from .sized_tiles import (
    SizedTiles,
    large_on_canvas,
    slice_block,
    slices,
)
from .tiles import SplitTiles
from .tiling import (
    best_canvas,
    covering_canvas,
    crops,
    largest_canvas,
    longest_edge,
    padded_canvas,
    page_canvas,
)
from .video import MergedFrames, SingleFrames, VideoGrid, VideoRule
from .video_crops import pooled_frames, sliced_frames
from .video_frames import (
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
