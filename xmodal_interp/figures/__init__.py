"""Figures of samples and of the tables that analyses return; the only part that uses matplotlib."""

from xmodal_interp.figures.changes import before_after as before_after
from xmodal_interp.figures.curves import layer_curves as layer_curves
from xmodal_interp.figures.curves import pruning_curve_plot as pruning_curve_plot
from xmodal_interp.figures.heads import head_grid as head_grid
from xmodal_interp.figures.looks import Look as Look
from xmodal_interp.figures.maps import map_overlays as map_overlays
from xmodal_interp.figures.maps import patch_overlays as patch_overlays
from xmodal_interp.figures.maps import rollout_overlay as rollout_overlay
from xmodal_interp.figures.matrices import attention_matrix as attention_matrix
from xmodal_interp.figures.matrices import token_patch_matrix as token_patch_matrix
from xmodal_interp.figures.on_image import head_overlays as head_overlays
from xmodal_interp.figures.on_image import layer_overlays as layer_overlays
from xmodal_interp.figures.on_image import overlay as overlay
from xmodal_interp.figures.on_image import overlays as overlays
from xmodal_interp.figures.on_image import token_head_grid as token_head_grid
from xmodal_interp.figures.profiles import positional_profiles as positional_profiles
from xmodal_interp.figures.profiles import raster_profiles as raster_profiles
from xmodal_interp.figures.sources import View as View
from xmodal_interp.figures.style import Picture as Picture
from xmodal_interp.figures.towers import side_by_side as side_by_side
from xmodal_interp.figures.visibility import mask_comparison as mask_comparison
from xmodal_interp.figures.visibility import mask_structure as mask_structure
