"""Where image tokens stand.

Rules from processor outputs to rows, columns and boxes in the original image.

A rule replays what the image processor did (resize, crop, tiling, merging) from the processor's own
settings and outputs, and returns one :class:`ImageGrid` per image. Several families share a rule;
nothing is ever guessed from a token count.
"""

from xmodal_interp.models.geometry.anyres import anyres_tiles as anyres_tiles
from xmodal_interp.models.geometry.choosing import Chosen as Chosen
from xmodal_interp.models.geometry.convolved import code_grid as code_grid
from xmodal_interp.models.geometry.convolved import code_rows as code_rows
from xmodal_interp.models.geometry.convolved import fused_stages as fused_stages
from xmodal_interp.models.geometry.cross import aspect_ratio_tiles as aspect_ratio_tiles
from xmodal_interp.models.geometry.fixed import FixedGrid as FixedGrid
from xmodal_interp.models.geometry.fixed import fixed_grid as fixed_grid
from xmodal_interp.models.geometry.flattened import FlattenedPatches as FlattenedPatches
from xmodal_interp.models.geometry.framing import framed as framed
from xmodal_interp.models.geometry.grid import NOWHERE as NOWHERE
from xmodal_interp.models.geometry.grid import ImageGrid as ImageGrid
from xmodal_interp.models.geometry.grid import Rule as Rule
from xmodal_interp.models.geometry.grid import Thumbnail as Thumbnail
from xmodal_interp.models.geometry.grid import place_on_grid as place_on_grid
from xmodal_interp.models.geometry.grid import raster as raster
from xmodal_interp.models.geometry.grid import unplaced as unplaced
from xmodal_interp.models.geometry.merged import MergedPatches as MergedPatches
from xmodal_interp.models.geometry.merged import merged_patches as merged_patches
from xmodal_interp.models.geometry.merged import within_patches as within_patches
from xmodal_interp.models.geometry.merged import within_tokens as within_tokens
from xmodal_interp.models.geometry.overlapping import overlapping_crops as overlapping_crops
from xmodal_interp.models.geometry.padded import PaddedSquares as PaddedSquares
from xmodal_interp.models.geometry.padded import scaled as scaled
from xmodal_interp.models.geometry.padded import shrunk as shrunk
from xmodal_interp.models.geometry.queries import QueryTokens as QueryTokens
from xmodal_interp.models.geometry.queries import query_crops as query_crops
from xmodal_interp.models.geometry.queries import resampled_patches as resampled_patches
from xmodal_interp.models.geometry.replaying import at_the_top as at_the_top
from xmodal_interp.models.geometry.replaying import fitted as fitted
from xmodal_interp.models.geometry.replaying import shown_in_frames as shown_in_frames
from xmodal_interp.models.geometry.separate import SeparateTiles as SeparateTiles
from xmodal_interp.models.geometry.separate import fitted_or_squeezed as fitted_or_squeezed
from xmodal_interp.models.geometry.separate import large_pages as large_pages
from xmodal_interp.models.geometry.separate import squared as squared
from xmodal_interp.models.geometry.separate import windows as windows
from xmodal_interp.models.geometry.sized import PositionedPatches as PositionedPatches
from xmodal_interp.models.geometry.sized import counted_patches as counted_patches
from xmodal_interp.models.geometry.sized import sized_patches as sized_patches
from xmodal_interp.models.geometry.sized_tiles import SizedTiles as SizedTiles
from xmodal_interp.models.geometry.sized_tiles import large_on_canvas as large_on_canvas
from xmodal_interp.models.geometry.sized_tiles import slice_block as slice_block
from xmodal_interp.models.geometry.sized_tiles import slices as slices
from xmodal_interp.models.geometry.tiles import SplitTiles as SplitTiles
from xmodal_interp.models.geometry.tiling import best_canvas as best_canvas
from xmodal_interp.models.geometry.tiling import covering_canvas as covering_canvas
from xmodal_interp.models.geometry.tiling import crops as crops
from xmodal_interp.models.geometry.tiling import largest_canvas as largest_canvas
from xmodal_interp.models.geometry.tiling import longest_edge as longest_edge
from xmodal_interp.models.geometry.tiling import padded_canvas as padded_canvas
from xmodal_interp.models.geometry.tiling import page_canvas as page_canvas
from xmodal_interp.models.geometry.video import MergedFrames as MergedFrames
from xmodal_interp.models.geometry.video import SingleFrames as SingleFrames
from xmodal_interp.models.geometry.video import VideoGrid as VideoGrid
from xmodal_interp.models.geometry.video import VideoRule as VideoRule
from xmodal_interp.models.geometry.video_crops import pooled_frames as pooled_frames
from xmodal_interp.models.geometry.video_crops import sliced_frames as sliced_frames
from xmodal_interp.models.geometry.video_frames import PositionedFrames as PositionedFrames
from xmodal_interp.models.geometry.video_frames import squeezed as squeezed
from xmodal_interp.models.geometry.video_frames import within_video_tokens as within_video_tokens
