from .allocation import attention_allocation
from .answers import answer_accuracy
from .blocks import block_statistics, cross_modal_summary
from .connector_rollout import on_patches, query_patches
from .cross_modal import cross_modal_ratio, token_ratio
from .descriptors import attention_distance, attention_entropy
from .positional import positional_bias, recency_index
from .pruning import head_pruning, pruning_curve
from .rollout import attention_rollout, rollout_matrix
from .sinks import attention_sinks, sink_rate
from .spatial_bias import raster_bias, raster_map, raster_profile
from .time_alignment import time_alignment, token_times
from .token_norms import token_norms

__all__ = [
    "answer_accuracy",
    "attention_allocation",
    "attention_distance",
    "attention_entropy",
    "attention_rollout",
    "attention_sinks",
    "block_statistics",
    "cross_modal_ratio",
    "cross_modal_summary",
    "head_pruning",
    "on_patches",
    "positional_bias",
    "pruning_curve",
    "query_patches",
    "raster_bias",
    "raster_map",
    "raster_profile",
    "recency_index",
    "rollout_matrix",
    "sink_rate",
    "time_alignment",
    "token_norms",
    "token_ratio",
    "token_times",
]
