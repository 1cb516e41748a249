"""What is so by a model's own design, and what is known to be wrong: data for the suite.

Every name is a model type; modules are glob patterns of dotted names.
"""

from __future__ import annotations

# Self-attention whose keys are more, or fewer, than its queries.
NOT_SQUARE: dict[str, dict[str, str]] = {
    "diffusion_gemma": {"*.self_attn": "keys of the prompt's cache stand before the canvas"},
    "gemma3n": {
        "model.vision_tower.*.attn": "a convolution makes fewer keys than queries",
        "model.audio_tower.*.attn": "a sound is cut into chunks, each with the keys around it",
    },
    "gemma4": {
        "model.audio_tower.*.self_attn": "a sound is cut into chunks, each with the keys around it"
    },
    "grounding_dino": {"*.fusion_layer.attn": "image and text read each other in one module"},
    "pi0": {"*.self_attn": "actions read the cache of image and words"},
    "t5gemma2": {"*decoder.layers.*.self_attn": "the encoder's keys stand behind the decoder's"},
}
# Types that take videos, and fail on them in this version of transformers, recorded or not: how.
NO_VIDEO: dict[str, str] = {
    "kimi_k25": "split_with_sizes expects split_sizes to sum exactly to",
    "nemotron_h_omni": "argument 'tensors' .* must be tuple of Tensors, not Tensor",
}

# What a test finds wrong in the package, and why. What is mended fails until it is taken out here.
WRONG: dict[tuple[str, str], str] = {}
