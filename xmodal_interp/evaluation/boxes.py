"""Image tokens against labelled boxes, all in pixels of the original image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_interp.analysis.composing import are_queries, query_patches
from xmodal_interp.analysis.selecting import image_keys
from xmodal_interp.errors import InputError
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import AttentionKind

Box = Sequence[float]
"""``x0, y0, x1, y1`` in pixels of the original image."""

Criterion = Literal["overlap", "centre"]


@dataclass(frozen=True, eq=False)
class Cells:
    """What of an image has a box: its tokens, or the patches that are in them.

    Attributes:
        keys: Key positions of the image's tokens.
        boxes: Of each cell, px of the original image.
        shares: What part of each token is from each cell, where cells are no tokens.
    """

    keys: Int[Tensor, " key"]
    boxes: Float[Tensor, "cell 4"]
    shares: Float[Tensor, "key cell"] | None = None

    def amounts(self, on_keys: Float[Tensor, "*axis key"]) -> Float[Tensor, "*axis cell"]:
        """Amounts on the cells, from amounts on the keys."""
        return on_keys if self.shares is None else on_keys @ self.shares.to(on_keys)


def placed_cells(sample: Sample, image: int, kind: AttentionKind = "self") -> Cells:
    """An image's tokens that have a place on it (class tokens have none).

    Where all of them are learned queries: the patches that are in them.

    Raises:
        InputError: There is no such token.
        NotRecordedError: The tokens are learned queries, and the connector was not kept.
    """
    keys = image_keys(sample, image, kind).nonzero()[:, 0]
    table = sample.cross_keys if kind == "cross" else sample.tokens
    if table is None:
        raise InputError(f"Sample {sample.name!r} has no cross-attention keys; pass kind='self'.")
    grid = sample.grids[image]
    if are_queries(grid) and grid.patch_boxes is not None:
        boxes = torch.tensor(grid.patch_boxes)
        placed = ~boxes.isnan().any(1)
        return Cells(keys, boxes[placed], query_patches(sample, image)[:, placed])
    corners = table[["x0", "y0", "x1", "y1"]].to_numpy(dtype="float64")
    boxes = torch.tensor(corners)[keys]
    placed = ~boxes.isnan().any(1)
    return Cells(keys[placed], boxes[placed])


def overlap_shares(tokens: Float[Tensor, "token 4"], box: Box) -> Float[Tensor, " token"]:
    """The share of each token's area that lies in the box.

    Raises:
        InputError: A box that is no box.
    """
    if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
        raise InputError(f"A box is x0 < x1, y0 < y1, in the order x0, y0, x1, y1; got {box!r}.")
    corners = torch.tensor([float(edge) for edge in box], dtype=tokens.dtype)
    low = torch.maximum(tokens[:, :2], corners[:2])
    high = torch.minimum(tokens[:, 2:], corners[2:])
    sides = tokens[:, 2:] - tokens[:, :2]
    return (high - low).clamp(min=0).prod(1) / sides.prod(1)


def tokens_inside(
    tokens: Float[Tensor, "token 4"], box: Box, criterion: Criterion
) -> Bool[Tensor, " token"]:
    """Which tokens count as in the box: those that overlap it, or those whose centre it holds."""
    if criterion == "overlap":
        return overlap_shares(tokens, box) > 0
    centres = (tokens[:, :2] + tokens[:, 2:]) / 2
    corners = torch.tensor([float(edge) for edge in box], dtype=tokens.dtype)
    return ((centres >= corners[:2]) & (centres <= corners[2:])).all(1)
