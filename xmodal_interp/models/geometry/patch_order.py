"""The order in which a vision tower reads the patches and tiles of images, and its windows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index


def window_orders(
    modules: Mapping[str, nn.Module], inputs: Mapping[str, Any]
) -> dict[str, list[Tensor]]:
    """Return the patch order of modules that reorder the patches returned by the processor.

    Such a module is found by its code: a vision tower that sorts patches by windows calls
    transformers' ``get_vision_window_index`` in its forward (Qwen2.5-VL, Muse), and a module that
    merges windows has a method ``get_window_index`` (MiniCPM-V).

    Args:
        modules: The modules of the model by path.
        inputs: The inputs of the model.

    Returns:
        For each module path, one tensor ``[patch]`` per picture: the patch at each position. The
        pictures are the images, then the videos, each whole or view by view.
    """
    orders: dict[str, list[Tensor]] = {}
    kinds = {type(module) for module in modules.values()}
    sorting = {kind for kind in kinds if _sorts_by_windows(kind)}
    merging = {kind for kind in kinds if hasattr(kind, "get_window_index")}
    for path, module in modules.items() if sorting or merging else ():
        if type(module) in sorting:
            orders[path] = _tower_orders(module, inputs)
        elif type(module) in merging and hasattr(module, "window_kernel_size"):
            sizes = _each_of(inputs, "target_sizes", "target_sizes_videos")
            found: Any = module
            orders[path] = [found.get_window_index(size[None])[0] for size in sizes]
    return {path: of_pictures for path, of_pictures in orders.items() if of_pictures}


def _sorts_by_windows(kind: type[nn.Module]) -> bool:
    """Return whether the forward of a class calls ``get_vision_window_index``."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and get_vision_window_index.__name__ in code.co_names


def _tower_orders(tower: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return the patch order of each picture, in a tower that sorts patches by windows."""
    orders, merge = [], tower.spatial_merge_size
    for grid in _each_of(inputs, "image_grid_thw", "video_grid_thw"):
        blocks, _ = get_vision_window_index(grid[None], merge, tower.window_size, tower.patch_size)
        orders.append((blocks[:, None] * merge**2 + torch.arange(merge**2)).flatten())
    return orders


def _each_of(inputs: Mapping[str, Any], *names: str) -> list[Tensor]:
    """Return the rows of all of these inputs that are given, concatenated."""
    given = (inputs.get(name) for name in names)
    return [row for of_kind in given if of_kind is not None for row in of_kind.cpu()]


def square_windows(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return the side of the windows, in patches, of each block with window attention, by path.

    Such a block is found by its method ``window_partition`` (as in SAM). Windows are ordered row by
    row, and the last window of a row or column is padded.
    """
    return {
        path: int(side)
        for path, block in modules.items()
        if hasattr(type(block), "window_partition") and (side := getattr(block, "window_size", 0))
    }


def tile_counts(inputs: Mapping[str, Any]) -> list[int] | None:
    """Return the number of tiles of each image that the vision tower reads in a second call.

    The first call reads all images whole (Step-3.7, DeepSeek-OCR 2). The result is None if the
    inputs have no ``num_local_patches``: the tower then has a single call.
    """
    counts = inputs.get("num_local_patches")
    return None if counts is None else [int(count) for count in counts]
