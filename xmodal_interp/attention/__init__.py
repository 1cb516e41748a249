"""Exact computations on one attention call, with bounded memory."""

from xmodal_interp.attention.call import AttentionCall
from xmodal_interp.attention.positions import (
    Positions,
    entries_of,
    number,
    numbers,
    resolve,
    whole_slice,
)
from xmodal_interp.attention.segmenting import joined, part_of, pieces_of, reordered
from xmodal_interp.attention.stitching import reread, stitch
from xmodal_interp.attention.two_stacks import decoder_layer, encoder_layer, with_keys

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
