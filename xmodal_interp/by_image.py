"""The calls of a vision tower (or a connector), image by image.

A tower may run once per image, once over a batch of images, tiles or windows, or over several
images in one packed row. Pieces are counted in the order that they come; each image has as many
positions as its grid has patches, or the same multiple or part of it. A tower may also read all
images whole, and then the tiles of all in a second call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from xmodal_interp.attention import AttentionCall, joined, part_of, pieces_of, reordered
from xmodal_interp.errors import CaptureError
from xmodal_interp.models import ImageGrid


def calls_by_image(
    stream: Sequence[AttentionCall],
    grids: Sequence[ImageGrid],
    orders: Sequence[Tensor] | None = None,
    tiles: Sequence[int] | None = None,
) -> list[AttentionCall]:
    """One call per image, of one layer; ``call`` is the image.

    Args:
        stream: The layer's calls, in order.
        grids: The grids of all images of the batch, in order.
        orders: For each image ``[patch]``, which patch stands at each position of the tower, if not
            in order.
        tiles: How many tiles of each image come in a second call, behind all images; None if each
            image is read as one.

    Raises:
        CaptureError: Pieces that cannot be shared out among several images.
    """
    shares = None if tiles is None else _behind_wholes(stream, tiles)
    if shares is None:
        shares = _shares([piece for call in stream for piece in pieces_of(call)], grids)
    calls = []
    for number, share in enumerate(shares):
        call = joined(share)
        if orders and call.n_queries == call.n_keys == len(orders[number]):
            call = reordered(call, torch.argsort(orders[number]))
        calls.append(replace(call, call=number))
    return calls


def _behind_wholes(
    stream: Sequence[AttentionCall], tiles: Sequence[int]
) -> list[Sequence[AttentionCall]] | None:
    """The pieces of each image, from a call over all images and one over all tiles.

    Each image, and each tile, may have several pieces: windows. None if these are no such calls.
    """
    if len(stream) != 2 or len(tiles) <= 1 or not any(tiles):
        return None
    counts = [call.n_samples for call in stream]
    if counts[0] % len(tiles) or counts[1] % sum(tiles):
        return None
    per_image, per_tile = counts[0] // len(tiles), counts[1] // sum(tiles)
    wholes, parts = (pieces_of(call) for call in stream)
    ends = [0, *accumulate(n * per_tile for n in tiles)]
    return [
        [*wholes[i * per_image : (i + 1) * per_image], *parts[start:stop]]
        for i, (start, stop) in enumerate(pairwise(ends))
    ]


def _shares(
    pieces: Sequence[AttentionCall], grids: Sequence[ImageGrid]
) -> list[Sequence[AttentionCall]]:
    """The pieces of each image."""
    if len(grids) <= 1:  # a video, if there is no image
        return [pieces]
    ends = list(accumulate(piece.n_keys for piece in pieces))
    wanted = list(accumulate(len(grid.patch_places) for grid in grids))
    bounds = _bounds(wanted, ends[-1])
    if bounds:
        if len(pieces) == 1 and pieces[0].n_queries == pieces[0].n_keys:
            return [[part_of(pieces[0], *bound)] for bound in pairwise(bounds)]
        if set(bounds[1:]) <= set(ends):
            cuts = [0, *(ends.index(end) + 1 for end in bounds[1:])]
            return [pieces[start:stop] for start, stop in pairwise(cuts)]
    each, rest = divmod(len(pieces), len(grids))
    alike = [p.n_keys for p in pieces] == [p.n_keys for p in pieces[:each]] * len(grids)
    if rest == 0 and each > 0 and alike:
        return [pieces[i * each : (i + 1) * each] for i in range(len(grids))]
    keys = ", ".join(str(piece.n_keys) for piece in pieces[:5])
    patches = ", ".join(str(len(grid.patch_places)) for grid in grids[:5])
    raise CaptureError(
        "The calls of a tower must be those of its images: pieces that add up to the patches of "
        f"each, or as many alike for each. {pieces[0].name}: {len(pieces)} pieces of {keys}, ... "
        f"keys, for {len(grids)} images of {patches}, ... patches. Capture the samples one by one, "
        "or leave the tower out."
    )


def _bounds(wanted: Sequence[int], n_positions: int) -> list[int]:
    """Where each image begins, and the end, if all have the same positions per patch; else none.

    Args:
        wanted: The patches of all images up to each.
        n_positions: The positions of all.
    """
    n_patches = wanted[-1]
    if not n_patches or any(end * n_positions % n_patches for end in wanted):
        return []
    if n_positions % n_patches and n_patches % n_positions:
        return []
    return [0, *(end * n_positions // n_patches for end in wanted)]
