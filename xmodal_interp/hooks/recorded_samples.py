"""Make a sample of the recorded calls of a vision model that has no processor of transformers.

The models of timm and open_clip are examples. The user gives the grid: the number of rows and
columns of patches, the names of the positions before and after them, and the part of the image that
the pixels show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from xmodal_interp.arguments import as_list, string, whole_number
from xmodal_interp.errors import CaptureError, GeometryError, InputError, quoted
from xmodal_interp.models import ImageGrid, ImageLike, open_image
from xmodal_interp.models.geometry.cells import image_grid, nowhere, rectangle
from xmodal_interp.models.geometry.grid import Box
from xmodal_interp.models.token_table import token_table
from xmodal_interp.models.vision_inputs import position_columns
from xmodal_interp.sample import Sample

if TYPE_CHECKING:
    from xmodal_interp.hooks.recorder import Recording


def recorded_sample(
    recording: Recording,
    image: ImageLike,
    *,
    grid: tuple[int, int],
    before: Sequence[str] = (),
    after: Sequence[str] = (),
    box: Box | None = None,
    index: int = 0,
    name: str = "sample-0",
) -> Sample:
    """Return a sample of recorded calls; see :meth:`Recording.sample`."""
    calls = [call for call in recording.calls if call.tower == "vision"]
    if not calls:
        towers = ", ".join(dict.fromkeys(call.tower for call in recording.calls))
        raise CaptureError(
            f"The recording holds no call of a vision tower; it holds: {towers or 'nothing'}. Call "
            "sample after the block, and run a vision model inside it."
        )
    runs = Counter((call.kind, call.layer) for call in calls)
    if max(runs.values()) > 1:
        kind, layer = runs.most_common(1)[0][0]
        raise CaptureError(
            f"Vision {kind}-attention of layer {layer} ran {max(runs.values())} times. Run the "
            "model once inside the block, on a batch of images without windows."
        )
    whole_number(index, "index", 0, calls[0].n_samples - 1)
    opened = open_image(image)
    placed = _grid(opened.size, grid, before, after, box)
    own = [replace(call.select_sample(index), call=0) for call in calls]
    for call in own:
        if call.kind == "self" and not call.n_queries == call.n_keys == placed.n_tokens:
            raise GeometryError(
                f"{call.name} has {call.n_queries} queries and {call.n_keys} keys, but the grid "
                f"has {grid[0]} x {grid[1]} patches and {len(before) + len(after)} other "
                "positions. Name the other positions, such as before=['class']."
            )
    layers: dict[str, list[int]] = {}
    for call in own:
        layers.setdefault(f"{call.tower}.{call.kind}", []).append(call.layer)
    return Sample(
        name=name,
        tokens=token_table(position_columns(placed)),
        text="",
        question="",
        answer="",
        n_prompt=placed.n_tokens,
        grids=(placed,),
        images=(opened,),
        calls={(call.tower, call.kind, call.layer, 0): call for call in own},
        provenance={"tower": "vision", "layers": {of: sorted(each) for of, each in layers.items()}},
    )


def _grid(size: tuple[int, int], shape: Any, before: Any, after: Any, box: Box | None) -> ImageGrid:
    """Return the grid of an image of this size."""
    sides = as_list(shape, "grid")
    if len(sides) != 2:
        raise InputError(
            "grid must be the number of rows and of columns of patches, such as (16, 16); got "
            f"{quoted(shape)}."
        )
    rows, cols = (whole_number(side, "grid", 1) for side in sides)
    names = [as_list(each, of) for each, of in ((before, "before"), (after, "after"))]
    for each in (*names[0], *names[1]):
        string(each, "A name of a position")
    shown = (0.0, 0.0, float(size[0]), float(size[1])) if box is None else box
    patches = rectangle(rows, cols, shown)
    cells = [nowhere(len(names[0])), patches, nowhere(len(names[1]))]
    of_positions = np.array([*names[0], *[""] * len(patches), *names[1]])
    return replace(image_grid(size, cells, cells), patch_names=of_positions)
