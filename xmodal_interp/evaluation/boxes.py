"""Image tokens against labelled boxes, all in pixels of the original image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_interp.analysis.composing import are_queries, query_patches
from xmodal_interp.analysis.selecting import image_keys
from xmodal_interp.errors import InputError
from xmodal_interp.models import ImageGrid
from xmodal_interp.ordered import in_order
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import AttentionKind

Box = Iterable[float] | np.ndarray | Tensor | pd.Series
"""``x0, y0, x1, y1`` in pixels of the original image."""

Criterion = Literal["overlap", "centre"]


@dataclass(frozen=True, eq=False)
class Cells:
    """What of an image has a box: its tokens, or the patches that are in them.

    Attributes:
        keys: Key positions of the image's tokens.
        boxes: Of each cell the part that is on the picture, px of the original image. A processor
            that pads a picture makes cells that hang over its edge, and cells of padding alone,
            whose part has no area.
        shares: What part of each token is from each cell, where cells are no tokens.
    """

    keys: Int[Tensor, " key"]
    boxes: Float[Tensor, "cell 4"]
    shares: Float[Tensor, "key cell"] | None = None

    @property
    def on_picture(self) -> Bool[Tensor, " cell"]:
        """Whether some part of each cell is on the picture."""
        return areas(self.boxes) > 0

    def amounts(self, on_keys: Float[Tensor, "*axis key"]) -> Float[Tensor, "*axis cell"]:
        """Amounts on the cells, from amounts on the keys."""
        return on_keys if self.shares is None else on_keys @ self.shares.to(on_keys)


def placed_cells(sample: Sample, image: int, kind: AttentionKind = "self") -> Cells:
    """An image's tokens that have a box, be it on padding (class tokens have none).

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
        shares = query_patches(sample, image)[:, placed]
        return Cells(keys, _clipped(boxes[placed], grid), shares)
    corners = table[["x0", "y0", "x1", "y1"]].to_numpy(dtype="float64")
    boxes = torch.tensor(corners)[keys]
    placed = ~boxes.isnan().any(1)
    return Cells(keys[placed], _clipped(boxes[placed], grid))


def areas(boxes: Float[Tensor, "cell 4"]) -> Float[Tensor, " cell"]:
    """Area of each box, square px."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def _clipped(boxes: Float[Tensor, "cell 4"], grid: ImageGrid) -> Float[Tensor, "cell 4"]:
    """The part of each box that is on the picture."""
    edges = torch.tensor([grid.width, grid.height] * 2, dtype=boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), edges)


def overlap_shares(tokens: Float[Tensor, "token 4"], box: Box) -> Float[Tensor, " token"]:
    """The share of each token's area that lies in the box; 0 for a token without area.

    Raises:
        InputError: A box that is no box.
    """
    corners = _corners(box).to(tokens.dtype)
    low = torch.maximum(tokens[:, :2], corners[:2])
    high = torch.minimum(tokens[:, 2:], corners[2:])
    size = areas(tokens)
    inside = (high - low).clamp(min=0).prod(1)
    return torch.where(size > 0, inside / size, 0.0)


def tokens_inside(
    tokens: Float[Tensor, "token 4"], box: Box, criterion: Criterion
) -> Bool[Tensor, " token"]:
    """Which tokens count as in the box: those that overlap it, or those whose centre it holds.

    A token without area, on padding alone, is in no box.
    """
    if criterion == "overlap":
        return overlap_shares(tokens, box) > 0
    centres = (tokens[:, :2] + tokens[:, 2:]) / 2
    corners = _corners(box).to(tokens.dtype)
    held = ((centres >= corners[:2]) & (centres <= corners[2:])).all(1)
    return held & (areas(tokens) > 0)


def _corners(box: Box) -> Float[Tensor, "4"]:
    """The four numbers of a box, in a list, an array or a row of a table."""
    try:
        edges = [float(edge) for edge in in_order(box, "A box")]
    except (TypeError, OverflowError):  # not numbers
        edges = []
    if len(edges) != 4 or not (edges[0] < edges[2] and edges[1] < edges[3]):
        raise InputError(f"A box is x0 < x1, y0 < y1, in the order x0, y0, x1, y1; got {box!r}.")
    return torch.tensor(edges, dtype=torch.float64)
