"""Measure the boxes of patches by passing test images through an image processor.

Resizing, cropping, padding, tiling and normalising are linear: each processed value is a weighted
sum of pixels plus a constant. A black and a white image show which values depend on the image. An
image whose brightness rises from left to right then gives the mean column of the pixels of each
value, and one whose brightness rises from top to bottom the mean row. Together, the values of a
patch give its box in the original image, for any processor, without its settings.

Brightness has only 256 levels. Each ramp is therefore passed with its negative, and its channels
are rounded up at different fractions; the mean over a patch is exact to a small part of a level.

A model type without a family record gets its geometry this way: see ``probed_tokens``. Records
have rules, because a rule does not run the processor seven more times for each image. The doctor
compares the boxes of a rule with the measured ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.grid import NOWHERE

Process = Callable[[Image.Image], Mapping[str, Any]]
"""``image -> outputs of the processor``."""

LOWEST, HIGHEST = 16, 239
"""The darkest and the brightest level of a ramp. Resampling may exceed the levels of its input,
and levels below 0 and above 255 would be clipped."""
CHANNELS = 3
OF_TILES, OF_PATCHES = 1.1, 1.3
"""Smallest ratio between the lengths that a pixel shows in two views, measured over whole tiles or
in single patches. In a patch at an edge of the image, it is measured up to a fifth too small."""
MOST_LEVELS = 5
"""Largest difference of a linear processor from its linear prediction, in levels of brightness,
because it may round several times."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """A tensor of processed pixels.

    Attributes:
        name: Its name among the outputs of the processor.
        size: Width and height of the original image, px.
        x: Mean column of the pixels of each value, px; NaN for values of padding.
        y: Mean row of the pixels of each value, px; NaN for values of padding.
    """

    name: str
    size: tuple[int, int]
    x: np.ndarray
    y: np.ndarray

    @property
    def in_tiles(self) -> bool:
        """Whether the last axes are channel, row and column, or row, column and channel.

        Otherwise the last axis holds all values of a patch.
        """
        return self.x.ndim > 3 and CHANNELS in (self.x.shape[-3], self.x.shape[-1])

    @property
    def tiles(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean column and row of each pixel of the tiles, ``[tile, row, col]``."""
        parts = [
            _mean(values if values.shape[-3] != CHANNELS else np.moveaxis(values, -3, -1), -1)
            for values in (self.x, self.y)
        ]
        x, y = (part.reshape(-1, *part.shape[-2:]) for part in parts)
        return x, y


@dataclass(frozen=True, eq=False)
class Patches:
    """The patches of a tensor of processed pixels, in its order.

    Attributes:
        boxes: ``(x0, y0, x1, y1)`` of each patch in pixels of the original image; NaN for padding.
        views: The view of each patch: 0 for patches that show the smallest part of the image, 1 for
            those of a thumbnail; ``NOWHERE`` for padding.
        places: Row and column of each patch in its view; ``NOWHERE`` for padding.
        tiles: Index of the tile of each patch.
    """

    boxes: Float[np.ndarray, "patch 4"]
    views: Int[np.ndarray, " patch"]
    places: Int[np.ndarray, "patch 2"]
    tiles: Int[np.ndarray, " patch"]


def probed(process: Process, size: tuple[int, int]) -> list[Pixels]:
    """Return the tensors of pixels that a processor returns.

    Args:
        process: Calls the processor for one image.
        size: Width and height of the image, px.

    Raises:
        GeometryError: The processed pixels are not linear in the pixels of the image.
    """
    return pixels_of({name: process(image) for name, image in test_images(size).items()}, size)


def pixels_of(outputs: Mapping[str, Mapping[str, Any]], size: tuple[int, int]) -> list[Pixels]:
    """Return the tensors of pixels among the outputs of a processor.

    Args:
        outputs: The outputs for each of the images of :func:`test_images`, by its name.
        size: Width and height of these images, px.

    Raises:
        GeometryError: The processed pixels are not linear in the pixels of the image.
    """
    black, white = outputs["black"], outputs["white"]
    found = []
    for name, value in black.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        arrays = {
            key: output[name].detach().float().cpu().numpy() for key, output in outputs.items()
        }
        if len({array.shape for array in arrays.values()}) > 1:
            raise GeometryError(
                f"The processor returns {name} of different shapes for images of one size, so its "
                "geometry depends on the content of the image. Turn off its cropping."
            )
        if not torch.equal(value, white[name]):
            found.append(_measured(name, arrays, size))
    if not found:
        raise GeometryError(
            "The processor returns the same pixels for a black and a white image, because it "
            "normalises each image by its own mean. Its geometry cannot be measured."
        )
    return found


def test_images(size: tuple[int, int]) -> dict[str, Image.Image]:
    """Return the images to process: constant ones, ramps with their negatives, and their mean.

    Args:
        size: Width and height, px.
    """
    width, height = size
    down, across = np.mgrid[:height, :width] + 0.5
    levels = (LOWEST + (HIGHEST - LOWEST) * share for share in (across / width, down / height))
    x, y = (level[..., None] for level in levels)
    phases = (np.arange(2 * CHANNELS) + 0.5) / (2 * CHANNELS)
    rounded = {
        "x": x + phases[::2],
        "-x": 256 - x - phases[::-2],
        "y": y + phases[::2],
        "-y": 256 - y - phases[::-2],
        "xy": (x + y) / 2 + phases[::2],
    }
    ramps = {name: Image.fromarray(level.astype(np.uint8)) for name, level in rounded.items()}
    return ramps | {name: Image.new("RGB", size, name) for name in ("black", "white")}


def _measured(name: str, arrays: Mapping[str, np.ndarray], size: tuple[int, int]) -> Pixels:
    """Return the mean column and row of each value of a tensor.

    Raises:
        GeometryError: The values are not linear in the pixels.
    """
    black, range_ = arrays["black"], arrays["white"] - arrays["black"]
    constant = np.abs(range_) < np.abs(range_).max() / 2 / CHANNELS
    with np.errstate(invalid="ignore", divide="ignore"):
        level = {key: 255 * (array - black) / range_ for key, array in arrays.items()}
    differences = (
        level["x"] + level["-x"] - 255,
        level["y"] + level["-y"] - 255,
        level["xy"] - (level["x"] + level["y"]) / 2,
    )
    worst = max(float(np.abs(each[~constant]).max()) for each in differences)
    if not worst <= MOST_LEVELS:
        raise GeometryError(
            f"The processor is not linear: {name} of the mean of two images differs by "
            f"{worst:.0f} of 255 levels from the mean of their {name}. It crops images to their "
            "content, or normalises each by its own mean, so its geometry cannot be measured."
        )
    x, y = (
        length * ((level[key] + 255 - level[f"-{key}"]) / 2 - LOWEST) / (HIGHEST - LOWEST)
        for key, length in zip("xy", size, strict=True)
    )
    x[constant] = y[constant] = np.nan
    return Pixels(name, size, x, y)


def patches_of(pixels: Pixels, side: int | None = None) -> Patches:
    """Return the patches of a tensor.

    Args:
        pixels: The tensor.
        side: Side of the patches that tiles are cut into, px; None if each tile is one patch. It
            has no effect if the processor returns patches.

    Raises:
        GeometryError: The values of a patch do not form columns of equal size.
    """
    if pixels.in_tiles:
        lines_x, lines_y, tiles = _cut(*pixels.tiles, side)
    else:
        flat = (values.reshape(-1, values.shape[-1]) for values in (pixels.x, pixels.y))
        lines_x, lines_y = (_lines(values, pixels.name) for values in flat)
        *outer, n_patches, _ = pixels.x.shape
        tiles = np.repeat(np.arange(prod(outer)), n_patches)
    steps = np.stack([_steps(lines_x), _steps(lines_y)], axis=1)
    known = np.isfinite(lines_x).any(axis=1) & np.isfinite(lines_y).any(axis=1)
    views = _views(steps, known, tiles)
    boxes = np.full((len(views), 4), np.nan)
    places = np.full((len(views), 2), NOWHERE)
    for view in range(max(views, default=NOWHERE) + 1):
        of = views == view
        for axis, lines in enumerate((lines_x, lines_y)):
            level = pixels.size[axis] / (HIGHEST - LOWEST)
            step = float(_typical(steps[None, of, axis])[0])
            places[of, 1 - axis], boxes[of, axis], boxes[of, axis + 2] = _placed(
                lines[of], step, level
            )
    return Patches(boxes, views, places, tiles)


def _cut(
    x: Float[np.ndarray, "tile row col"], y: Float[np.ndarray, "tile row col"], side: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut tiles into patches; return the mean of each of their columns and rows, and their tile."""
    n_tiles, *size = x.shape
    height, width = size if side is None else (side, side)
    rows, cols = size[0] // height, size[1] // width
    across, down = (
        values[:, : rows * height, : cols * width]
        .reshape(n_tiles, rows, height, cols, width)
        .swapaxes(2, 3)
        .reshape(-1, height, width)
        for values in (x, y)
    )
    return _mean(across, 1), _mean(down, 2), np.repeat(np.arange(n_tiles), rows * cols)


def _lines(values: Float[np.ndarray, "patch value"], name: str) -> Float[np.ndarray, "patch line"]:
    """Return the mean of each column (or each row) of pixels of flattened patches.

    The order of values in a patch is unknown. Values of one column are those with the same distance
    from the middle of the patch.

    Raises:
        GeometryError: The values do not form columns of equal size.
    """
    pixels = np.isfinite(values).any(axis=0)
    values = values[:, pixels]
    n_known = np.isfinite(values).sum(axis=1)
    full = values[n_known == n_known.max()]
    apart = full - full.mean(axis=1, keepdims=True)
    distance = (apart / apart.std(axis=1, keepdims=True)).mean(axis=0)
    order = np.argsort(distance)
    gaps = np.diff(distance[order])
    line = np.empty(len(order), dtype=int)
    line[order] = np.concatenate([[0], np.cumsum(gaps > gaps.max() / 2)])
    n_each = np.bincount(line)
    if len(set(n_each.tolist())) > 1:
        raise GeometryError(
            f"The values of {name} do not form rows and columns of pixels: the groups of values "
            f"that show the same part of a patch have {n_each.min()} to {n_each.max()} members."
        )
    return np.stack([_mean(values[:, line == each], 1) for each in range(len(n_each))], axis=1)


def _steps(lines: Float[np.ndarray, "patch line"]) -> Float[np.ndarray, " patch"]:
    """Return the length that a column of each patch shows, px; NaN if fewer than 2 are known."""
    half = max(lines.shape[1] // 2, 1)
    return _typical((lines[:, half:] - lines[:, :-half]) / half)


def _views(
    steps: Float[np.ndarray, "patch 2"],
    known: Bool[np.ndarray, " patch"],
    tiles: Int[np.ndarray, " patch"],
) -> Int[np.ndarray, " patch"]:
    """Group patches by the width and height that a pixel of them shows; smallest first.

    The patches of a tile are in one view, unless there is only one tile. A patch at the edge of the
    image may have only one known step; it is in the view whose step is most similar.
    """
    ratio = OF_PATCHES
    if len(set(tiles.tolist())) > 1:
        ratio, steps = OF_TILES, steps.copy()
        for tile in set(tiles.tolist()):
            steps[tiles == tile] = _typical(steps[tiles == tile].T)
    with np.errstate(divide="ignore", invalid="ignore"):  # squares that span the parts of a tile
        scale = np.log(steps)
    measured = known & np.isfinite(scale).all(axis=1)
    groups = np.stack([_groups(scale[measured, axis], np.log(ratio)) for axis in (0, 1)], axis=1)
    pairs, group = np.unique(groups, axis=0, return_inverse=True)
    middle = [np.median(scale[measured][group == each], axis=0) for each in range(len(pairs))]
    by_area = sorted(range(len(pairs)), key=lambda each: float(middle[each].sum()))
    views = np.full(len(tiles), NOWHERE)
    views[measured] = np.argsort(by_area)[group]
    for patch in np.flatnonzero(known & ~measured) if len(pairs) else ():
        apart = [np.nansum(np.abs(scale[patch] - middle[each])) for each in by_area]
        views[patch] = int(np.argmin(apart))
    return views


def _groups(values: Float[np.ndarray, " value"], gap: float) -> Int[np.ndarray, " value"]:
    """Number the groups of values that gaps separate, in ascending order."""
    order = np.argsort(values)
    groups = np.empty(len(values), dtype=int)
    groups[order] = np.cumsum(np.diff(values[order], prepend=-np.inf) > gap) - 1
    return groups


def _placed(
    lines: Float[np.ndarray, "patch line"], step: float, level: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rank, start and end of each patch of a view along one axis.

    If the middles of the patches are equally spaced, the spacing is measured over all of them.

    Args:
        lines: Mean coordinate of each column of each patch, px.
        step: Length that one column shows, px.
        level: Length of a level of brightness in the test image, px.
    """
    n = lines.shape[1]
    middles = _typical(lines - step * (np.arange(n) - (n - 1) / 2))
    order = np.argsort(middles)
    ranks = np.empty(len(order), dtype=int)
    ranks[order] = np.cumsum(np.diff(middles[order], prepend=-np.inf) > step * n / 4) - 1
    width = step * n
    if ranks.max():
        column = np.array([middles[ranks == rank].mean() for rank in range(ranks.max() + 1)])
        index = np.arange(len(column))
        i, j = np.triu_indices(len(column), k=max(1, len(column) // 2))
        slope = float(np.median((column[j] - column[i]) / (j - i)))
        start = float(np.median(column - slope * index))
        if (
            np.abs(column - start - slope * index).max() < max(width / 8, level / 2)
            and abs(slope / width - 1) < 1 / 16
        ):
            middles, width = start + slope * ranks, slope
    return ranks, middles - width / 2, middles + width / 2


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Return the mean of the values that are not NaN; NaN if all are NaN."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = np.where(known, values, 0).sum(axis=axis) / known.sum(axis=axis)
    return mean


def _typical(values: Float[np.ndarray, "row value"]) -> Float[np.ndarray, " row"]:
    """Return the mean of each row without its extremes and NaN; NaN for a row of NaN.

    Values at the edges of an image are extreme. A median would be rounded as the values are.
    """
    known = np.isfinite(values).any(axis=1)
    out = np.full(len(values), np.nan)
    if not known.any():
        return out
    lowest, highest = np.nanquantile(
        values[known], (0.2, 0.8), axis=1, keepdims=True, method="nearest"
    )
    within = (values[known] >= lowest) & (values[known] <= highest)
    out[known] = _mean(np.where(within, values[known], np.nan), 1)
    return out
