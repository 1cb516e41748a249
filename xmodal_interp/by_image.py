"""The calls of a vision tower (or a connector), image by image and video by video.

A tower may run once per image, once over a batch of images, frames, tiles or windows, or over
several images in one packed row. Pieces are counted in the order that they come; each image or
video has as many positions as its grid has patches, or the same multiple or part of it. A tower may
also read all images whole, and then the tiles of all in a second call.

Models read all images of a batch, then all of its videos, but for those whose family says
otherwise. However that is, the calls of a sample are numbered by its images, then by its videos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from xmodal_interp.attention import AttentionCall, joined, part_of, pieces_of, reordered, reread
from xmodal_interp.errors import CaptureError
from xmodal_interp.models import Family, ImageGrid, Prompt, VideoGrid
from xmodal_interp.vocabulary import AttentionKind, Tower

Layer = tuple[Tower, AttentionKind, int]


@dataclass(frozen=True, eq=False)
class Visual:
    """An image or a video of a batch.

    Attributes:
        sample: Which sample it is of.
        number: Its number among the images of the sample, then its videos.
        grid: Where its tokens and patches are.
        position: Its first position in the prompt; 0 where it is not in the sequence.
    """

    sample: int
    number: int
    grid: ImageGrid | VideoGrid
    position: int

    @property
    def is_video(self) -> bool:
        """Whether it is a video."""
        return isinstance(self.grid, VideoGrid)


def visuals_of(prompts: Sequence[Prompt], *, in_order: bool) -> list[Visual]:
    """What a model reads, in the order that it does.

    Args:
        prompts: The prompts of a batch.
        in_order: Whether as the prompts have it, or all images, then all videos.
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
    calls: Sequence[AttentionCall],
    prompts: Sequence[Prompt],
    family: Family,
    orders: Mapping[str, Sequence[Tensor]] | None = None,
    tiles: Sequence[int] | None = None,
    windows: Mapping[str, int] | None = None,
) -> dict[Layer, list[dict[int, AttentionCall]]]:
    """The calls of every layer that reads images or sounds, shared out among the samples.

    Args:
        calls: All calls of a batch, in order; what a tower reads again for each new token counts
            once.
        prompts: The prompts of the batch.
        family: What is known of the model's type.
        orders: Modules that read patches in another order: for each picture of the images, then of
            the videos, ``[patch]``, which patch stands at each position.
        tiles: How many tiles of each image are read behind all images, if they are.
        windows: Blocks that cut pictures into square windows, and the side of these in patches.

    Returns:
        For each layer and sample, its calls by the numbers of its images, then of its videos.
        Where there are none, what ran is call 0 of each sample.

    Raises:
        CaptureError: Pieces that cannot be shared out.
    """
    visuals = visuals_of(prompts, in_order=family.in_order)
    towers: dict[Layer, list[dict[int, AttentionCall]]] = {}
    for key, stream in _layers(_first_reading(calls)).items():
        if key[0] in ("language", "other"):
            continue
        read = _read_by(stream[0].module, visuals, family)
        grids, module = [each.grid for each in read], stream[0].module
        told = next((of for at, of in (orders or {}).items() if module.startswith(f"{at}.")), None)
        in_module = None if told is None else _orders_of(grids, told)
        shares = calls_by_image(stream, grids, in_module, tiles)
        side = (windows or {}).get(module.rpartition(".")[0])
        if side is not None and read and key[1] != "channel":
            pairs = zip(shares, read, strict=True)
            shares = [_without_windows(call, each.grid, side) for call, each in pairs]
        towers[key] = [{} for _ in prompts]
        for visual, call in zip(read, shares, strict=bool(read)):
            towers[key][visual.sample][visual.number] = replace(call, call=visual.number)
        if not read:
            towers[key] = [{0: shares[0]} for _ in prompts]
    return towers


def _orders_of(
    grids: Sequence[ImageGrid | VideoGrid], orders: Sequence[Tensor]
) -> Sequence[Tensor]:
    """The orders of images and videos, from those of the pictures that each is made of."""
    counts = [len(grid.patch_places) for grid in grids]
    if sum(counts) != sum(map(len, orders)):
        return orders
    starts = accumulate(map(len, orders), initial=0)
    whole = torch.cat([order + start for order, start in zip(orders, starts, strict=False)])
    starts = accumulate(counts, initial=0)
    parts = whole.split(counts)
    return [part - start for part, start in zip(parts, starts, strict=False)]


def _without_windows(call: AttentionCall, grid: ImageGrid | VideoGrid, side: int) -> AttentionCall:
    """A call over windows with its positions in the order of the grid's patches.

    What windows are padded with is left out, which probabilities allow, and queries and keys do
    not. A call that is about other patches than the grid's stays as it is.

    Args:
        call: The windows of each picture row by row, one picture after the other.
        grid: Its pictures are of one size.
        side: Of a window, patches.
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


def _first_reading(calls: Sequence[AttentionCall]) -> Sequence[AttentionCall]:
    """The calls before a tower reads again what it read before the language model did.

    Without a cache, a language model reads the whole prompt again for each new token, and the
    towers with it, unless their features are kept.

    Raises:
        CaptureError: With a cache, a tower ran again.
    """
    lengths = {key: [call.n_queries for call in of] for key, of in _layers(calls).items()}
    again = any(key[0] == "language" and reread(of) for key, of in lengths.items())
    heard: set[Layer] = set()
    language_has_begun = False
    for number, call in enumerate(calls):
        key = call.tower, call.kind, call.layer
        if call.tower == "language":
            language_has_begun = True
        elif language_has_begun and key in heard and call.tower != "other":
            if again:
                return calls[:number]
            raise CaptureError(
                f"{call.name} ran again while the language model generated with a cache. Something "
                "else than generate runs parts of the model, such as a logits processor: give that "
                "a copy of the model (copy.deepcopy)."
            )
        heard.add(key)
    return calls


def _layers(calls: Sequence[AttentionCall]) -> dict[Layer, list[AttentionCall]]:
    """The calls of each layer, in order."""
    layers: dict[Layer, list[AttentionCall]] = {}
    for call in calls:
        layers.setdefault((call.tower, call.kind, call.layer), []).append(call)
    return layers


def _read_by(module: str, visuals: list[Visual], family: Family) -> list[Visual]:
    """Which of the images and videos a module reads."""
    if family.video_tower is None:
        return visuals
    of_videos = family.video_tower in module.split(".")
    return [each for each in visuals if each.is_video == of_videos]


def calls_by_image(
    stream: Sequence[AttentionCall],
    grids: Sequence[ImageGrid | VideoGrid],
    orders: Sequence[Tensor] | None = None,
    tiles: Sequence[int] | None = None,
) -> list[AttentionCall]:
    """One call per image or video, of one layer; ``call`` is its place in the order.

    Args:
        stream: The layer's calls, in order.
        grids: The grids of all images and videos of the batch, in the order that they are read.
        orders: For each of them ``[patch]``, which patch stands at each position of the tower, if
            not in order.
        tiles: How many tiles of each image come in a second call, behind all images; None if each
            image is read as one.

    Raises:
        CaptureError: Pieces that cannot be shared out among several.
    """
    shares = None if tiles is None else _behind_wholes(stream, tiles)
    if shares is None:
        shares = _shares([piece for call in stream for piece in pieces_of(call)], grids)
    calls = []
    for number, share in enumerate(shares):
        call = joined(share)
        square = call.n_queries == call.n_keys and call.kind != "channel"
        if orders and square and call.n_keys == len(orders[number]):
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
    pieces: Sequence[AttentionCall], grids: Sequence[ImageGrid | VideoGrid]
) -> list[Sequence[AttentionCall]]:
    """The pieces of each image or video."""
    if len(grids) <= 1:
        return [pieces]
    ends = list(accumulate(piece.n_keys for piece in pieces))
    wanted = list(accumulate(len(grid.patch_places) for grid in grids))
    of_channels = pieces[0].kind == "channel"  # their number says nothing about patches
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
        return [pieces[start:stop] for start, stop in pairwise(tokens)]  # each pools its patches
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
        "The calls of a tower must be those of its images: pieces that add up to the patches of "
        f"each, or as many alike for each. {pieces[0].name}: {len(pieces)} pieces of {keys}, ... "
        f"keys, for {len(grids)} images of {patches}, ... patches. Capture the samples one by one, "
        "or leave the tower out."
    )


def _in_proportion(pieces: Sequence[AttentionCall], wanted: Sequence[int]) -> list[int]:
    """The first piece of each image, and the end, if pieces are alike, with as many patches each.

    Tiles with a class token each have more positions than patches. Empty if they are no such tiles.

    Args:
        pieces: In order.
        wanted: The patches of all images up to each.
    """
    sizes = {piece.n_keys for piece in pieces}
    per_piece, rest = divmod(wanted[-1], len(pieces))
    if rest or len(sizes) != 1 or not 0 < per_piece <= min(sizes):
        return []
    if any(end % per_piece for end in wanted):
        return []
    return [0, *(end // per_piece for end in wanted)]


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
