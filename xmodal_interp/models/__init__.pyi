from .checkpoint import CheckpointReport
from .decoding import checked_length
from .family import Family
from .geometry import ImageGrid, Thumbnail, VideoGrid, place_on_grid
from .labelling import Prompt
from .loading import SHIPPED, load
from .opening import ImageLike, Video, open_image, open_video
from .records import FAMILIES
from .sequences import check_whole, prompt_ids
from .tokens import generated_table
from .training_mode import (
    described_training,
    evaluation_mode,
    modules_in_training,
)
from .vlm import VLM, check_vlm
from .windows import square_windows, tiles_behind, window_orders
from .wrapping import input_device

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
