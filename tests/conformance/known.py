"""Expected exceptions and known faults, as data for the suite.

Keys are model types; modules are glob patterns of qualified names.
"""

from __future__ import annotations

# Self-attention with more or fewer keys than queries.
NOT_SQUARE: dict[str, dict[str, str]] = {
    "diffusion_gemma": {"*.self_attn": "keys of the prompt's cache precede the canvas"},
    "gemma3n": {
        "model.vision_tower.*.attn": "a convolution makes fewer keys than queries",
        "model.audio_tower.*.attn": "audio is split into chunks, each with the keys around it",
    },
    "gemma4": {
        "model.audio_tower.*.self_attn": "audio is split into chunks, each with the keys around it"
    },
    "grounding_dino": {"*.fusion_layer.attn": "image and text attend to each other in one module"},
    "pi0": {"*.self_attn": "actions attend to the cache of image and text"},
    "t5gemma2": {"*decoder.layers.*.self_attn": "the encoder's keys follow the decoder's"},
}
# Types that fail on videos in this version of transformers, recorded or not, with the error.
NO_VIDEO: dict[str, str] = {
    "kimi_k25": "split_with_sizes expects split_sizes to sum exactly to",
    "nemotron_h_omni": "argument 'tensors' .* must be tuple of Tensors, not Tensor",
}

# Known faults of the package by type and test, with the reason. Strict: remove an entry when fixed.
WRONG: dict[tuple[str, str], str] = {}
