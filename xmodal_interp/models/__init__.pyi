from .generation import checked_length
from .geometry import ImageGrid, Thumbnail, VideoGrid, place_on_grid
from .geometry.patch_order import square_windows, tile_counts, window_orders
from .item_files import read_items
from .labels import Prompt
from .loading import load
from .media import ImageLike, Video, open_image, open_video
from .model_inputs import check_whole, prompt_ids
from .model_state import (
    CheckpointReport,
    described_training,
    evaluation_mode,
    input_device,
    modules_in_training,
)
from .records import FAMILIES, Family
from .resized import as_original, original_size, resized, size_before
from .vlm import VLM, check_vlm

__all__ = [
    "FAMILIES",
    "VLM",
    "CheckpointReport",
    "Family",
    "ImageGrid",
    "ImageLike",
    "Prompt",
    "Thumbnail",
    "Video",
    "VideoGrid",
    "as_original",
    "check_vlm",
    "check_whole",
    "checked_length",
    "described_training",
    "evaluation_mode",
    "input_device",
    "load",
    "modules_in_training",
    "open_image",
    "open_video",
    "original_size",
    "place_on_grid",
    "prompt_ids",
    "read_items",
    "resized",
    "size_before",
    "square_windows",
    "tile_counts",
    "window_orders",
]
