from .changes import before_after
from .curves import layer_curves, pruning_curve_plot
from .heads import head_grid
from .looks import Look
from .maps import map_overlays, patch_overlays, rollout_overlay
from .matrices import attention_matrix, token_patch_matrix
from .on_image import (
    head_overlays,
    layer_overlays,
    overlay,
    overlays,
    token_head_grid,
)
from .profiles import positional_profiles, raster_profiles
from .sources import View
from .style import Picture
from .towers import side_by_side
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
