from .changes import before_after
from .curves import layer_curves, positional_profiles, pruning_curve_plot, raster_profiles
from .head_grids import head_grid
from .image_overlays import (
    head_overlays,
    layer_overlays,
    overlay,
    overlays,
    token_head_grid,
)
from .looks import Look
from .maps import map_overlays, patch_overlays, rollout_overlay
from .matrices import attention_matrix, token_patch_matrix
from .matrix_sources import View
from .side_by_side import side_by_side
from .style import Picture
from .visibility import mask_comparison, mask_structure

__all__ = [
    "Look",
    "Picture",
    "View",
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
    "overlays",
    "patch_overlays",
    "positional_profiles",
    "pruning_curve_plot",
    "raster_profiles",
    "rollout_overlay",
    "side_by_side",
    "token_head_grid",
    "token_patch_matrix",
]
