"""Verify the labels of patches and image tokens by changing pixels.

Positions are not mixed before the first attention layer of a tower. Two facts about the keys of
this layer are therefore compared with the labels:

* Vision tower: if one patch is painted white, the key of that patch changes most. This holds even
  if the tower reorders its patches inside its forward.
* Language tower: if the image is replaced by its negative, only keys of image tokens change.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageOps
from torch import Tensor

from xmodal_interp.attention import AttentionCall
from xmodal_interp.capturing.vision_calls import towers_by_image
from xmodal_interp.errors import InputError
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
        found: Row and column of the position whose key changed most; None if no key changed.
        box: Box of the painted patch, px.
        at_its_place: Whether the box of the found position contains the middle of the painted
            patch.
    """

    patch: int
    place: tuple[int, int]
    found: tuple[int, int] | None
    box: tuple[float, ...]
    at_its_place: bool


@dataclass(frozen=True)
class Painted:
    """The result of painting several patches.

    Attributes:
        size: Width and height of the test image, px.
        patches: One result per painted patch; empty if the keys could not be compared.
        reason: Why patches could not be compared; empty otherwise.
        misfit: How the geometry rule contradicts the model; empty if it does not.
        unlabelled: Positions of the language tower that change with the image but are not labelled
            as image tokens; None if this could not be compared.
        unlabelled_reason: Why it could not be compared; empty otherwise.
    """

    size: tuple[int, int]
    patches: tuple[PaintedPatch, ...] = ()
    reason: str = ""
    misfit: str = ""
    unlabelled: tuple[int, ...] | None = None
    unlabelled_reason: str = ""


@dataclass(frozen=True, eq=False)
class _Keys:
    """Keys of the first attention layers, and what is known about the others.

    Attributes:
        vision: Keys of the positions of the image, ``[position, d]``; None if they cannot be
            compared.
        reason: Why ``vision`` is None; empty otherwise.
        n_read: The numbers of positions that the layers of the vision tower read, by module.
        language: Keys of the language tower, ``[position, d]``; None if they cannot be compared.
        language_reason: Why ``language`` is None; empty otherwise.
    """

    vision: Tensor | None
    reason: str
    n_read: Mapping[str, int]
    language: Tensor | None
    language_reason: str


def painted_patches(vlm: VLM, prompt: str, sizes: Sequence[tuple[int, int]] = SIZES) -> Painted:
    """Paint single patches of a test image, and find the positions that change.

    The model runs once on the image, once on its negative, and once for each of three patches.

    Args:
        vlm: Model and processor.
        prompt: A question.
        sizes: Widths and heights of images, px. Of those that the processor accepts, the first with
            at most 2,048 patches is used, or the one with the fewest if all have more.

    Raises:
        GeometryError: The rule does not fit the inputs for the test image.
        InputError: The processor accepts none of the sizes.
    """
    picture, ready = _picture(vlm, prompt, sizes)
    plain = _first_keys(vlm, prompt, picture)
    negative = _first_keys(vlm, prompt, ImageOps.invert(picture))
    painted = Painted(picture.size, **_unlabelled(vlm, ready, plain, negative))
    grid = ready.grids[0]
    n_placed, rule = len(grid.patch_places), vlm.family.rule
    if n_placed == 0:
        reason = f"the geometry rule {rule} places no positions of the vision tower"
        return replace(painted, reason=reason)
    if plain.n_read and n_placed not in plain.n_read.values():
        return replace(painted, misfit=_misfit(rule, n_placed, plain.n_read))
    if plain.vision is None:
        return replace(painted, reason=plain.reason)
    boxes = np.asarray(grid.patch_boxes, dtype=float).reshape(-1, 4)
    if np.isfinite(boxes).all(1).any() and not _whole(boxes, picture.size).any():
        misfit = f"no box that the geometry rule {rule} gives to a patch lies inside the image"
        return replace(painted, misfit=misfit)
    results = []
    for patch in _chosen(grid, boxes, picture.size):
        other = _first_keys(vlm, prompt, _over(picture, boxes[patch]))
        if other.vision is None or other.vision.shape != plain.vision.shape:
            misfit = "the number of positions of the vision tower changes when a patch is painted"
            return replace(painted, misfit=misfit)
        change = (plain.vision - other.vision).norm(dim=1).numpy()
        results.append(_compared(grid, patch, boxes, change))
    reason = "" if results else f"no patch has a box at least {_SMALLEST} px wide and high"
    return replace(painted, patches=tuple(results), reason=reason)


def _misfit(rule: str, n_placed: int, n_read: Mapping[str, int]) -> str:
    """Return the message for a number of positions that no layer of the vision tower reads."""
    counts = list(dict.fromkeys(n_read.values()))
    read = " or ".join(map(str, counts[:3])) + (" or others" if len(counts) > 3 else "")
    return (
        f"the geometry rule {rule} places {n_placed} positions of the vision tower, but its layers "
        f"read {read} (the difference is often a class token)"
    )


def _picture(vlm: VLM, prompt: str, sizes: Sequence[tuple[int, int]]) -> tuple[Image.Image, Prompt]:
    """Return an image of random pixels, and its prompt."""
    noise = np.random.default_rng(0)
    found: list[tuple[int, Image.Image, Prompt]] = []
    for number, (width, height) in enumerate(sizes):
        pixels = noise.integers(0, 120, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        try:
            _, (ready,) = vlm.prepare([[picture]], [prompt])
        except InputError:  # the processor may refuse a size
            if number + 1 == len(sizes) and not found:
                raise
            continue
        n_patches = sum(len(grid.patch_places) for grid in ready.grids)
        found.append((n_patches, picture, ready))
        if n_patches <= MOST_PATCHES:
            break
    _, picture, ready = min(found, key=lambda each: each[0])
    return picture, ready


def _whole(
    boxes: Float[np.ndarray, "patch 4"], size: tuple[int, int]
) -> Bool[np.ndarray, " patch"]:
    """Return whether each box lies completely inside an image of this size; False without a box."""
    x0, y0, x1, y1 = boxes.T
    inside: np.ndarray = (x0 > -0.5) & (y0 > -0.5) & (x1 < size[0] + 0.5) & (y1 < size[1] + 0.5)
    return inside


def _chosen(
    grid: ImageGrid, boxes: Float[np.ndarray, "patch 4"], size: tuple[int, int]
) -> list[int]:
    """Return a few patches that are spread over the image and lie completely inside it."""
    x0, y0, x1, y1 = boxes.T
    large = np.minimum(x1 - x0, y1 - y0) >= _SMALLEST
    of_image = grid.patch_places[:, 0] >= 0
    paintable = np.flatnonzero(_whole(boxes, size) & large & of_image)
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
    n_read: Counter[str] = Counter()

    def keep(call: AttentionCall) -> None:
        if call.kind != "self":
            return
        if call.tower == "vision":
            n_read[call.module] += call.n_samples * call.n_keys
        if _is_first(call.module):
            calls.append(call)

    settings = Settings(towers=("vision", "language"), reduce=keep, refuse=False)
    with torch.no_grad(), record_with(settings, vlm.model):
        seeded(lambda: vlm.run(inputs))
    vision, reason = _of_vision(vlm, inputs, prompts, calls)
    language, language_reason = _of_language(vlm, calls)
    return _Keys(vision, reason, n_read, language, language_reason)


def _is_first(module: str) -> bool:
    """Return whether a module is in the first block of its stack; no attention runs before it."""
    return all(int(number) == 0 for number in re.findall(r"(?<=\.)\d+(?=\.|$)", module))


def _of_vision(
    vlm: VLM, inputs: dict[str, Any], prompts: Sequence[Prompt], calls: Sequence[AttentionCall]
) -> tuple[Tensor | None, str]:
    """Return the keys of the image's positions in the first module that was called.

    The second result is the reason if there are no keys that can be compared with the patches.
    """
    own = [call for call in calls if call.tower == "vision"]
    if not own:
        return None, "the first block of the vision tower has no self-attention"
    own = [call for call in own if call.module == own[0].module]
    name = own[0].module
    if any(call.k is None for call in own):
        return None, f"{name} gives probabilities only, and no keys"
    layers = towers_by_image(vlm, inputs, prompts, own)
    call = next(of_samples[0][0] for of_samples in layers.values())
    n_patches = len(prompts[0].grids[0].patch_places)
    if call.k is None or call.n_samples != 1 or call.n_keys != n_patches:
        return None, (
            f"{name}, the first attention of the vision tower, reads other positions than those "
            "that the geometry rule places"
        )
    return call.k[0].transpose(0, 1).flatten(1).float().cpu(), ""


def _of_language(vlm: VLM, calls: Sequence[AttentionCall]) -> tuple[Tensor | None, str]:
    """Return the keys of the first module that was called, or the reason why there are none."""
    if any(each.tower == "language" for each in layers_without_matrix(vlm.model)):
        return None, "layers of the language tower that are not attention mix positions"
    own = [call for call in calls if call.tower == "language"]
    own = [call for call in own if call.module == own[0].module]
    if len(own) != 1 or own[0].k is None or own[0].n_samples != 1:
        return None, "the first block of the language tower has no keys of one sample"
    return own[0].k[0].transpose(0, 1).flatten(1).float().cpu(), ""


def _compared(
    grid: ImageGrid,
    patch: int,
    boxes: Float[np.ndarray, "patch 4"],
    change: Float[np.ndarray, " patch"],
) -> PaintedPatch:
    """Compare a painted patch with the position whose key changed most."""
    placed = np.isfinite(boxes).all(1)
    row, col = (int(n) for n in grid.patch_places[patch])
    box = tuple(float(edge) for edge in boxes[patch])
    found = int(np.where(placed, change, -1).argmax())
    if not change[found] > 0:
        return PaintedPatch(patch, (row, col), None, box, at_its_place=False)
    x0, y0, x1, y1 = boxes[found]
    middle = (boxes[patch, :2] + boxes[patch, 2:]) / 2
    inside = bool(x0 <= middle[0] <= x1 and y0 <= middle[1] <= y1)
    at_row, at_col = (int(n) for n in grid.patch_places[found])
    return PaintedPatch(patch, (row, col), (at_row, at_col), box, inside)


def _unlabelled(vlm: VLM, ready: Prompt, plain: _Keys, negative: _Keys) -> dict[str, Any]:
    """Return the fields of :class:`Painted` about positions that are not labelled as image tokens.

    These are the positions that change with the image, or the reason why they are not known.
    """
    if not vlm.family.language:
        return {"unlabelled_reason": "the model has no language model"}
    if not vlm.family.in_sequence:
        reason = "images are read by cross-attention, so there are no image tokens"
        return {"unlabelled_reason": reason}
    one, other = plain.language, negative.language
    if one is None or other is None:
        return {"unlabelled_reason": plain.language_reason or negative.language_reason}
    n_read = ready.n_encoder or len(ready.tokens)
    if not len(one) == len(other) == n_read:
        reason = (
            f"the language tower reads {len(one)} positions of the image and {len(other)} of its "
            f"negative; {n_read} are labelled"
        )
        return {"unlabelled_reason": reason}
    changed = (one != other).any(-1).numpy()
    labelled = ready.tokens["kind"].eq("image").to_numpy(dtype=bool)[:n_read]
    return {"unlabelled": tuple(np.flatnonzero(changed & ~labelled).tolist())}
