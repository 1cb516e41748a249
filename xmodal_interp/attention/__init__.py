"""Exact computations on one attention call, with bounded memory."""

from xmodal_interp.attention.assembling import (
    decoder_layer,
    encoder_layer,
    joined,
    part_of,
    pieces_of,
    reordered,
    reread,
    stitch,
    with_keys,
)
from xmodal_interp.attention.call import AttentionCall
from xmodal_interp.attention.indexing import (
    Positions,
    entries_of,
    number,
    numbers,
    resolve,
    whole_slice,
)

__all__ = [
    "AttentionCall",
    "Positions",
    "decoder_layer",
    "encoder_layer",
    "entries_of",
    "joined",
    "number",
    "numbers",
    "part_of",
    "pieces_of",
    "reordered",
    "reread",
    "resolve",
    "stitch",
    "whole_slice",
    "with_keys",
]
