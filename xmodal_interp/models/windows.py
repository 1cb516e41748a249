"""In which order a vision tower reads the patches of an image, and the tiles of several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index


def window_orders(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor] | None:
    """For each image ``[patch]``, which patch stands at each position of the vision tower.

    Images come first, then videos, whose patches are those of all frames.

    None if the tower reads patches in the order that the processor returned them. A tower that does
    not has a method to permute its input (Qwen2.5-VL), found by its name.
    """
    if not any(hasattr(module, "permute_input_for_window_attn") for module in model.modules()):
        return None
    given = [inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")]
    grids = [grid for of_kind in given if of_kind is not None for grid in of_kind.cpu()]
    if not grids:
        return None
    vision: Any = getattr(model.config, "vision_config", None)
    merge, sizes = vision.spatial_merge_size, (vision.window_size, vision.patch_size)
    orders = []
    for grid in grids:
        blocks, _ = get_vision_window_index(grid[None], merge, *sizes)
        orders.append((blocks[:, None] * merge**2 + torch.arange(merge**2)).flatten())
    return orders


def square_windows(model: nn.Module) -> dict[str, int]:
    """Blocks of a vision tower that cut each picture into square windows: path, side in patches.

    Such a block has a method for it (as in SAM), found by its name; windows go row by row, and the
    last of a row or column are padded.
    """
    return {
        path: int(side)
        for path, block in model.named_modules()
        if hasattr(block, "window_partition") and (side := getattr(block, "window_size", 0))
    }


def tiles_behind(inputs: Mapping[str, Any]) -> list[int] | None:
    """How many tiles of each image the vision tower reads in a second call, behind all images.

    None if it reads each image as one. A tower that does not is given the number of its tiles
    (Step-3.7, DeepSeek-OCR 2).
    """
    counts = inputs.get("num_local_patches")
    return None if counts is None else [int(count) for count in counts]
