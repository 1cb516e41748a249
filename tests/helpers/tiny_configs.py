"""Derive a tiny config from a config class, by the names of its fields.

1. Take the defaults of the class, sub-configs included.
2. Fields with a known name pattern (a width, a number of heads, an image's side, a token id) get a
   tiny value. Other fields keep their default.
3. Keep the fewest layers that include every kind of layer. Settings that vary between layers are
   lists with an entry per layer, or lists of layer indices; both are reduced to the kept layers.
4. Overrides set all values that cannot be derived from names.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

WIDTH, INNER, HEADS, KV_HEADS, D_HEAD, VOCABULARY = 32, 48, 4, 2, 8, 128
PATCH, SIDE = 4, 16
FIRST_WORD = 64  # smaller ids are special tokens

# Patterns of field names, and their values in a tiny model. The first match counts.
SIZES: tuple[tuple[str, Any], ...] = (
    ("*linear_num_value_heads", HEADS),
    ("*linear_num_key_heads", KV_HEADS),
    ("*num_key_value_heads", KV_HEADS),
    ("num_global_key_value_heads", 1),
    ("index_n_heads", KV_HEADS),
    ("*num_*attention_heads", HEADS),
    ("*attention_heads", HEADS),
    ("*num_heads", HEADS),
    ("resampler_n_heads", HEADS),
    ("resampler_heads", HEADS),
    ("*head_dim", D_HEAD),
    ("resampler_dim_head", D_HEAD),
    ("d_kv", D_HEAD),
    ("*_lora_rank", 16),
    ("*intermediate_size*", INNER),
    ("*ffn_dim", INNER),
    ("*_expert_dim", INNER),
    ("d_ff", INNER),
    ("mlp_dim", INNER),
    ("hidden_size_per_layer_input", D_HEAD),
    ("*hidden_size", WIDTH),
    ("*hidden_dim", WIDTH),
    ("*embed_dim", WIDTH),
    ("*_proj_dim", WIDTH),
    ("projection_dim", WIDTH),
    ("projector_*put_dim", WIDTH),
    ("adapter_*put_size", WIDTH),
    ("adapter_*_dim", WIDTH),
    ("output_dim", WIDTH),
    ("d_model", WIDTH),
    ("vocab_size*", VOCABULARY),
    ("unpadded_vocab_size", VOCABULARY),
    ("image_size", SIDE),
    ("patch_size", PATCH),
    ("max_position_embeddings", 512),
    ("sliding_window", 6),
    ("sliding_window_size", 6),
    ("*num_experts", 4),
    ("*n_routed_experts", 4),
    ("num_local_experts", 4),
    ("num_experts_per_tok", 2),
    ("num_query_tokens", 5),
    ("*_num_latents", 5),
    ("*_n_latents", 5),
    ("latent_query_num", 5),
    ("n_group", 1),
    ("topk_group", 1),
    ("index_topk", 8),
    ("query_pre_attn_scalar", D_HEAD),
    ("window_size", 3),
    ("num_position_embeddings", (SIDE // PATCH) ** 2),
    ("pos_emb_*", SIDE // PATCH),
    ("chunk_size", 8),
    ("ssm_state_size", D_HEAD),
    ("output_channels", D_HEAD),
)
DEPTHS = (
    "num_hidden_layers",
    "num_layers",
    "depth",
    "layers",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
    "resampler_depth",
    "conf_num_hidden_layers",
)
N_LAYERS = 2
# Names of lists of layer indices. A list with an entry per layer is recognised by its length.
LAYER_SETS = ("*_indexes", "*_idxs", "*_indices", "*_layers", "*_layer_ids")
TOKENS = {"pad": 0, "bos": 1, "eos": 2, "sep": 3, "decoder_start": 1, "forced_eos": 2, "image": 8}
TOKEN_SUFFIXES = ("_token_id", "_token_index")


def tiny_config(
    config_class: type[PreTrainedConfig], overrides: Mapping[str, Any] | None = None
) -> PreTrainedConfig:
    """Return a tiny instance of a config class.

    Args:
        config_class: Any config class of transformers.
        overrides: Values by field name that override the rules; for a sub-config, a dictionary of
            the same form. Its ``model_type`` replaces the sub-config by one of another type; None
            instead of the dictionary removes it.
    """
    own = copy.deepcopy(dict(overrides or {}))  # some configs modify their arguments
    return _shrunk(config_class(), own, {}, dict(TOKENS))


def kept_layers(held: Mapping[str, Any]) -> list[int]:
    """Return the indices of the fewest layers that include every kind of layer, at least two.

    Args:
        held: The fields of a config.
    """
    depth = _depth(held)
    per_layer = [v for name, v in held.items() if _has_entry_per_layer(name, v, depth)]
    sets = [v for name, v in held.items() if _is_layer_set(name, v, depth)]
    kept: list[int] = []
    shown: set[tuple[int, str]] = set()
    for layer in range(depth):
        kinds = {(i, repr(entries[layer])) for i, entries in enumerate(per_layer)}
        kinds |= {(-1 - i, repr(layer in members)) for i, members in enumerate(sets)}
        if kinds - shown:
            shown |= kinds
            kept.append(layer)
    others = [layer for layer in range(depth) if layer not in kept]
    return sorted(kept + others[: max(0, N_LAYERS - len(kept))])


def _shrunk(
    config: PreTrainedConfig,
    overrides: Mapping[str, Any],
    base: Mapping[str, Any],
    ids: dict[str, int],
) -> PreTrainedConfig:
    """Shrink a config; ``base``: arguments set by its parent, ``ids``: token ids given so far."""
    held = vars(config)
    values = dict(base)
    parts = _parts(config)
    for name in dict.fromkeys([*inspect.signature(type(config).__init__).parameters, *base]):
        default = held.get(name)
        if isinstance(default, PreTrainedConfig) or (name in parts and name in overrides):
            values[name] = _sub_config(config, name, overrides.get(name, {}), ids)
        elif name in overrides:
            values[name] = overrides[name]
        elif default is not None:
            values |= _small(name, default, held, ids)
    given = {name: value for name, value in overrides.items() if name not in values}
    return type(config)(**values | given)


def _sub_config(
    parent: PreTrainedConfig, name: str, overrides: Mapping[str, Any] | None, ids: dict[str, int]
) -> PreTrainedConfig | None:
    if overrides is None:
        return None
    rest = dict(overrides)
    other = rest.pop("model_type", None)
    if other is not None:
        return _shrunk(CONFIG_MAPPING[other](), rest, {}, ids)
    spec = _parts(parent).get(name)
    base = {} if spec is None else spec.init_kwargs
    default = vars(parent).get(name)
    return _shrunk(spec.config_class() if default is None else default, rest, base, ids)


def _parts(config: PreTrainedConfig) -> Mapping[str, Any]:
    """Return the default sub-configs that a class declares; earlier releases declare none."""
    return getattr(type(config), "sub_configs_defaults", {})


def _small(name: str, value: Any, held: Mapping[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """Return the field with its tiny value, or {} if its default is kept."""
    depth, kept = _depth(held), kept_layers(held)
    if name.endswith(TOKEN_SUFFIXES):
        word = name.rsplit("_token_", 1)[0]
        number = ids.setdefault(word, max(ids.values()) + 1)
        return {name: number if isinstance(value, int) else [number]}
    if name in DEPTHS:
        return {name: min(value, len(kept))}
    if _is_layer_set(name, value, depth):
        return {name: [i for i, layer in enumerate(kept) if layer in value]}
    if _has_entry_per_layer(name, value, depth):
        return {name: [value[layer] for layer in kept]}
    if isinstance(value, int) and not isinstance(value, bool):
        fitting = [small for pattern, small in _sizes(held) if fnmatchcase(name, pattern)]
        return {name: min(value, fitting[0])} if fitting else {}
    return {}


def _sizes(held: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return the size rules; latent attention has a key head for each query head."""
    return (("num_key_value_heads", HEADS), *SIZES) if "kv_lora_rank" in held else SIZES


def _depth(held: Mapping[str, Any]) -> int:
    return max((held[name] for name in DEPTHS if isinstance(held.get(name), int)), default=0)


def _has_entry_per_layer(name: str, value: Any, depth: int) -> bool:
    is_list = isinstance(value, list | tuple) and len(value) == depth > 1
    return is_list and not _is_layer_set(name, value, depth)


def _is_layer_set(name: str, value: Any, depth: int) -> bool:
    return (
        isinstance(value, list | tuple)
        and any(fnmatchcase(name, pattern) for pattern in LAYER_SETS)
        and all(isinstance(layer, int) and 0 <= layer < depth for layer in value)
        and list(value) == sorted(set(value)) != []
    )
