"""Verify the labels of patches and image tokens by changing pixels.

Positions are not mixed before the first attention layer of a tower. Two facts about the keys of
this layer are therefore compared with the labels:

* Vision tower: if one patch is painted white, the key of that patch changes most. This holds even
  if the tower reorders its patches inside its forward.
* Language tower: if the image is replaced by its negative, only keys of image tokens change.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from xmodal_interp.attention import AttentionCall
from xmodal_interp.capturing.vision_calls import towers_by_image
from xmodal_interp.errors import CaptureError
from xmodal_interp.hooks.attention_modules import layers_without_matrix
from xmodal_interp.hooks.recorder import Settings, record_with
from xmodal_interp.models import VLM, ImageGrid, Prompt
from xmodal_interp.verification._private import seeded

SIZES: tuple[tuple[int, int], ...] = ((644, 252), (224, 88))
"""Widths and heights of test images, px; the first is wider than the windows of most towers."""
MOST_PATCHES = 2048
N_PATCHES = 3
_SMALLEST = 4  # px; a smaller patch may disappear when the image is resized


@dataclass(frozen=True)
class PaintedPatch:
    """The result of painting one patch.

    Attributes:
        patch: Index of the painted patch among the positions of the vision tower.
        place: Row and column of the painted patch.
        found: Row and column of the position whose key changed most.
        box: Box of the painted patch, px.
        at_its_place: Whether the box of the found position contains the middle of the painted
            patch; True if no key changed.
    """

    patch: int
    place: tuple[int, int]
    found: tuple[int, int]
    box: tuple[float, ...]
    at_its_place: bool


@dataclass(frozen=True)
class Painted:
    """The result of painting several patches.

    Attributes:
        patches: One result per painted patch; empty if the keys could not be compared.
        unlabelled: Positions of the language tower that change with the image but are not labelled
            as image tokens; None if this could not be compared.
        reason: Why patches could not be compared; empty otherwise.
    """

    patches: tuple[PaintedPatch, ...] = ()
    unlabelled: tuple[int, ...] | None = None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class _Keys:
    """Keys of the first attention layers, ``[position, d]``."""

    vision: Tensor | None
    language: Tensor | None


def painted_patches(vlm: VLM, prompt: str, sizes: Sequence[tuple[int, int]] = SIZES) -> Painted:
    """Paint single patches of a test image, and find the positions that change.

    The model runs once on the image, once on its negative, and once for each of three patches.

    Args:
        vlm: Model and processor.
        prompt: A question.
        sizes: Widths and heights of images, px. The first size with at most 2,048 patches is used,
            or the last one if all have more.
    """
    picture, ready = _picture(vlm, prompt, sizes)
    plain = _first_keys(vlm, prompt, picture)
    negative = _first_keys(vlm, prompt, ImageOps.invert(picture))
    unlabelled = _unlabelled(vlm, ready, plain.language, negative.language)
    if not ready.grids:
        return Painted((), unlabelled, "the family has no rule for the places of patches")
    if plain.vision is None:
        reason = "the first layer of the vision tower has no key for each patch"
        return Painted((), unlabelled, reason)
    grid, results = ready.grids[0], []
    boxes = np.asarray(grid.patch_boxes, dtype=float).reshape(-1, 4)
    for patch in _chosen(grid, boxes, picture.size):
        other = _first_keys(vlm, prompt, _over(picture, boxes[patch]))
        if other.vision is not None:
            change = (plain.vision - other.vision).norm(dim=1).numpy()
            results.append(_compared(grid, patch, boxes, change))
    reason = "" if results else "no patch of the image is large enough to be painted"
    return Painted(tuple(results), unlabelled, reason)


def _picture(vlm: VLM, prompt: str, sizes: Sequence[tuple[int, int]]) -> tuple[Image.Image, Prompt]:
    """Return an image of random pixels, and its prompt."""
    noise = np.random.default_rng(0)
    for width, height in sizes:
        pixels = noise.integers(0, 120, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        _, (ready,) = vlm.prepare([[picture]], [prompt])
        if sum(len(grid.patch_places) for grid in ready.grids) <= MOST_PATCHES:
            break
    return picture, ready


def _chosen(
    grid: ImageGrid, boxes: Float[np.ndarray, "patch 4"], size: tuple[int, int]
) -> list[int]:
    """Return a few patches that are spread over the image and lie completely inside it."""
    x0, y0, x1, y1 = boxes.T
    whole = (x0 > -0.5) & (y0 > -0.5) & (x1 < size[0] + 0.5) & (y1 < size[1] + 0.5)
    large = np.minimum(x1 - x0, y1 - y0) >= _SMALLEST
    of_image = grid.patch_places[:, 0] >= 0
    paintable = np.flatnonzero(whole & large & of_image)
    if not len(paintable):
        return []
    steps = np.linspace(0, len(paintable) - 1, N_PATCHES + 2)[1:-1].round().astype(int)
    return sorted({int(patch) for patch in paintable[steps]})


def _over(picture: Image.Image, box: Float[np.ndarray, " 4"]) -> Image.Image:
    """Return the image with a box painted white, except a one-pixel border of a large box."""
    x0, y0, x1, y1 = (int(edge) for edge in box.round())
    edge = 1 if min(x1 - x0, y1 - y0) > 2 * _SMALLEST else 0
    other = picture.copy()
    other.paste((255, 255, 255), (x0 + edge, y0 + edge, x1 - edge, y1 - edge))
    return other


def _first_keys(vlm: VLM, prompt: str, picture: Image.Image) -> _Keys:
    """Return the keys of the first self-attention layer of the vision and language towers."""
    inputs, prompts = vlm.prepare([[picture]], [prompt])
    calls: list[AttentionCall] = []

    def keep(call: AttentionCall) -> None:
        if call.kind == "self" and call.k is not None and _is_first(call.module):
            calls.append(call)

    settings = Settings(towers=("vision", "language"), reduce=keep, refuse=False)
    with torch.no_grad(), record_with(settings, vlm.model):
        seeded(lambda: vlm.run(inputs))
    mixed = any(each.tower == "language" for each in layers_without_matrix(vlm.model))
    language = None if mixed else _of_language(calls)  # a convolution may precede the keys
    return _Keys(_of_vision(vlm, inputs, prompts, calls), language)


def _is_first(module: str) -> bool:
    """Return whether a module is in the first block of its stack; no attention runs before it."""
    return all(int(number) == 0 for number in re.findall(r"(?<=\.)\d+(?=\.|$)", module))


def _of_vision(
    vlm: VLM, inputs: dict[str, Any], prompts: Sequence[Prompt], calls: Sequence[AttentionCall]
) -> Tensor | None:
    """Return the keys of the image's positions in the first module that was called.

    None if the number of keys is not the number of patches.
    """
    if not prompts[0].grids:
        return None
    own = [call for call in calls if call.tower == "vision"]
    own = [call for call in own if call.module == own[0].module]
    try:
        layers = towers_by_image(vlm, inputs, prompts, own)
    except CaptureError:
        return None
    call = next((of_samples[0].get(0) for of_samples in layers.values()), None)
    n_patches = len(prompts[0].grids[0].patch_places)
    if call is None or call.k is None or call.n_samples != 1 or call.n_keys != n_patches:
        return None
    return call.k[0].transpose(0, 1).flatten(1).float().cpu()


def _of_language(calls: Sequence[AttentionCall]) -> Tensor | None:
    """Return the keys of the first module that was called.

    None if it was not called exactly once, with one sample.
    """
    own = [call for call in calls if call.tower == "language"]
    own = [call for call in own if call.module == own[0].module]
    if len(own) != 1 or own[0].k is None or own[0].n_samples != 1:
        return None
    return own[0].k[0].transpose(0, 1).flatten(1).float().cpu()


def _compared(
    grid: ImageGrid,
    patch: int,
    boxes: Float[np.ndarray, "patch 4"],
    change: Float[np.ndarray, " patch"],
) -> PaintedPatch:
    """Compare a painted patch with the position whose key changed most."""
    placed = np.isfinite(boxes).all(1)
    found = int(np.where(placed, change, -1).argmax())
    x0, y0, x1, y1 = boxes[found]
    middle = (boxes[patch, :2] + boxes[patch, 2:]) / 2
    inside = x0 <= middle[0] <= x1 and y0 <= middle[1] <= y1
    place, at = (tuple(int(n) for n in grid.patch_places[each]) for each in (patch, found))
    box = tuple(float(edge) for edge in boxes[patch])
    here = bool(inside) or not bool(change.any())
    return PaintedPatch(patch, (place[0], place[1]), (at[0], at[1]), box, here)


def _unlabelled(
    vlm: VLM, ready: Prompt, plain: Tensor | None, negative: Tensor | None
) -> tuple[int, ...] | None:
    """Return positions that change with the image but are not labelled as image tokens."""
    n_read = ready.n_encoder or len(ready.tokens)
    if not vlm.family.in_sequence or plain is None or negative is None:
        return None
    if plain.shape != negative.shape or len(plain) != n_read:
        return None
    changed = (plain != negative).any(-1).numpy()
    labelled = ready.tokens["kind"].eq("image").to_numpy(dtype=bool)[:n_read]
    return tuple(np.flatnonzero(changed & ~labelled).tolist())
