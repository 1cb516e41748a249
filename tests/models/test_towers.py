"""Patch boxes match the pixels: painting the box of a patch changes the tower's output there most.

All positions are compared, in the order of the tower. The tower's attention is disabled.
"""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.families import RECORDS
from tests.helpers.pixel_changes import (
    QUERYING,
    TOWERS,
    fits,
    painted,
    textured,
    tower_outputs,
    vlm_of,
    with_options,
)
from xmodal_interp.models import VLM

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
SIZES = [(170, 96), (70, 150)]
OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("idefics2", {"do_image_splitting": True}),
    ("aria", {"split_image": True}),
    ("aria", {"split_image": True, "split_resolutions": [[735, 980], [980, 735]]}),
)
N_PATCHES = 6  # of each image


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("model_type", [*QUERYING, "inkling2", "nemotron_h_omni", "pi0"])
def test_a_painted_box_changes_its_own_patch(model_type: str, size: tuple[int, int]) -> None:
    paint_patches(vlm_of(model_type), size)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize(
    ("model_type", "options"), OPTIONS, ids=[f"{name}-{'-'.join(to)}" for name, to in OPTIONS]
)
def test_a_painted_box_changes_its_own_patch_with_other_options(
    model_type: str, options: dict[str, Any], size: tuple[int, int]
) -> None:
    assert paint_patches(with_options(vlm_of(model_type), options), size) > 1


def paint_patches(vlm: VLM, size: tuple[int, int]) -> int:
    """Paint patches of the last image and check the change; return the image's number of tiles."""
    record = RECORDS[vlm.family.model_type]
    n_images = record.n_frames or (2 if record.several else 1)
    images: list[Image.Image] = [textured(*size)] * n_images
    plain, prompt = tower_outputs(vlm, images)
    boxes = np.concatenate([np.asarray(grid.patch_boxes) for grid in prompt.grids])
    thumbnails = np.concatenate([np.zeros(0, bool), *(_of_thumbnail(g) for g in prompt.grids)])
    assert len(plain) == len(boxes)
    start = len(boxes) - len(prompt.grids[-1].patch_places)
    last = [i for i in range(start, len(boxes)) if fits(boxes[i], size)]
    assert len(last) >= N_PATCHES
    for patch in last[:: len(last) // N_PATCHES]:
        other, _ = tower_outputs(vlm, [*images[:-1], painted(images[-1], boxes[patch])])
        change = np.linalg.norm(other - plain, axis=1)
        rivals = np.flatnonzero(thumbnails == thumbnails[patch])
        assert rivals[change[rivals].argmax()] == patch
    tiles = prompt.grids[-1].tiles
    return 1 if tiles is None else len(np.unique(tiles))


def _of_thumbnail(grid: Any) -> np.ndarray:
    if grid.thumbnail is None:
        return np.zeros(len(grid.patch_places), bool)
    return grid.thumbnail.patch_places[:, 0] >= 0


@pytest.mark.parametrize("model_type", ["idefics2", "aria"])
def test_patches_masked_in_the_tower_are_outside_the_grid(model_type: str) -> None:
    vlm = vlm_of(model_type)
    tower = next(m for n, m in vlm.model.named_modules() if n.split(".")[-1] in TOWERS)
    given: list[np.ndarray] = []
    handle = tower.register_forward_pre_hook(
        lambda _module, _args, named: given.append(named["patch_attention_mask"].numpy()),
        with_kwargs=True,
    )
    try:
        _, prompt = tower_outputs(vlm, [textured(171, 101), textured(75, 150)])
    finally:
        handle.remove()
    placed = np.concatenate([grid.patch_places[:, 0] >= 0 for grid in prompt.grids])
    assert placed.tolist() == given[0].ravel().tolist()
    assert 0 < placed.sum() < len(placed)
