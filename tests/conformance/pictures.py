"""Random pixels in the layouts of the models: one function per layout, named in the records.

Each function takes a config, a number of images and the side of an image in pixels, and returns
arguments of the forward. All images differ.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from tests.helpers.tiny_configs import SIDE

Pixels = dict[str, Any]
VISION = ("vision_config", "image_config", "encoder", "vlm_config")
GRIDS = [[1, 4, 4], [1, 4, 8], [1, 8, 4]]  # frames, rows and columns of patches


def square(config: PreTrainedConfig, n_images: int, side: int) -> Pixels:
    """Return images of one size: ``[image, channel, side, side]``."""
    return {"pixel_values": torch.randn(n_images, _channels(config), side, side)}


def nested(config: PreTrainedConfig, n_images: int, side: int) -> Pixels:
    """Return one image per row, with an image axis: ``[row, 1, channel, side, side]``."""
    return {"pixel_values": square(config, n_images, side)["pixel_values"][:, None]}


def packed(config: PreTrainedConfig, n_images: int, _side: int) -> Pixels:
    """Return patches of all images in one sequence, ``[patch, feature]``, with a grid per image."""
    vision = vision_of(config)
    grids = torch.tensor(GRIDS[:n_images])
    frames = first(getattr(vision, "temporal_patch_size", getattr(vision, "patch_temporal", 1)))
    width = _channels(config) * frames * first(vision.patch_size) ** 2
    pixels = torch.randn(int(grids.prod(-1).sum()), width)
    return {"pixel_values": pixels, "image_grid_thw": grids}


def sized(config: PreTrainedConfig, n_images: int, side: int) -> Pixels:
    """Return images of different sizes, padded to the largest, with their sizes."""
    sizes = torch.tensor([[side, side // 2], [side // 2, side], [side, side]])[:n_images]
    return {
        "pixel_values": torch.randn(n_images, _channels(config), side, side),
        "image_sizes": sizes,
    }


def tiled(config: PreTrainedConfig, n_images: int, side: int) -> Pixels:
    """Return a thumbnail and two tiles per image, ``[image, tile, channel, side, side]``."""
    sizes = torch.tensor([[side, 2 * side], [2 * side, side], [side, 2 * side - 3]])[:n_images]
    return {
        "pixel_values": torch.randn(n_images, 3, _channels(config), side, side),
        "image_sizes": sizes,
    }


def two_resolutions(config: PreTrainedConfig, n_images: int, side: int) -> Pixels:
    """Return every image twice, the second time for the tower of high resolution."""
    high = torch.randn(n_images, 3, SIDE, SIDE)
    return square(config, n_images, side) | {"high_res_pixel_values": high}


def with_local_views(config: PreTrainedConfig, n_images: int, side: int) -> Pixels:
    """Return every image whole, and a local view of the first."""
    return square(config, n_images, side) | {
        "pixel_values_local": torch.randn(1, 3, side, side),
        "num_local_patches": [1] + [0] * (n_images - 1),
    }


def flattened(config: PreTrainedConfig, n_images: int, _side: int) -> Pixels:
    """Return patches that start with row and column; the last image ends with padding."""
    vision = vision_of(config)
    grid = torch.cartesian_prod(torch.arange(1, 4), torch.arange(1, 5)).float()
    patches = torch.randn(n_images, len(grid), vision.patch_embed_hidden_size)
    whole = torch.cat([grid.expand(n_images, -1, -1), patches], -1)
    whole[-1, -3:] = 0
    return {"flattened_patches": whole}


def placed(config: PreTrainedConfig, n_images: int, _side: int) -> Pixels:
    """Return patches, ``[image, patch, feature]``, and their columns and rows."""
    vision = vision_of(config)
    merge = getattr(vision, "pooling_kernel_size", 1)
    patch = getattr(vision, "model_patch_size", vision.patch_size)
    columns, rows = 2 * merge, 3 * merge
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
    pixels = torch.rand(n_images, rows * columns, 3 * patch**2)
    return {"pixel_values": pixels, "image_position_ids": places.expand(n_images, -1, -1)}


def padded_patches(config: PreTrainedConfig, n_images: int, _side: int) -> Pixels:
    """Return patches padded to one length, ``[image, patch, feature]``, with grids and masks."""
    shapes = torch.tensor([[4, 4], [2, 4], [4, 2]])[:n_images]
    lengths = shapes.prod(-1)
    n_patches = int(lengths.max())
    width = _channels(config) * first(vision_of(config).patch_size) ** 2
    return {
        "pixel_values": torch.randn(n_images, n_patches, width),
        "pixel_attention_mask": (torch.arange(n_patches) < lengths[:, None]).long(),
        "spatial_shapes": shapes,
    }


def packed_images(config: PreTrainedConfig, n_images: int, side: int) -> Pixels:
    """Return packed patches that are not flattened: ``[patch, channel, row, column]``."""
    images = packed(config, n_images, side)
    patch = first(vision_of(config).patch_size)
    return images | {"pixel_values": images["pixel_values"].unflatten(-1, (-1, patch, patch))}


def packed_rows(config: PreTrainedConfig, n_images: int, _side: int) -> Pixels:
    """Return patches of all images in one row of pixels: ``[1, channel, row, column]``."""
    patch = first(vision_of(config).patch_size)
    sizes = torch.tensor([[4, 4], [4, 8], [8, 4]])[:n_images]
    n_patches = int(sizes.prod(-1).sum())
    pixels = torch.randn(1, _channels(config), patch, patch * n_patches)
    return {"pixel_values": pixels, "target_sizes": sizes}


def packed_rows_to_merge(config: PreTrainedConfig, n_images: int, side: int) -> Pixels:
    """Return the same with sixteen patches per token, four of them merged inside the tower."""
    return packed_rows(config, n_images, side) | {"downsample_mode": "16x"}


def pooled(config: PreTrainedConfig, n_images: int, side: int) -> Pixels:
    """Return one crop per image as flat patches, and the patches of each token (-1: unused)."""
    patch = first(vision_of(config).patch_size)
    per_side = side // patch
    index = torch.arange(n_images * per_side**2).reshape(n_images, per_side, per_side)
    tokens = index.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 4).clone()
    tokens[0, -1] = -1
    half = per_side // 2
    return {
        "pixel_values": torch.randn(n_images, per_side**2, _channels(config) * patch**2),
        "image_token_pooling": tokens,
        "image_grids": torch.tensor([[half, half, 0, 0]] * n_images),
        "image_num_crops": torch.ones(n_images, dtype=torch.long),
    }


def packed_padded(config: PreTrainedConfig, n_images: int, side: int) -> Pixels:
    """Return packed patches split by image and padded: ``[image, patch, feature]``."""
    images = packed(config, n_images, side)
    parts = images["pixel_values"].split(images["image_grid_thw"].prod(-1).tolist())
    return images | {"pixel_values": torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)}


def packed_with_merges(config: PreTrainedConfig, n_images: int, side: int) -> Pixels:
    """Return packed patches, with the merge size of each image."""
    return packed(config, n_images, side) | {"image_merge_sizes": torch.full((n_images,), 2)}


def packed_flat(config: PreTrainedConfig, n_images: int, side: int) -> Pixels:
    """Return packed patches with grids of rows and columns only."""
    images = packed(config, n_images, side)
    return {
        "pixel_values": images["pixel_values"],
        "image_grid_hw": images["image_grid_thw"][:, 1:],
    }


def packed_merged(config: PreTrainedConfig, n_images: int, side: int) -> Pixels:
    """Return packed blocks of merged patches, channels last, with grids of blocks."""
    vision = vision_of(config)
    grids = packed(config, n_images, side)["image_grid_thw"]
    width = first(vision.patch_size) * vision.spatial_merge_size
    pixels = torch.randn(int(grids.prod(-1).sum()), width, width, 3)
    return {"pixel_values": pixels, "image_grid_thw": grids}


def unpacked(config: PreTrainedConfig, n_images: int, _side: int) -> Pixels:
    """Return six flat patches per image: ``[image, patch, feature]``."""
    width = _channels(config) * first(vision_of(config).patch_size) ** 2
    return {"pixel_values": torch.randn(n_images, 6, width)}


def patch_clips(config: PreTrainedConfig, n_images: int, _side: int) -> Pixels:
    """Return six patches per image, each a short clip with channels last."""
    vision = vision_of(config)
    patch = first(vision.patch_size)
    shape = 6 * n_images, vision.temporal_patch_size, patch, patch, _channels(config)
    return {"pixel_values": torch.randn(shape)}


def clips(config: PreTrainedConfig, n_images: int, side: int) -> Pixels:
    """Return clips of two frames: ``[clip, frame, channel, side, side]``."""
    return {"pixel_values": torch.randn(n_images, 2, _channels(config), side, side)}


def real_tiles(config: PreTrainedConfig, n_images: int, side: int) -> Pixels:
    """Return two tiles for the first image, and one tile and padding for the others."""
    real = torch.ones(n_images, 2, dtype=torch.bool)
    real[1:, 1] = False
    pixels = torch.randn(n_images, 2, _channels(config), side, side)
    return {"pixel_values": pixels, "pixel_attention_mask": real}


def with_gridded_views(config: PreTrainedConfig, n_images: int, side: int) -> Pixels:
    """Return every image whole, a local view of the first, and the grid of views."""
    return with_local_views(config, n_images, side) | {"patches_grid": [[1, 1]] * n_images}


def vision_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the vision tower at any depth, or the config itself."""
    for name in VISION:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            return vision_of(part)
    return config


def first(size: Any) -> int:
    """Return a size, or the first of sizes given per axis."""
    return int(size if isinstance(size, int) else size[0])


def _channels(config: PreTrainedConfig) -> int:
    vision = vision_of(config)
    return int(getattr(vision, "num_channels", getattr(vision, "in_channels", 3)))
