"""One question per file: a sample (or a store, or a list of samples) in, a tidy table out."""

from xmodal_interp.analysis.allocation import attention_allocation as attention_allocation
from xmodal_interp.analysis.answering import answer_accuracy as answer_accuracy
from xmodal_interp.analysis.blocks import block_statistics as block_statistics
from xmodal_interp.analysis.blocks import cross_modal_summary as cross_modal_summary
from xmodal_interp.analysis.composing import on_patches as on_patches
from xmodal_interp.analysis.composing import query_patches as query_patches
from xmodal_interp.analysis.cross_modal import cross_modal_ratio as cross_modal_ratio
from xmodal_interp.analysis.cross_modal import token_ratio as token_ratio
from xmodal_interp.analysis.cumulative import pruning_curve as pruning_curve
from xmodal_interp.analysis.descriptors import attention_distance as attention_distance
from xmodal_interp.analysis.descriptors import attention_entropy as attention_entropy
from xmodal_interp.analysis.positional import positional_bias as positional_bias
from xmodal_interp.analysis.positional import recency_index as recency_index
from xmodal_interp.analysis.pruning import head_pruning as head_pruning
from xmodal_interp.analysis.raster import raster_bias as raster_bias
from xmodal_interp.analysis.raster import raster_map as raster_map
from xmodal_interp.analysis.raster import raster_profile as raster_profile
from xmodal_interp.analysis.rollout import attention_rollout as attention_rollout
from xmodal_interp.analysis.rollout import rollout_matrix as rollout_matrix
from xmodal_interp.analysis.sinks import attention_sinks as attention_sinks
from xmodal_interp.analysis.sinks import sink_rate as sink_rate
