"""Inputs of some types besides pixels and a prompt: one function each, named in the records."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.conformance.prompts import padded, words
from tests.conformance.sounds import sounds as sounds
from tests.conformance.sounds import sounds_by_frequency as sounds_by_frequency
from tests.conformance.sounds import sounds_in_samples as sounds_in_samples

Inputs = dict[str, Any]


def decoder_words(_model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Return decoder ids: a start token and five words."""
    n_rows = len(next(v for v in inputs.values() if isinstance(v, Tensor)))
    return {"decoder_input_ids": torch.tensor([[1, *words(5)] for _ in range(n_rows)])}


def qformer_words(_model: PreTrainedModel, _inputs: Inputs) -> Inputs:
    """Return the instruction for a Q-Former that also reads it."""
    rows = padded([words(3), words(5)])
    return {
        "qformer_input_ids": rows["input_ids"],
        "qformer_attention_mask": rows["attention_mask"],
    }


def image_attention(_model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Return a mask with which every word may attend to the image of its row."""
    return {"image_attention_mask": torch.ones(*inputs["input_ids"].shape, 1, dtype=torch.long)}


def latent_positions(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Insert the latents of the image between two copies of the words, and mark them."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    n_latents = model.config.latent_query_num
    latents = torch.full((len(ids), n_latents), 5)
    is_latent = torch.cat(
        [torch.zeros_like(ids), torch.ones_like(latents), torch.zeros_like(ids)], 1
    )
    return {
        "input_ids": torch.cat([ids, latents, ids], 1),
        "attention_mask": torch.cat([mask, torch.ones_like(latents), torch.ones_like(ids)], 1),
        "image_embeds_position_mask": is_latent,
    }


def aspect_ratios(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Return two tiles for the first image and one for the second; the rest is padding."""
    vision = model.config.vision_config
    n_tiles = torch.tensor([2, 1])
    real = torch.arange(vision.max_num_tiles) < n_tiles[:, None]
    pixels = inputs["pixel_values"][:, None, None]
    pixels = (
        torch.randn(2, 1, vision.max_num_tiles, *pixels.shape[3:])
        * real[:, None, :, None, None, None]
    )
    ratios = [[1, n] for n in n_tiles.tolist()]
    ids = [[vision.supported_aspect_ratios.index(ratio) + 1] for ratio in ratios]
    seen = real[:, None, None].expand(-1, inputs["input_ids"].shape[1], 1, -1)
    return {
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.tensor(ids),
        "aspect_ratio_mask": real[:, None].long(),
        "cross_attention_mask": seen.long() * inputs["attention_mask"][:, :, None, None],
    }


def boxes(_model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Return a box for each word, relative to the page."""
    corners = torch.rand(*inputs["input_ids"].shape, 4).sort(-1).values
    return {"bbox": corners[..., [0, 1, 2, 3]]}


def protein(_model: PreTrainedModel, _inputs: Inputs) -> Inputs:
    """Return residues of a protein instead of an image."""
    rows = padded([words(7), words(9)])
    return {
        "protein_input_ids": rows["input_ids"].flip(1),
        "protein_attention_mask": rows["attention_mask"].flip(1),
    }


def robot(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Return the state of a robot and the noise from which actions are generated."""
    config, n_rows = model.config, len(inputs["input_ids"])
    return {
        "state": torch.randn(n_rows, config.max_state_dim),
        "noise": torch.randn(n_rows, config.chunk_size, config.max_action_dim),
        "timestep": torch.rand(n_rows),
        "pixel_values": inputs["pixel_values"][:, None],
        "pixel_attention_mask": torch.ones(n_rows, 1, dtype=torch.bool),
    }


def regions(_model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Return features of five detected regions of the image."""
    return {"visual_embeds": torch.randn(len(inputs["input_ids"]), 5, 12)}


def regions_and_places(_model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Return features of five detected regions, with a box for each."""
    n_rows = len(inputs["input_ids"])
    return {"visual_feats": torch.randn(n_rows, 5, 12), "visual_pos": torch.rand(n_rows, 5, 4)}


def matching_head(_model: PreTrainedModel, _inputs: Inputs) -> Inputs:
    """Choose the head that matches image and text by cross-attention, not by their vectors."""
    return {"use_image_text_matching_head": True}


def image_types(_model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Return token types that mark image tokens."""
    return {"mm_token_type_ids": (inputs["input_ids"] == 8).long()}


def phrases(_model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Put marks around the words; words between marks attend to each other."""
    ids = inputs["input_ids"].clone()
    ids[:, 0], ids[:, 4] = 101, 102
    return {"input_ids": ids}
