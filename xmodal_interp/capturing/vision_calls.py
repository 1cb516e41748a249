"""Split the calls of a vision tower or a connector into one call per image and per video.

A tower may run once per image, once over a batch of images, frames, tiles or windows, or once over
several images packed into one row. Each entry of such a batch is a *piece*. Pieces are assigned to
images and videos in order. The number of positions of an image is the number of its patches, times
a factor that is the same for all images. Some towers read all whole images in one call, then the
tiles of all images in a second call.

A model reads all images of a batch, then all videos, unless ``Family.in_order`` is set. In both
cases the calls of a sample are numbered by its images first, then by its videos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from xmodal_interp.attention import (
    AttentionCall,
    joined_pieces,
    part_of,
    pieces_of,
    ran_without_cache,
    reordered,
)
from xmodal_interp.errors import CaptureError
from xmodal_interp.hooks.raw_calls import changed
from xmodal_interp.models import (
    VLM,
    Family,
    ImageGrid,
    Prompt,
    VideoGrid,
    square_windows,
    tile_counts,
    window_orders,
)
from xmodal_interp.models.model_parts import parts_of
from xmodal_interp.vocabulary import AttentionKind, Tower

Layer = tuple[Tower, AttentionKind, int]


@dataclass(frozen=True, eq=False)
class Visual:
    """An image or a video of a batch.

    Attributes:
        sample: Index of its sample in the batch.
        number: Index in the list of the sample's images followed by its videos.
        grid: Places of its tokens and patches.
        position: Its first position in the prompt; 0 if it has no tokens in the prompt.
    """

    sample: int
    number: int
    grid: ImageGrid | VideoGrid
    position: int

    @property
    def is_video(self) -> bool:
        """True for a video, False for an image."""
        return isinstance(self.grid, VideoGrid)


def visuals_as_read(prompts: Sequence[Prompt], *, in_order: bool) -> list[Visual]:
    """Return the images and videos of a batch in the order that the model reads them.

    Args:
        prompts: The prompts of a batch.
        in_order: If True, the order of the prompts; if False, all images, then all videos.
    """
    visuals = []
    for sample, prompt in enumerate(prompts):
        grids: tuple[ImageGrid | VideoGrid, ...] = (*prompt.grids, *prompt.video_grids)
        for number, grid in enumerate(grids):
            kind = "image" if number < len(prompt.grids) else "video"
            of_kind = number if kind == "image" else number - len(prompt.grids)
            starts = (i for i, of in enumerate(prompt.columns[kind]) if of == of_kind)
            visuals.append(Visual(sample, number, grid, next(starts, 0)))
    if in_order:
        return sorted(visuals, key=lambda each: (each.sample, each.position))
    return sorted(visuals, key=lambda each: each.is_video)


def towers_by_image(
    vlm: VLM,
    inputs: Mapping[str, Any],
    prompts: Sequence[Prompt],
    calls: Sequence[AttentionCall],
) -> dict[Layer, list[dict[int, AttentionCall]]]:
    """Split the calls of all vision, audio and connector layers by sample and image.

    Args:
        vlm: Model and processor.
        inputs: The model inputs of the batch.
        prompts: The prompts of the batch.
        calls: All calls of the batch, in order. If a tower runs again for each new token, only its
            first run is used.

    Returns:
        For each layer a list with one dict per sample, which maps the number of an image or video
        to its call. If the module reads no image or video, each sample gets the first
        call as call 0.

    Raises:
        CaptureError: The calls cannot be assigned to the images.
    """
    visuals = visuals_as_read(prompts, in_order=vlm.family.in_order)
    modules = parts_of(vlm.model).modules
    orders, windows = window_orders(modules, inputs), square_windows(modules)
    tiles = tile_counts(inputs)
    towers: dict[Layer, list[dict[int, AttentionCall]]] = {}
    for key, of_layer in by_layer(_first_run(calls)).items():
        if key[0] in ("language", "other"):
            continue
        module = of_layer[0].module
        read = _visuals_read_by(module, visuals, vlm.family)
        grids = [each.grid for each in read]
        given = next((of for at, of in orders.items() if module.startswith(f"{at}.")), None)
        in_module = None if given is None else _orders_of(grids, given)
        split = calls_by_image(of_layer, grids, in_module, tiles)
        side = windows.get(module.rpartition(".")[0])
        if side is not None and read and key[1] != "channel":
            pairs = zip(split, read, strict=True)
            split = [_without_windows(call, each.grid, side) for call, each in pairs]
        towers[key] = [{} for _ in prompts]
        for visual, call in zip(read, split, strict=bool(read)):
            towers[key][visual.sample][visual.number] = changed(call, call=visual.number)
        if not read:
            towers[key] = [{0: split[0]} for _ in prompts]
    return towers


def _orders_of(
    grids: Sequence[ImageGrid | VideoGrid], orders: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Join the patch orders of single pictures into one order for each image and video."""
    counts = [len(grid.patch_places) for grid in grids]
    if sum(counts) != sum(map(len, orders)):
        return orders
    starts = accumulate(map(len, orders), initial=0)
    whole = torch.cat([order + start for order, start in zip(orders, starts, strict=False)])
    starts = accumulate(counts, initial=0)
    parts = whole.split(counts)
    return [part - start for part, start in zip(parts, starts, strict=False)]


def _without_windows(call: AttentionCall, grid: ImageGrid | VideoGrid, side: int) -> AttentionCall:
    """Reorder the positions of a call over windows to the order of the grid's patches.

    Padding positions of windows are removed, which is possible only if the call holds
    probabilities. The call is returned unchanged if it holds queries and keys of padded windows, or
    if its number of positions does not match the grid.

    Args:
        call: The windows of each picture row by row, one picture after the other.
        grid: A grid whose pictures have the same size.
        side: Side of a window in patches.
    """
    view = grid.thumbnail or grid
    rows, cols = view.patch_rows, view.patch_cols
    n_views, rest = divmod(len(grid.patch_places), max(rows * cols, 1))
    n_across = -(-cols // side)
    n_padded = -(-rows // side) * n_across * side**2
    padded = n_padded != rows * cols
    if rest or call.n_keys != n_views * n_padded or (padded and call.dense is None):
        return call
    row, col = torch.arange(rows * cols) // max(cols, 1), torch.arange(rows * cols) % max(cols, 1)
    window = row // side * n_across + col // side
    place = window * side**2 + row % side * side + col % side
    return reordered(call, torch.cat([place + n * n_padded for n in range(n_views)]))


def _first_run(calls: Sequence[AttentionCall]) -> Sequence[AttentionCall]:
    """Return the calls before a tower runs again after the language model.

    Without a KV cache, the language model runs on the whole prompt for each new token, and the
    towers run again too, unless their features are cached.

    Raises:
        CaptureError: A tower ran again although the language model has a cache.
    """
    lengths = {key: [call.n_queries for call in of] for key, of in by_layer(calls).items()}
    again = any(key[0] == "language" and ran_without_cache(of) for key, of in lengths.items())
    seen: set[Layer] = set()
    language_has_begun = False
    for number, call in enumerate(calls):
        key = call.tower, call.kind, call.layer
        if call.tower == "language":
            language_has_begun = True
        elif language_has_begun and key in seen and call.tower != "other":
            if again:
                return calls[:number]
            raise CaptureError(
                f"{call.name} ran again during generation with a cache: other code than generate, "
                "such as a logits processor, runs parts of the model. Pass a copy of the model "
                "(copy.deepcopy) to that code."
            )
        seen.add(key)
    return calls


def by_layer(calls: Sequence[AttentionCall]) -> dict[Layer, list[AttentionCall]]:
    """Group calls by layer, in order."""
    layers: dict[Layer, list[AttentionCall]] = {}
    for call in calls:
        layers.setdefault((call.tower, call.kind, call.layer), []).append(call)
    return layers


def _visuals_read_by(module: str, visuals: list[Visual], family: Family) -> list[Visual]:
    """Return the images and videos that a module reads."""
    if family.video_tower is None:
        return visuals
    of_videos = family.video_tower in module.split(".")
    return [each for each in visuals if each.is_video == of_videos]


def calls_by_image(
    calls: Sequence[AttentionCall],
    grids: Sequence[ImageGrid | VideoGrid],
    orders: Sequence[Tensor] | None = None,
    tiles: Sequence[int] | None = None,
) -> list[AttentionCall]:
    """Split the calls of one layer into one call per image or video.

    The field ``call`` of each result is the index of its grid.

    Args:
        calls: The layer's calls, in order.
        grids: The grids of all images and videos of the batch, in the order that they are read.
        orders: For each grid, the index of the patch at each position of the tower, ``[patch]``;
            None if the tower does not reorder patches.
        tiles: The number of tiles of each image, if the tiles are read in a second call after all
            images; None otherwise.

    Raises:
        CaptureError: The pieces cannot be assigned to the images.
    """
    pieces = None if tiles is None else _tiles_after_images(calls, tiles)
    if pieces is None:
        pieces = _pieces_by_image([piece for call in calls for piece in pieces_of(call)], grids)
    by_image = []
    for number, of_image in enumerate(pieces):
        call = joined_pieces(of_image)
        square = call.n_queries == call.n_keys and call.kind != "channel"
        if orders and square and call.n_keys == len(orders[number]):
            call = reordered(call, torch.argsort(orders[number]))
        by_image.append(changed(call, call=number))
    return by_image


def _tiles_after_images(
    calls: Sequence[AttentionCall], tiles: Sequence[int]
) -> list[Sequence[AttentionCall]] | None:
    """Return the pieces of each image, from a call over all images and a call over all tiles.

    An image or a tile may consist of several pieces (windows). Return None if the calls do not have
    this form.
    """
    if len(calls) != 2 or len(tiles) <= 1 or not any(tiles):
        return None
    counts = [call.n_samples for call in calls]
    if counts[0] % len(tiles) or counts[1] % sum(tiles):
        return None
    per_image, per_tile = counts[0] // len(tiles), counts[1] // sum(tiles)
    of_images, of_tiles = (pieces_of(call) for call in calls)
    ends = [0, *accumulate(n * per_tile for n in tiles)]
    return [
        [*of_images[i * per_image : (i + 1) * per_image], *of_tiles[start:stop]]
        for i, (start, stop) in enumerate(pairwise(ends))
    ]


def _pieces_by_image(
    pieces: Sequence[AttentionCall], grids: Sequence[ImageGrid | VideoGrid]
) -> list[Sequence[AttentionCall]]:
    """Return the pieces of each image or video."""
    if len(grids) <= 1:
        return [pieces]
    ends = list(accumulate(piece.n_keys for piece in pieces))
    wanted = list(accumulate(len(grid.patch_places) for grid in grids))
    of_channels = pieces[0].kind == "channel"  # the number of channels does not depend on patches
    bounds = [] if of_channels else _bounds(wanted, ends[-1])
    if bounds:
        if len(pieces) == 1 and pieces[0].n_queries == pieces[0].n_keys:
            return [[part_of(pieces[0], *bound)] for bound in pairwise(bounds)]
        if set(bounds[1:]) <= set(ends):
            cuts = [0, *(ends.index(end) + 1 for end in bounds[1:])]
            return [pieces[start:stop] for start, stop in pairwise(cuts)]
    tokens = [0, *accumulate(grid.n_tokens for grid in grids)]
    pooled = not of_channels and all(piece.n_queries == 1 for piece in pieces)
    if pooled and len(pieces) == tokens[-1]:
        return [pieces[start:stop] for start, stop in pairwise(tokens)]  # one piece per token
    counts = _in_proportion(pieces, wanted)
    if counts:
        return [pieces[start:stop] for start, stop in pairwise(counts)]
    each, rest = divmod(len(pieces), len(grids))
    alike = [p.n_keys for p in pieces] == [p.n_keys for p in pieces[:each]] * len(grids)
    if rest == 0 and each > 0 and alike:
        return [pieces[i * each : (i + 1) * each] for i in range(len(grids))]
    keys = ", ".join(str(piece.n_keys) for piece in pieces[:5])
    patches = ", ".join(str(len(grid.patch_places)) for grid in grids[:5])
    raise CaptureError(
        f"{pieces[0].name}: {len(pieces)} pieces of {keys}, ... keys cannot be assigned to "
        f"{len(grids)} images of {patches}, ... patches. Capture the samples one by one, or leave "
        "the tower out of Keep(towers=...)."
    )


def _in_proportion(pieces: Sequence[AttentionCall], wanted: Sequence[int]) -> list[int]:
    """Return the index of the first piece of each image, and the number of pieces.

    All pieces must have the same size and the same number of patches. Pieces with a class token
    have more positions than patches. Return an empty list if the pieces do not have this form.

    Args:
        pieces: The pieces, in order.
        wanted: Cumulative number of patches after each image.
    """
    sizes = {piece.n_keys for piece in pieces}
    per_piece, rest = divmod(wanted[-1], len(pieces))
    if rest or len(sizes) != 1 or not 0 < per_piece <= min(sizes):
        return []
    if any(end % per_piece for end in wanted):
        return []
    return [0, *(end // per_piece for end in wanted)]


def _bounds(wanted: Sequence[int], n_positions: int) -> list[int]:
    """Return the first position of each image, and the number of positions.

    Return an empty list if images do not have the same number of positions per patch.

    Args:
        wanted: Cumulative number of patches after each image.
        n_positions: Number of positions of all images.
    """
    n_patches = wanted[-1]
    if not n_patches or any(end * n_positions % n_patches for end in wanted):
        return []
    if n_positions % n_patches and n_patches % n_positions:
        return []
    return [0, *(end * n_positions // n_patches for end in wanted)]
