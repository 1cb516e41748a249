"""Videos instead of images: random frames in the layouts of the models, and their prompts.

There is one function per layout, named in the records. The batch has two rows with a video each.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tests.conformance import pictures
from tests.conformance.overrides import Clip
from tests.conformance.prompts import TYPES, first_of, n_tokens_of, padded, words
from tests.helpers.tiny_configs import SIDE

Inputs = dict[str, Any]
VIDEO_TOKEN = ("video_token_id", "video_token_index")
BEFORE_VIDEO = ("video_start_token_id", "vision_start_token_id", "boi_token_id")
AFTER_VIDEO = ("video_end_token_id", "vision_end_token_id", "eoi_token_id")
GRIDS = torch.tensor([[2, 4, 4], [4, 4, 8]])  # frames, rows and columns of patches
N_VIDEOS = len(GRIDS)


def video_inputs(model: PreTrainedModel, clip: Clip) -> Inputs:
    """Return inputs of two rows with a video each; the shorter row is padded on the left.

    Args:
        model: The model.
        clip: The record of how its type reads videos.
    """
    given = globals()[clip.pixels](model.config)
    told = clip.tokens_per_video
    counts = n_tokens_of(model, "video", given, N_VIDEOS) if told is None else [told] * N_VIDEOS
    (token,) = first_of(model.config, VIDEO_TOKEN if clip.token is None else (clip.token,))
    before, after = first_of(model.config, BEFORE_VIDEO), first_of(model.config, AFTER_VIDEO)
    rows = []
    for row, count in enumerate(counts):
        n_runs = int(GRIDS[row, 0]) if clip.frames_apart else 1
        run = before + [token] * (count // n_runs) + after + words(1)
        rows.append(words(2) + run * n_runs + words(1 + 4 * row))
    inputs = padded(rows)
    takes = inspect.signature(model.forward).parameters
    types = 2 * (inputs["input_ids"] == token).long()
    return inputs | given | {name: types for name in TYPES if name in takes}


def packed(config: PreTrainedConfig) -> Inputs:
    """Return patches of all videos in one sequence, ``[patch, feature]``, with a grid for each."""
    width = pictures.packed(config, 1, SIDE)["pixel_values"].shape[-1]
    pixels = torch.randn(int(GRIDS.prod(-1).sum()), width)
    return {"pixel_values_videos": pixels, "video_grid_thw": GRIDS.clone()}


def packed_timed(config: PreTrainedConfig) -> Inputs:
    """Return packed patches, and the seconds between two frames."""
    return packed(config) | {"video_second_per_grid": torch.tensor([1.0, 0.5])}


def packed_pairs(config: PreTrainedConfig) -> Inputs:
    """Return packed patches of videos of two frames, not flattened."""
    grids = GRIDS.clone()
    grids[:, 0] = 2
    patch = pictures.first(pictures.vision_of(config).patch_size)
    pixels = torch.randn(int(grids.prod(-1).sum()), 3, patch, patch)
    return {"pixel_values_videos": pixels, "video_grid_thw": grids}


def packed_with_merges(config: PreTrainedConfig) -> Inputs:
    """Return packed patches, with the merge size of each video."""
    return packed(config) | {"video_merge_sizes": torch.full((N_VIDEOS,), 2)}


def packed_rows(config: PreTrainedConfig) -> Inputs:
    """Return patches of all frames in one row of pixels, with the sizes of the frames."""
    images = pictures.packed_rows(config, N_VIDEOS, SIDE)
    return {
        "pixel_values_videos": images["pixel_values"],
        "target_sizes_videos": images["target_sizes"],
    }


def frames(config: PreTrainedConfig) -> Inputs:
    """Return two frames per video: ``[video, frame, channel, side, side]``."""
    side = pictures.first(getattr(pictures.vision_of(config), "image_size", SIDE))
    return {"pixel_values_videos": torch.randn(N_VIDEOS, 2, 3, side, side)}


def timm_frames(config: PreTrainedConfig) -> Inputs:
    """Return two frames per video for a timm tower, whose side is in its arguments."""
    side = config.vision_config.model_args["img_size"]
    return {"pixel_values_videos": torch.randn(N_VIDEOS, 2, 3, side, side)}


def loose_frames(_config: PreTrainedConfig) -> Inputs:
    """Return the frames of all videos on one axis: ``[frame, channel, side, side]``."""
    return {"pixel_values_videos": torch.randn(2 * N_VIDEOS, 3, SIDE, SIDE)}


def placed_frames(config: PreTrainedConfig) -> Inputs:
    """Return two frames per video as patches, with their columns and rows."""
    images = pictures.placed(config, 2 * N_VIDEOS, SIDE)
    return {
        "pixel_values_videos": images["pixel_values"],
        "video_position_ids": images["image_position_ids"],
        "num_frames_per_video": torch.full((N_VIDEOS,), 2),
    }


def pooled_frames(config: PreTrainedConfig) -> Inputs:
    """Return one frame per video as flat patches, and the patches that each token pools."""
    images = pictures.pooled(config, N_VIDEOS, SIDE)
    rows = images["image_grids"][:, :2]
    return {
        "pixel_values_videos": images["pixel_values"],
        "video_token_pooling": images["image_token_pooling"],
        "video_grids": torch.cat([torch.ones(N_VIDEOS, 1, dtype=torch.long), rows], 1),
    }
