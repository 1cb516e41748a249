"""From a configuration class to a tiny configuration, by the names of its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "hidden_dim", "width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_hidden_size", "patch_embed_hidden_size", "projection_dim"), 32),
    **dict.fromkeys(("d_ff", "mlp_dim", "dense_intermediate_size"), 48),
    **dict.fromkeys(("layers", "n_layers", "num_decoder_layers"), 2),
    "d_kv": 8,
    **dict.fromkeys(("n_routed_experts", "num_local_experts", "num_experts"), 4),
    **dict.fromkeys(("text_hidden_size", "out_hidden_size", "projector_hidden_size"), 32),
    **dict.fromkeys(("projection_hidden_size", "adapter_in_dim", "adapter_out_dim"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim"), 8),
    "num_experts_per_tok": 2,
    "index_n_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
DEPENDENT = (
    *("layer_types", "mlp_layer_types", "no_rope_layers", "moe_layers"),
    *("rope_scaling", "per_layer_config"),
)


def tiny_config(
    model_type: str, over: Mapping[str, Any], anywhere: Mapping[str, int]
) -> PretrainedConfig:
    """The default configuration of a type, made tiny, with some settings replaced.

    Args:
        model_type: A key of transformers' configuration mapping.
        over: Settings to replace, nested as the configuration is.
        anywhere: Settings to replace wherever a sub-configuration has them.
    """
    kind = CONFIG_MAPPING[model_type]
    return kind(**merged(shrunk(kind().to_dict(), {**SIZES, **anywhere}), over))


def shrunk(settings: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The settings with every known size made small, those of sub-configurations too."""
    small: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and "model_type" in value:
            small[name] = shrunk(value, sizes)
        elif name in sizes and (isinstance(value, int) or name.endswith("_token_id")):
            small[name] = sizes[name]
        elif name not in DEPENDENT:
            small[name] = value
    return small


def merged(settings: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with others put over them, dictionary into dictionary."""
    result = dict(settings)
    for name, value in over.items():
        inner = result.get(name)
        nested = isinstance(value, Mapping) and isinstance(inner, dict)
        result[name] = merged(inner, value) if nested else value
    return result
