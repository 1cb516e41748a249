"""Models: loading them, and labelling each position of their input."""

from xmodal_interp.models.checkpoint import CheckpointReport
from xmodal_interp.models.decoding import checked_length
from xmodal_interp.models.family import Family
from xmodal_interp.models.geometry import ImageGrid, Thumbnail, VideoGrid, place_on_grid
from xmodal_interp.models.labelling import Prompt
from xmodal_interp.models.loading import SHIPPED, load
from xmodal_interp.models.opening import ImageLike, Video, open_image, open_video
from xmodal_interp.models.records import FAMILIES
from xmodal_interp.models.sequences import check_whole, prompt_ids
from xmodal_interp.models.tokens import generated_table
from xmodal_interp.models.training_mode import (
    described_training,
    evaluation_mode,
    modules_in_training,
)
from xmodal_interp.models.vlm import VLM, check_vlm
from xmodal_interp.models.windows import square_windows, tiles_behind, window_orders
from xmodal_interp.models.wrapping import input_device

__all__ = [
    "FAMILIES",
    "SHIPPED",
    "VLM",
    "CheckpointReport",
    "Family",
    "ImageGrid",
    "ImageLike",
    "Prompt",
    "Thumbnail",
    "Video",
    "VideoGrid",
    "check_vlm",
    "check_whole",
    "checked_length",
    "described_training",
    "evaluation_mode",
    "generated_table",
    "input_device",
    "load",
    "modules_in_training",
    "open_image",
    "open_video",
    "place_on_grid",
    "prompt_ids",
    "square_windows",
    "tiles_behind",
    "window_orders",
]
