"""Compare the boxes that a geometry rule gives with boxes measured by test images.

``models.geometry.probing`` measures which pixels of an image each processed value shows, without
the rule. Two kinds of boxes are compared, each at several image sizes:

* Patches: the processed pixels are cut into as many squares as the rule has patches.
* Tokens: each token is one patch, or a block of patches, as for a type without a family record.

The correspondence (which tensor, and the side of a square) must be the same at all sizes. If there
is no such correspondence, the boxes are not compared.

Two limits of this method determine the tolerance:

* The test images have 224 levels of brightness, so that a level is a length in pixels. A processor
  that rounds several times shifts a measured box by up to a level.
* Overlapping convolutions of a model shift boxes by up to half a token, which the processed pixels
  do not show. If a model has some, half a measured box is added to the tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import nn
from transformers import PreTrainedModel

from xmodal_interp.errors import GeometryError
from xmodal_interp.models import VLM, ImageGrid
from xmodal_interp.models.geometry.grid import NOWHERE
from xmodal_interp.models.geometry.probed_tokens import tokens_of
from xmodal_interp.models.geometry.probing import (
    HIGHEST,
    LOWEST,
    Patches,
    Pixels,
    patches_of,
    pixels_of,
    test_images,
)
from xmodal_interp.models.towers import declared_tower

LARGEST = 2**20  # px; a larger image is shrunk, because seven copies of its pixels are held
_OTHER = (140, 300)  # a portrait, so that boxes are compared at several aspect ratios

Way = tuple[Any, ...]


@dataclass(frozen=True)
class BoxGap:
    """The largest difference between boxes of a rule and measured boxes, relative to its limit.

    Attributes:
        what: ``"patch"`` or ``"token"``.
        size: Width and height of the test image, px.
        index: Index of the patch or token.
        box: The part of the rule's box inside the image, px; NaN if the rule gives no box.
        measured: The part of the measured box inside the image, px; NaN if its pixels are padding.
        distance: The largest distance of an edge, px; infinite if only one of the boxes exists.
        limit: The tolerance of that edge, px.
    """

    what: str
    size: tuple[int, int]
    index: int
    box: tuple[float, ...]
    measured: tuple[float, ...]
    distance: float
    limit: float

    @property
    def agrees(self) -> bool:
        """Whether the distance is within the tolerance."""
        return self.distance <= self.limit

    @property
    def ratio(self) -> float:
        """Distance divided by tolerance."""
        return self.distance / self.limit


@dataclass(frozen=True)
class MeasuredBoxes:
    """The comparison of a rule's boxes with measured ones.

    Attributes:
        gaps: The largest difference at each size, of patches and of tokens.
        reasons: Why patches or tokens could not be compared, by ``"patch"`` and ``"token"``.
    """

    gaps: tuple[BoxGap, ...]
    reasons: Mapping[str, str]


def compared_boxes(vlm: VLM, prompt: str, sizes: Sequence[tuple[int, int]]) -> MeasuredBoxes:
    """Compare the boxes of the rule with measured ones, on test images of some sizes.

    The processor runs seven times for each size; the model does not run.

    Args:
        vlm: Model and processor; its family has a geometry rule.
        prompt: A question about one image.
        sizes: Widths and heights, px. Larger ones are shrunk, and a small portrait is added.

    Raises:
        GeometryError: The rule does not fit the inputs for a test image.
        InputError: The processor does not accept a size.
    """
    half = 0.5 if _overlapping_convolutions(vlm.model) else 0.0
    ways: dict[str, list[dict[Way, BoxGap]]] = {"patch": [], "token": []}
    reasons: dict[str, str] = {}
    for size in dict.fromkeys((*map(_shrunk, sizes), _OTHER)):
        prepared = {
            name: vlm.prepare([[image]], [prompt]) for name, image in test_images(size).items()
        }
        grids = [prompts[0].grids[0] for _, prompts in prepared.values()]
        try:
            _refuse_content(grids)
            found = pixels_of({name: inputs for name, (inputs, _) in prepared.items()}, size)
        except GeometryError as error:
            return MeasuredBoxes((), dict.fromkeys(ways, str(error)))
        for what, of_size in ways.items():
            of_size.append(dict(_gaps(what, found, grids[0], half)))
            if not of_size[-1] and what not in reasons:
                reasons[what] = _reason(what, found, grids[0])
    gaps: list[BoxGap] = []
    for what, by_size in ways.items():
        same = set(by_size[0]).intersection(*by_size)
        if same:
            reasons.pop(what, None)
            gaps += min(
                ([each[way] for each in by_size] for way in same),
                key=lambda of_way: max(gap.ratio for gap in of_way),
            )
        elif what not in reasons:
            reasons[what] = f"{_PLURAL[what]} correspond to other pixels at another image size"
    return MeasuredBoxes(tuple(gaps), reasons)


_PLURAL = {"patch": "patches", "token": "tokens"}


def _shrunk(size: tuple[int, int]) -> tuple[int, int]:
    """Return a size with at most ``LARGEST`` pixels and the same aspect ratio."""
    scale = min(1.0, (LARGEST / (size[0] * size[1])) ** 0.5)
    width, height = (max(1, int(length * scale)) for length in size)
    return width, height


def _refuse_content(grids: Sequence[ImageGrid]) -> None:
    """Raise GeometryError if images of one size have different boxes."""
    first = grids[0]
    for grid in grids[1:]:
        for name in ("boxes", "patch_boxes"):
            if not np.array_equal(getattr(first, name), getattr(grid, name), equal_nan=True):
                raise GeometryError("the boxes depend on what the image shows")


def _gaps(
    what: str, found: Sequence[Pixels], grid: ImageGrid, half: float
) -> Iterator[tuple[Way, BoxGap]]:
    """Yield the ways in which boxes of the rule correspond to measured ones, and the gap of each.

    Args:
        what: ``"patch"`` or ``"token"``.
        found: The tensors of pixels.
        grid: The grid of the rule.
        half: The part of a box that is added to the tolerance.
    """
    boxes, on_grid = _of_rule(what, grid)
    if not on_grid.any():
        return
    pairs = _patch_pairs if what == "patch" else _token_pairs
    for way, measured, index in pairs(found, boxes, on_grid):
        kept = on_grid[index]
        index, measured = index[kept], measured[kept]
        yield way, _gap(what, found[0].size, index, boxes[index], measured, half)


def _of_rule(what: str, grid: ImageGrid) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes of patches or tokens, and whether each has a row and column."""
    if what == "token":
        return np.asarray(grid.boxes, dtype=float), grid.places_by_view[:, 0] != NOWHERE
    on_grid = grid.patch_places[:, 0] != NOWHERE
    if grid.thumbnail is not None:
        on_grid = on_grid | (grid.thumbnail.patch_places[:, 0] != NOWHERE)
    given = grid.patch_boxes if grid.patch_boxes is not None else np.empty((0, 4))
    boxes = np.asarray(given, dtype=float).reshape(-1, 4)
    return boxes, on_grid[: len(boxes)]


Pairs = Iterator[tuple[Way, Float[np.ndarray, "box 4"], np.ndarray]]
"""A correspondence, the measured boxes, and the indices of the boxes of the rule."""


def _patch_pairs(found: Sequence[Pixels], boxes: np.ndarray, on_grid: np.ndarray) -> Pairs:
    """Yield correspondences of the patches of a rule with patches of processed pixels.

    They are in the same order. Patches of padding, and positions without a box, may be left out.
    """
    known = np.isfinite(boxes).all(1)
    groups = {"all": list(found), **({p.name: [p] for p in found} if len(found) > 1 else {})}
    for name, group in groups.items():
        sides: Sequence[int | None] = [None]  # the processor returns patches
        if any(pixels.in_tiles for pixels in group):
            counts = {int(n) for n in (known.sum(), on_grid.sum(), len(boxes))}
            sides = sorted({side for n in counts for side in _sides(group, n)})
        for side in sides:
            try:
                parts = [patches_of(pixels, side) for pixels in group]
            except GeometryError:
                continue
            measured = np.concatenate([part.boxes for part in parts])
            shown = np.isfinite(measured).all(1)
            in_use = np.concatenate([_of_used_tiles(part) for part in parts])
            for ours, theirs in ((known, shown), (on_grid, in_use), (known | True, shown | True)):
                if ours.any() and ours.sum() == theirs.sum():
                    yield (name, side), measured[theirs], np.flatnonzero(ours)
                    break


def _of_used_tiles(patches: Patches) -> np.ndarray:
    """Return whether each patch is in a tile that shows a part of the image."""
    return np.isin(patches.tiles, patches.tiles[patches.views != NOWHERE])


def _sides(group: Sequence[Pixels], n_patches: int) -> list[int]:
    """Return the sides of squares of which as many fit into the tiles as there are patches.

    If the squares of one side fill the tiles, it is the only one. Tiles of padding have no patches.
    """
    if not n_patches or not all(pixels.in_tiles for pixels in group):
        return []
    tiles = []
    for pixels in group:
        x, _ = pixels.tiles
        n_tiles = int(np.isfinite(x).any(axis=(1, 2)).sum())
        tiles.append((n_tiles, x.shape[1], x.shape[2]))
    largest = min(min(height, width) for _, height, width in tiles)
    sides = [
        side
        for side in range(1, largest + 1)
        if sum(n * (height // side) * (width // side) for n, height, width in tiles) == n_patches
    ]
    filling = [s for s in sides if all(h % s == 0 and w % s == 0 for _, h, w in tiles)]
    return filling[:1] or sides


def _token_pairs(found: Sequence[Pixels], boxes: np.ndarray, on_grid: np.ndarray) -> Pairs:
    """Yield the correspondence of tokens with blocks of patches, if there is one.

    Tokens whose pixels are all padding may be left out.
    """
    for ours in (on_grid, np.isfinite(boxes).all(1)):
        try:
            cells, way = tokens_of(found, int(ours.sum()))
        except GeometryError:
            continue
        yield way, cells.boxes, np.flatnonzero(ours)
        return


def _gap(
    what: str,
    size: tuple[int, int],
    index: np.ndarray,
    boxes: Float[np.ndarray, "box 4"],
    measured: Float[np.ndarray, "box 4"],
    half: float,
) -> BoxGap:
    """Return the largest difference of an edge, relative to its limit.

    Only the parts of boxes inside the image are compared, because padding next to the image has no
    measured position. If only the rule or only the measurement gives a box, it must overlap the
    image by less than the tolerance.
    """
    level = np.tile(np.array(size) / (HIGHEST - LOWEST), 2)
    sized = np.where(np.isnan(measured), boxes, measured)
    limits = level + half * np.nan_to_num(np.tile(sized[:, 2:] - sized[:, :2], 2))
    boxes, measured, sized = (
        np.clip(each, 0, np.tile(size, 2)) for each in (boxes, measured, sized)
    )
    distance = np.abs(boxes - measured)
    only_one = np.isnan(distance).any(1)
    seen = (sized[:, 2:] - sized[:, :2] >= limits[:, :2]).all(1)
    distance[only_one] = np.where(seen[only_one, None], np.inf, 0)
    ratio = distance / limits
    if (ratio[~only_one] > 1).any():
        ratio[only_one] = 0  # a distance in pixels shows more
    worst, edge = np.unravel_index(int(ratio.argmax()), ratio.shape)
    return BoxGap(
        what,
        size,
        int(index[worst]),
        tuple(float(x) for x in boxes[worst]),
        tuple(float(x) for x in measured[worst]),
        float(distance[worst, edge]),
        float(limits[worst, edge]),
    )


def _reason(what: str, found: Sequence[Pixels], grid: ImageGrid) -> str:
    """Return why no boxes correspond."""
    _, on_grid = _of_rule(what, grid)
    if not on_grid.any():
        return f"the rule gives {_PLURAL[what]} no rows and columns"
    shapes = " or ".join(f"{pixels.name} of shape {list(pixels.x.shape)}" for pixels in found)
    return f"the {int(on_grid.sum())} {_PLURAL[what]} do not correspond to equal blocks of {shapes}"


def _overlapping_convolutions(model: nn.Module) -> bool:
    """Return whether the model has strided convolutions of images whose kernels overlap."""
    audio = [
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and name and declared_tower(module) == "audio"
    ]
    return any(
        isinstance(module, (nn.Conv2d, nn.Conv3d))
        and module.kernel_size[-1] > module.stride[-1] > 1
        for name, module in model.named_modules()
        if not any(name.startswith(f"{each}.") for each in audio)
    )
