"""Figures of samples and of analysis tables; only this package imports matplotlib."""

from xmodal_interp.figures.changes import before_after
from xmodal_interp.figures.curves import layer_curves, pruning_curve_plot
from xmodal_interp.figures.heads import head_grid
from xmodal_interp.figures.looks import Look
from xmodal_interp.figures.maps import map_overlays, patch_overlays, rollout_overlay
from xmodal_interp.figures.matrices import attention_matrix, token_patch_matrix
from xmodal_interp.figures.on_image import (
    head_overlays,
    layer_overlays,
    overlay,
    overlays,
    token_head_grid,
)
from xmodal_interp.figures.profiles import positional_profiles, raster_profiles
from xmodal_interp.figures.sources import View
from xmodal_interp.figures.style import Picture
from xmodal_interp.figures.towers import side_by_side
from xmodal_interp.figures.visibility import mask_comparison, mask_structure

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
