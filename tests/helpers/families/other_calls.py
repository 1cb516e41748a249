"""Calls with attention that neither the forward nor ``generate`` of a type runs.

Each function takes the model and the inputs of its forward, and returns the output of the call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

Inputs = dict[str, Any]


def images_to_codes(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Encode images as codes with the quantiser of Janus."""
    codes: Tensor = model.model.vqmodel.encode(inputs["pixel_values"]).last_hidden_state
    return codes


def codes_to_images(model: PreTrainedModel, _inputs: Inputs) -> Tensor:
    """Decode images from codes (Janus)."""
    side = model.model.vqmodel.quantize.quant_state_dims[0]
    drawn = torch.randint(model.config.vq_config.num_embeddings, (2, side**2))
    images: Tensor = model.decode_image_tokens(drawn)
    return images


def words_to_images(model: PreTrainedModel, _inputs: Inputs) -> Tensor:
    """Decode images from the tokens of codes (Emu3): rows of four, each ended by a break."""
    code = torch.tensor(list(model.model.vocabulary_mapping.img2bpe.values()))
    lines = code[torch.randint(len(code), (2, 4, 4))]
    ended = torch.cat([lines, torch.zeros(2, 4, 1, dtype=torch.long)], -1).flatten(1)
    words = torch.cat([ended, torch.zeros(2, 3, dtype=torch.long)], -1)
    images: Tensor = model.model.decode_image_tokens(words, 4, 4)
    return images


def merged_in_tower(model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
    """Encode images with sixteen patches per token, four of them merged in the tower (MiniCPM)."""
    sizes = torch.tensor([[4, 4], [4, 8]])
    n_columns = int(sizes.prod(-1).sum()) * model.config.vision_config.patch_size
    pixels = inputs["pixel_values"][..., :n_columns]
    return dict(model.model.get_image_features(pixels, sizes, downsample_mode="16x"))
