"""Where image tokens stand.

Rules from processor outputs to rows, columns and boxes in the original image.

A rule replays what the image processor did (resize, crop, tiling, merging) from the processor's own
settings and outputs, and returns one :class:`ImageGrid` per image. Several families share a rule;
nothing is ever guessed from a token count.
"""

from xmodal_interp.models.geometry.anyres import anyres_tiles as anyres_tiles
from xmodal_interp.models.geometry.choosing import Chosen as Chosen
from xmodal_interp.models.geometry.cross import aspect_ratio_tiles as aspect_ratio_tiles
from xmodal_interp.models.geometry.fixed import FixedGrid as FixedGrid
from xmodal_interp.models.geometry.fixed import fixed_grid as fixed_grid
from xmodal_interp.models.geometry.flattened import FlattenedPatches as FlattenedPatches
from xmodal_interp.models.geometry.framed import framed as framed
from xmodal_interp.models.geometry.grid import NOWHERE as NOWHERE
from xmodal_interp.models.geometry.grid import ImageGrid as ImageGrid
from xmodal_interp.models.geometry.grid import Rule as Rule
from xmodal_interp.models.geometry.grid import View as View
from xmodal_interp.models.geometry.grid import place_on_grid as place_on_grid
from xmodal_interp.models.geometry.grid import raster as raster
from xmodal_interp.models.geometry.grid import unplaced as unplaced
from xmodal_interp.models.geometry.merged import MergedPatches as MergedPatches
from xmodal_interp.models.geometry.merged import merged_patches as merged_patches
from xmodal_interp.models.geometry.merged import within_patches as within_patches
from xmodal_interp.models.geometry.merged import within_tokens as within_tokens
from xmodal_interp.models.geometry.queries import QueryTokens as QueryTokens
from xmodal_interp.models.geometry.queries import resampled_patches as resampled_patches
from xmodal_interp.models.geometry.replaying import fitted as fitted
from xmodal_interp.models.geometry.sized import PositionedPatches as PositionedPatches
from xmodal_interp.models.geometry.sized import sized_patches as sized_patches
from xmodal_interp.models.geometry.tiles import SplitTiles as SplitTiles
from xmodal_interp.models.geometry.tiling import best_canvas as best_canvas
from xmodal_interp.models.geometry.tiling import covering_canvas as covering_canvas
from xmodal_interp.models.geometry.tiling import crops as crops
from xmodal_interp.models.geometry.tiling import largest_canvas as largest_canvas
from xmodal_interp.models.geometry.tiling import longest_edge as longest_edge
from xmodal_interp.models.geometry.tiling import padded_canvas as padded_canvas
from xmodal_interp.models.geometry.video import MergedFrames as MergedFrames
from xmodal_interp.models.geometry.video import SingleFrames as SingleFrames
from xmodal_interp.models.geometry.video import VideoGrid as VideoGrid
from xmodal_interp.models.geometry.video import VideoRule as VideoRule
