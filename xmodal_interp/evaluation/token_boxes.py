"""Compare image tokens with labelled boxes, in pixels of the original image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_interp.analysis.connector_rollout import are_queries, query_patches
from xmodal_interp.analysis.selection import image_keys
from xmodal_interp.errors import InputError
from xmodal_interp.models import ImageGrid
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import AttentionKind

Criterion = Literal["overlap", "centre"]


@dataclass(frozen=True, eq=False)
class TokenBoxes:
    """The boxes of an image's tokens, or of its patches if its tokens are learned queries.

    Attributes:
        keys: Key positions of the image's tokens.
        boxes: Box of each cell, clipped to the image, in px of the original image. If a processor
            pads an image, some cells extend over its edge; cells of padding alone have no area.
        shares: Share of each patch in each token if cells are patches; None if they are tokens.
    """

    keys: Int[Tensor, " key"]
    boxes: Float[Tensor, "cell 4"]
    shares: Float[Tensor, "key cell"] | None = None

    @property
    def on_picture(self) -> Bool[Tensor, " cell"]:
        """True for each cell that overlaps the image."""
        return areas(self.boxes) > 0

    def amounts(self, on_keys: Float[Tensor, "*axis key"]) -> Float[Tensor, "*axis cell"]:
        """Convert amounts on the keys to amounts on the cells."""
        return on_keys if self.shares is None else on_keys @ self.shares.to(on_keys)


def token_boxes(sample: Sample, image: int, kind: AttentionKind = "self") -> TokenBoxes:
    """Return the image tokens that have a box, including those on padding.

    Class tokens have no box. If the tokens are learned queries, return the patches instead.

    Raises:
        InputError: The image has no tokens.
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
        return TokenBoxes(keys, _clipped(boxes[placed], grid), shares)
    corners = table[["x0", "y0", "x1", "y1"]].to_numpy(dtype="float64")
    boxes = torch.tensor(corners)[keys]
    placed = ~boxes.isnan().any(1)
    return TokenBoxes(keys[placed], _clipped(boxes[placed], grid))


def areas(boxes: Float[Tensor, "cell 4"]) -> Float[Tensor, " cell"]:
    """Return the area of each box, square px."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def _clipped(boxes: Float[Tensor, "cell 4"], grid: ImageGrid) -> Float[Tensor, "cell 4"]:
    """Clip the boxes to the image."""
    edges = torch.tensor([grid.width, grid.height] * 2, dtype=boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), edges)


def overlap_shares(
    tokens: Float[Tensor, "token 4"], boxes: Float[np.ndarray, "box 4"]
) -> Float[Tensor, " token"]:
    """Return the share of each token's area that is in a box; 0 for a token without area.

    Where boxes overlap, their common area counts once: the edges of all boxes cut the image into
    rectangles, each of which is in a box or not.
    """
    edges = [np.unique(boxes[:, [axis, axis + 2]]) for axis in (0, 1)]
    middles = [(each[:-1] + each[1:]) / 2 for each in edges]
    in_x, in_y = (
        (boxes[:, axis, None] < middles[axis]) & (middles[axis] < boxes[:, axis + 2, None])
        for axis in (0, 1)
    )
    covered = torch.from_numpy((in_y[:, :, None] & in_x[:, None, :]).any(0)).to(tokens.dtype)
    widths, heights = (
        (
            torch.minimum(tokens[:, axis + 2, None], ends[1:])
            - torch.maximum(tokens[:, axis, None], ends[:-1])
        ).clamp(min=0)
        for axis, ends in enumerate(torch.from_numpy(each).to(tokens.dtype) for each in edges)
    )
    size = areas(tokens)
    inside = torch.einsum("ty,yx,tx->t", heights, covered, widths)
    return torch.where(size > 0, inside / size, 0.0)


def tokens_inside(
    tokens: Float[Tensor, "token 4"], boxes: Float[np.ndarray, "box 4"], criterion: Criterion
) -> Bool[Tensor, " token"]:
    """Return True for tokens that overlap a box, or for tokens whose centre is in a box.

    A token without area (on padding alone) is never in a box.
    """
    if criterion == "overlap":
        return overlap_shares(tokens, boxes) > 0
    centres = (tokens[:, None, :2] + tokens[:, None, 2:]) / 2
    corners = torch.from_numpy(boxes).to(tokens.dtype)
    inside = ((centres >= corners[:, :2]) & (centres <= corners[:, 2:])).all(2).any(1)
    return inside & (areas(tokens) > 0)
