"""Positions of a sequence that may still grow, as interventions name them.

They count from the start of the sequence, padding included, also while the model generates with a
cache: position 160 is touched by the decode step that reads it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional

from xmodal_interp.attention import Positions
from xmodal_interp.errors import InputError, PositionError


class Selection:
    """Positions, before it is known how long the sequence will be.

    Args:
        positions: An index, indices, a slice (an open end includes what is generated), or a boolean
            tensor ``[position]`` or ``[sample, position]``; positions behind its end are not
            selected.

    Raises:
        PositionError: A negative position: the end it would count from moves.
    """

    def __init__(self, positions: Positions) -> None:
        self.slice = positions if isinstance(positions, slice) else None
        self.mask: Tensor | None = None
        named: list[int] = []
        if isinstance(positions, slice):
            named = [p for p in (positions.start, positions.stop, positions.step) if p is not None]
        elif isinstance(positions, Tensor) and positions.dtype == torch.bool:
            self.mask = positions if positions.ndim == 2 else positions[None]
        else:
            given: Any = positions
            named = [int(value) for value in (given if np.ndim(given) else [given])]
            self.mask = torch.zeros(1, max(named, default=-1) + 1, dtype=torch.bool)
        if min(named, default=0) < 0:
            raise PositionError(
                "Positions of an intervention count from the start of the sequence, because its "
                f"end moves while the model generates; got {min(named)}. The last position of a "
                "prompt is sample.last."
            )
        if self.mask is not None and named:
            self.mask[0, named] = True

    @property
    def n_needed(self) -> int:
        """How long the sequence must become for every named position to be reached."""
        if self.mask is None:
            start = None if self.slice is None else self.slice.start
            return 0 if start is None else int(start) + 1
        columns = self.mask.any(0).nonzero()
        return int(columns.max()) + 1 if len(columns) else 0

    def between(self, start: int, stop: int, like: Tensor) -> Bool[Tensor, "sample position"]:
        """True at the selected positions of the stretch ``[start, stop)``.

        Args:
            start: First position of the stretch.
            stop: The position behind its last.
            like: A tensor ``[sample, ...]`` of the call: its batch size is checked against, its
                device is used.

        Returns:
            One row if the samples agree, else one per sample.

        Raises:
            InputError: Positions given per sample, for another number of samples.
        """
        if self.mask is None:
            chosen = torch.zeros(1, stop, dtype=torch.bool, device=like.device)
            chosen[:, self.slice] = True
            return chosen[:, start:]
        if self.mask.shape[0] not in (1, like.shape[0]):
            raise InputError(
                "Positions given per sample have one row for each sample of the batch. Got "
                f"{self.mask.shape[0]} rows for a batch of {like.shape[0]}."
            )
        held = self.mask[:, start:stop].to(like.device)
        return functional.pad(held, (0, stop - start - held.shape[1]))
