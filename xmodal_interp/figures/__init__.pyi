from .curves import layer_curves, positional_profiles, pruning_curve_plot, raster_profiles
from .head_grids import head_grid
from .image_maps import map_overlays, patch_overlays, rollout_overlay
from .image_overlays import (
    answer_overlays,
    before_after,
    head_overlays,
    layer_overlays,
    overlay,
    overlay_grid,
    overlays,
    token_head_grid,
)
from .mask_figures import mask_comparison, mask_structure
from .matrices import attention_matrix, side_by_side, token_patch_matrix
from .matrix_selection import MatrixSelection
from .overlay_panels import OverlayOptions
from .style import Picture
from .time_panels import time_panels
from .video_overlays import video_animation, video_overlays

__all__ = [
    "MatrixSelection",
    "OverlayOptions",
    "Picture",
    "answer_overlays",
    "attention_matrix",
    "before_after",
    "head_grid",
    "head_overlays",
    "layer_curves",
    "layer_overlays",
    "map_overlays",
    "mask_comparison",
    "mask_structure",
    "overlay",
    "overlay_grid",
    "overlays",
    "patch_overlays",
    "positional_profiles",
    "pruning_curve_plot",
    "raster_profiles",
    "rollout_overlay",
    "side_by_side",
    "time_panels",
    "token_head_grid",
    "token_patch_matrix",
    "video_animation",
    "video_overlays",
]
