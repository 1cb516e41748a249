"""The rule for a model type without a family record: boxes measured with test images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isqrt
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import Cells, image_grid, nowhere
from xmodal_interp.models.geometry.grid import NOWHERE, ImageGrid, raster, unplaced
from xmodal_interp.models.geometry.probing import Patches, Pixels, patches_of, probed

MEASURED = (
    "Its model type has no family record. The boxes of image tokens were measured by passing test "
    "images through the processor; that tokens follow each other in the order of these boxes is an "
    "assumption."
)
TRIALS = ((340, 192), (140, 300))
"""Sizes of other images in which tokens must correspond to patches in the same way."""
N_KNOWN = 64
"""Largest number of image sizes whose grids are kept."""


@dataclass(frozen=True)
class ProbedTokens:
    """The geometry of a model type without a family record, measured with test images.

    The number of image tokens is that of the processor. If the processor returns tiles, each token
    is a square of a tile, row by row. If it returns patches, each token is one patch or the same
    number of them: consecutive patches that form a square, or squares of a raster of patches. The
    correspondence must be the same for images of other sizes. If no such correspondence exists, the
    tokens have no boxes, and ``reason`` states why.

    Two errors cannot be found: learned queries whose number is that of squares of patches, and
    convolutions that overlap, which shift boxes by up to half a token.

    Attributes:
        image_token: Configuration attribute that holds the id of image tokens.
    """

    image_token: str
    _known: dict[Any, ImageGrid] = field(default_factory=dict, repr=False, compare=False)

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """Return one grid per image."""
        token_id = getattr(config, self.image_token)
        settings = str(processor.image_processor), str(getattr(processor, "images_kwargs", None))
        grids = []
        for image in images:
            key = (*settings, image.size)
            if key not in self._known:
                while len(self._known) >= N_KNOWN:
                    self._known.pop(next(iter(self._known)))
                self._known[key] = _measured(processor, token_id, image.size)
            grids.append(self._known[key])
        counted, n_all = sum(grid.n_tokens for grid in grids), _n_tokens(inputs, token_id)
        if counted != n_all:
            raise GeometryError(
                f"The processor returned {n_all} image tokens for {len(images)} images together, "
                f"but {counted} for each of them alone. Pass one image at a time."
            )
        return grids


def _measured(processor: Any, token_id: int, size: tuple[int, int]) -> ImageGrid:
    """Return the grid of an image of this size; it has no boxes if they cannot be measured."""
    prompt = _prompt(processor, token_id)

    def process(image: Image.Image) -> Mapping[str, Any]:
        outputs: Mapping[str, Any] = processor(images=[[image]], text=[prompt], return_tensors="pt")
        return outputs

    n_tokens = _n_tokens(process(Image.new("RGB", size)), token_id)
    try:
        cells, ways = nowhere(0), set()
        for each in (*TRIALS, size):
            n_of_size = _n_tokens(process(Image.new("RGB", each)), token_id)
            cells, way = tokens_of(probed(process, each), n_of_size)
            ways.add(way)
        if len(ways) > 1:
            raise GeometryError(
                f"The {n_tokens} image tokens correspond to blocks of patches, but the blocks "
                "differ between images of different sizes."
            )
    except GeometryError as error:
        why = f"Its model type has no family record with a geometry rule. {error}"
        return unplaced(size, n_tokens, why)
    return replace(image_grid(size, [cells], []), reason=MEASURED)


def _prompt(processor: Any, token_id: int) -> str:
    """Return a prompt about one image: by the chat template if there is one, else a placeholder."""
    if getattr(processor, "chat_template", None) is not None:
        content = [{"type": "image"}, {"type": "text", "text": "?"}]
        return str(processor.apply_chat_template([{"role": "user", "content": content}]))
    mark = getattr(processor, "image_token", None)
    return str(processor.tokenizer.convert_ids_to_tokens(token_id) if mark is None else mark)


def _n_tokens(inputs: Mapping[str, Any], token_id: int) -> int:
    return int((inputs["input_ids"] == token_id).sum())


def tokens_of(found: Sequence[Pixels], n_tokens: int) -> tuple[Cells, tuple[str, int]]:
    """Return the image tokens as blocks of patches of the first tensor of pixels that fits.

    Returns:
        The tokens, and the name of the tensor with the side of a token's square in a tile, or the
        number of its patches.

    Raises:
        GeometryError: There is no number of patches for each token.
    """
    problems = []
    for pixels in found:
        side = _side(pixels, n_tokens)
        patches = patches_of(pixels, side)
        for groups in _groupings(patches, n_tokens):
            if _compact(patches, groups):
                return _grouped(patches, groups), (pixels.name, side or groups.shape[1])
        problems.append(f"{pixels.name} of shape {list(pixels.x.shape)}")
    raise GeometryError(
        f"The {n_tokens} image tokens do not correspond to equal blocks of {' or '.join(problems)}."
    )


def _side(pixels: Pixels, n_tokens: int) -> int | None:
    """Return the side of the squares into which tiles are divided, one per token, or None."""
    if not pixels.in_tiles:
        return None
    x, _ = pixels.tiles
    _, height, width = x.shape
    n_pixels = int(np.isfinite(x).any(axis=(1, 2)).sum()) * height * width
    side = isqrt(n_pixels // max(n_tokens, 1))
    fits = side > 1 and side**2 * n_tokens == n_pixels and not (height % side or width % side)
    return side if fits else None


def _groupings(patches: Patches, n_tokens: int) -> Iterator[Int[np.ndarray, "token patch"]]:
    """Yield ways to give each token the same number of patches, ``[token, patch]``.

    Tiles of padding have no tokens. Single patches of padding may have none.
    """
    of_image = patches.views != NOWHERE
    for kept in (np.isin(patches.tiles, patches.tiles[of_image]), of_image):
        index = np.flatnonzero(kept)
        merge, rest = divmod(len(index), max(n_tokens, 1))
        if rest or not merge:
            continue
        yield index.reshape(n_tokens, merge)
        yield from _in_blocks(patches, index, merge)


def _in_blocks(
    patches: Patches, index: Int[np.ndarray, " patch"], merge: int
) -> Iterator[Int[np.ndarray, "token patch"]]:
    """Yield square blocks of patches, row by row, if the patches of each tile are in raster order.

    Tiles of one patch each are one raster together.
    """
    side, blocks = isqrt(merge), []
    tiles = patches.tiles[index]
    for tile in np.unique(tiles) if len(set(tiles.tolist())) < len(index) else (None,):
        own = index if tile is None else index[tiles == tile]
        places = patches.places[own] - patches.places[own].min(axis=0)
        rows, cols = (places.max(axis=0) + 1).tolist()
        if side**2 != merge or rows % side or cols % side:
            return
        if not np.array_equal(places, raster(rows, cols)):
            return
        shaped = own.reshape(rows // side, side, cols // side, side)
        blocks.append(shaped.swapaxes(1, 2).reshape(-1, merge))
    yield np.concatenate(blocks)


def _compact(patches: Patches, groups: Int[np.ndarray, "token patch"]) -> bool:
    """Return whether the patches of each token form a square, and no two tokens share a place."""
    seen = set()
    for group in groups:
        views = {int(view) for view in patches.views[group]} - {NOWHERE}
        if not views:
            continue
        places = patches.places[group[patches.views[group] != NOWHERE]]
        first, last = places.min(axis=0), places.max(axis=0)
        place = (*views, *first.tolist())
        if len(views) > 1 or max(views) > 1 or (last - first >= isqrt(len(group))).any():
            return False
        if place in seen:
            return False
        seen.add(place)
    return bool(seen)


def _grouped(patches: Patches, groups: Int[np.ndarray, "token patch"]) -> Cells:
    """Return one cell per group of patches."""
    views = patches.views[groups].max(axis=1)
    places = np.full((len(groups), 2), NOWHERE)
    boxes = np.full((len(groups), 4), np.nan)
    for token, group in enumerate(groups):
        own = group[patches.views[group] != NOWHERE]
        if len(own):
            places[token] = patches.places[own].min(axis=0)
            low, high = patches.boxes[own, :2].min(axis=0), patches.boxes[own, 2:].max(axis=0)
            boxes[token] = *low, *high
    for view in (0, 1):
        for axis in (0, 1):
            own = views == view
            places[own, axis] = np.unique(places[own, axis], return_inverse=True)[1]
    tiles = np.where(views == 0, patches.tiles[groups[:, 0]], NOWHERE)
    numbers, tiles[views == 0] = np.unique(tiles[views == 0], return_inverse=True)
    if len(numbers) in (1, (views == 0).sum()):
        tiles[:] = NOWHERE
    return Cells(places, boxes, tiles, views == 1)
