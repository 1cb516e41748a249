"""Images so narrow that all cells of their tiles are dropped with the padding."""

import numpy as np
import pytest

from tests.helpers.pixel_changes import QUESTION, changes, embeddings, fits, textured, vlm_of
from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import rectangle, with_breaks

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
WIDE = [
    *(("granite4_vision", size) for size in ((400, 64), (800, 64))),
    *(("llava_next", size) for size in ((200, 10), (400, 10), (2000, 10))),
    *((name, (2000, 10)) for name in ("llava_onevision", "llava_next_video")),
]
LONG = [(name, (height, width)) for name, (width, height) in WIDE]


@pytest.mark.parametrize(("model_type", "size"), [*WIDE, *LONG])
def test_only_the_thumbnail_and_line_breaks_are_left(
    model_type: str, size: tuple[int, int]
) -> None:
    vlm, image = vlm_of(model_type), textured(*size)
    plain, prompt = embeddings(vlm, [image])  # labels are checked against the ids of the processor
    tokens, (grid,) = prompt.tokens, prompt.grids
    config = vlm.model.config
    patches = config.vision_config.image_size // config.vision_config.patch_size
    side = patches // 2 if model_type == "granite4_vision" else patches
    assert grid.thumbnail is not None
    assert (grid.thumbnail.rows, grid.thumbnail.cols) == (side, side)
    assert grid.rows * grid.cols == 0
    of_image = tokens[tokens["kind"].eq("image")]
    assert of_image["view"].iloc[: side**2].eq("thumbnail").all()
    breaks = of_image.iloc[side**2 :]
    assert breaks[["row", "col", "x0", "view", "tile"]].isna().all(axis=None)
    assert bool(len(breaks)) == (size[1] > size[0])  # rows without columns, or no rows
    boxes = tokens[["x0", "y0", "x1", "y1"]].to_numpy()
    of_view = np.flatnonzero(tokens["view"].eq("thumbnail").fillna(value=False))
    inside = [token for token in of_view if fits(boxes[token], size)]
    assert len(inside) >= 2
    for token in inside[:: max(1, len(inside) // 4)]:
        change = changes(vlm, image, boxes[token], plain)
        assert of_view[change[of_view].argmax()] == token
    n_tiles = vlm.prepare([[image]], [QUESTION])[0]["pixel_values"].shape[1] - 1
    assert (grid.patch_places[:, 0] >= 0).sum() == n_tiles * patches**2
    assert (grid.thumbnail.patch_places[:, 0] >= 0).sum() == patches**2
    with pytest.raises(GeometryError) as refusal:
        grid.arranged(np.zeros(len(of_image)))
    assert str(refusal.value) == (
        "Image 0 has no tokens in the view 'image': it is so narrow that the model removed them "
        f"together with the padding. Use view='thumbnail', which has {side} x {side} tokens."
    )
    assert grid.arranged(np.zeros(len(of_image)), "thumbnail").shape == (side, side)


@pytest.mark.parametrize(("rows", "cols"), [(2, 3), (2, 0), (0, 3)])
def test_a_break_follows_each_row(rows: int, cols: int) -> None:
    cells = rectangle(max(rows, 1), max(cols, 1), (0.0, 0.0, 6.0, 4.0))
    cells = with_breaks(cells[np.arange(rows * cols)], rows)
    expected = [place for r in range(rows) for place in (*([r, c] for c in range(cols)), [-1, -1])]
    assert cells.places.tolist() == expected


def test_an_image_smaller_than_a_token_is_refused() -> None:
    with pytest.raises(GeometryError) as refusal:
        vlm_of("lighton_ocr").prepare([[textured(1, 1)]], [QUESTION])
    assert str(refusal.value) == (
        "The image is too small or too narrow: it would have 0 x 0 tokens after resizing. Give a "
        "larger image, or one that is less elongated."
    )
