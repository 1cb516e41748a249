"""Positions but for the padding of a batch: the company of a sample must not change its numbers.

Padding is no key of anything, but where attention looks both ways it is a query, and it moves all
positions behind it. Analyses ask here which rows count and where a position stands.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from xmodal_interp.attention import AttentionCall
from xmodal_interp.sample import Sample


def present(sample: Sample) -> Bool[Tensor, " position"]:
    """True on the positions that are no padding."""
    return torch.tensor(sample.tokens["kind"].ne("padding").to_numpy(dtype=bool))


def first_position(sample: Sample) -> int:
    """The first position that is no padding."""
    return int(np.flatnonzero(present(sample))[0])


def places_of(sample: Sample) -> Int[Tensor, " position"]:
    """The number of each position among those that are no padding, from 0.

    Padding has the number of the position before it, or -1.
    """
    return present(sample).long().cumsum(0) - 1


def rows_of(sample: Sample, call: AttentionCall) -> Int[Tensor, " query"]:
    """The query positions that a call of the language tower holds and that are no padding."""
    rows = call.query_positions
    return rows[present(sample).to(rows.device)[rows]]
