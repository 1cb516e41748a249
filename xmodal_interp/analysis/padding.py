"""Exclude padding: results must not depend on the other samples in the batch.

Padding tokens are never visible keys. They are queries in bidirectional attention, and they shift
the positions after them. These functions return the rows to use and the position of each token
without padding.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from xmodal_interp.attention import AttentionCall
from xmodal_interp.sample import Sample


def present(sample: Sample) -> Bool[Tensor, " position"]:
    """Return a mask of the positions that are not padding."""
    return torch.tensor(sample.tokens["kind"].ne("padding").to_numpy(dtype=bool))


def first_position(sample: Sample) -> int:
    """Return the first position that is not padding."""
    return int(np.flatnonzero(present(sample))[0])


def places_of(sample: Sample) -> Int[Tensor, " position"]:
    """Return the index of each position among those that are not padding, from 0.

    A padding position has the index of the last position before it that is not padding, or -1.
    """
    return present(sample).long().cumsum(0) - 1


def rows_of(sample: Sample, call: AttentionCall) -> Int[Tensor, " query"]:
    """Return the query positions that a call of the language tower holds, without padding."""
    rows = call.query_positions
    return rows[present(sample).to(rows.device)[rows]]
