"""Analyses: each takes a sample, a list of samples or a store and returns a tidy table."""

from xmodal_interp.analysis.allocation import attention_allocation
from xmodal_interp.analysis.answering import answer_accuracy
from xmodal_interp.analysis.blocks import block_statistics, cross_modal_summary
from xmodal_interp.analysis.composing import on_patches, query_patches
from xmodal_interp.analysis.cross_modal import cross_modal_ratio, token_ratio
from xmodal_interp.analysis.cumulative import pruning_curve
from xmodal_interp.analysis.descriptors import attention_distance, attention_entropy
from xmodal_interp.analysis.positional import positional_bias, recency_index
from xmodal_interp.analysis.pruning import head_pruning
from xmodal_interp.analysis.raster import raster_bias, raster_map, raster_profile
from xmodal_interp.analysis.rollout import attention_rollout, rollout_matrix
from xmodal_interp.analysis.sinks import attention_sinks, sink_rate

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
    "token_ratio",
]
