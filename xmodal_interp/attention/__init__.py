"""One attention call with exact statistics of it, and joining the calls of a layer."""

from xmodal_interp.attention.assembling import (
    decoder_layer,
    encoder_layer,
    joined_pieces,
    part_of,
    pieces_of,
    ran_without_cache,
    reordered,
    stitch,
    with_mask,
)
from xmodal_interp.attention.call import AXES, AttentionCall
from xmodal_interp.attention.indexing import (
    Positions,
    entries_of,
    layer_index,
    number,
    numbers,
    resolve,
    whole_slice,
)

__all__ = [
    "AXES",
    "AttentionCall",
    "Positions",
    "decoder_layer",
    "encoder_layer",
    "entries_of",
    "joined_pieces",
    "layer_index",
    "number",
    "numbers",
    "part_of",
    "pieces_of",
    "ran_without_cache",
    "reordered",
    "resolve",
    "stitch",
    "whole_slice",
    "with_mask",
]
