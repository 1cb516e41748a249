"""Vision calls are split by image, for towers that batch, tile, window or pack images."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import xmodal_interp as xi
from tests.helpers.real import real, settled
from xmodal_interp.attention import AttentionCall, reordered
from xmodal_interp.capturing.vision_calls import calls_by_image
from xmodal_interp.errors import CaptureError

QUESTIONS = ["where is the red circle?", "how many?"]
TYPES = [
    *("llava", "qwen2_vl", "qwen2_5_vl", "mistral3", "llava_next", "llava_onevision", "idefics2"),
    *("idefics3", "internvl", "gemma3", "llama4", "granite4_vision", "blip-2", "mllama"),
    *("lfm2_vl", "granite_docling", "molmo2", "minicpmv4_6", "step3p7", "hunyuan_vl"),
]


def noise(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = [noise(64, 48, 0), noise(48, 80, 1)]


@pytest.mark.parametrize("model_type", TYPES)
def test_an_image_has_the_same_attention_in_a_batch(model_type) -> None:
    vlm = xi.VLM(*real(model_type))
    alone = [xi.capture(vlm, p, q) for p, q in zip(PICTURES, QUESTIONS, strict=True)]
    together = xi.capture_batch(vlm, [[picture] for picture in PICTURES], QUESTIONS)
    for one, other in zip(alone, together, strict=True):
        keys = [key for key in one.calls if key[0] in ("vision", "connector")]
        assert keys == [key for key in other.calls if key[0] in ("vision", "connector")]
        assert {key[3] for key in keys} == {0}
        for key in keys:
            ours, theirs = other.calls[key], one.calls[key]
            if key[:2] == ("vision", "self") and ours.n_queries > theirs.n_queries:
                places = other.grids[0].patch_places[:, 0]  # -1 where padded to the larger image
                ours = reordered(ours, torch.from_numpy(np.flatnonzero(places >= 0)))
            if ours.n_keys != theirs.n_keys:
                continue  # the keys of latents include masked padding patches
            assert ours.n_samples == theirs.n_samples == 1
            assert torch.equal(ours.visible().expand_as(theirs.visible()), theirs.visible())
            torch.testing.assert_close(
                ours.probs(), theirs.probs(), atol=1e-5, rtol=0, equal_nan=True
            )


@pytest.mark.parametrize(
    "model_type",
    [
        *("llava", "qwen2_5_vl", "mistral3", "llava_next"),
        *("lfm2_vl", "minicpmv4_6", "molmo2", "hunyuan_vl"),
    ],
)
def test_images_of_one_prompt_are_separated(model_type) -> None:
    vlm = xi.VLM(*real(model_type))
    sample = xi.capture(vlm, PICTURES, QUESTIONS[0])
    for number, picture in enumerate(PICTURES):
        alone = xi.capture(vlm, picture, QUESTIONS[0]).probs(0, tower="vision")
        mine = sample.probs(0, tower="vision", call=number)
        torch.testing.assert_close(mine, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["step3p7", "unlimited_ocr"])
def test_tiles_that_are_read_after_all_images(model_type) -> None:
    model, processor = real(model_type)
    # in float32, a product of all tiles and one of some tiles are rounded differently, by 1.3e-5
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # torch multiplies no groups of float64
    vlm = xi.VLM(model, processor)
    pictures = [noise(130, 64, 0), noise(64, 200, 1)]
    sample = xi.capture(vlm, pictures, QUESTIONS[0])
    assert len({len(grid.patch_places) for grid in sample.grids}) == 2
    for number, picture in enumerate(pictures):
        alone = xi.capture(vlm, picture, QUESTIONS[0])
        keys = [key for key in alone.calls if key[0] == "vision"]
        assert len(keys) >= 2
        for tower, kind, layer, _ in keys:
            mine = sample.calls[tower, kind, layer, number].probs()
            theirs = alone.calls[tower, kind, layer, 0].probs()
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "exaone4_5", "llava_next"])
def test_grid_places_match_the_positions_of_the_tower(model_type) -> None:
    """Paint one patch: in the first layer, its query changes the most."""
    vlm = xi.VLM(*real(model_type))
    size = vlm.prepare([[noise(64, 48, 2)]], QUESTIONS[:1])[1][0].grids[0]
    plain = Image.new("RGB", (size.patch_cols * 8, size.patch_rows * 8), (90, 90, 90))
    grid = vlm.prepare([[plain]], QUESTIONS[:1])[1][0].grids[0]
    before = xi.capture(vlm, plain, QUESTIONS[0]).call(0, tower="vision").q
    step = plain.width / grid.patch_cols, plain.height / grid.patch_rows
    for row, col in [(0, 0), (1, grid.patch_cols - 1), (grid.patch_rows - 1, 2)]:
        painted = plain.copy()
        box = [round(s * n) for n in (0, 1) for s in step]
        shift = round(col * step[0]), round(row * step[1])
        painted.paste((250, 20, 20), tuple(b + s for b, s in zip(box, shift * 2, strict=True)))
        after = xi.capture(vlm, painted, QUESTIONS[0]).call(0, tower="vision").q
        change = (after - before).norm(dim=-1).sum(1)[0]
        placed = grid.patch_places[:, 0] >= 0  # without thumbnail and class token, which change too
        best = np.flatnonzero(placed)[int(change[torch.from_numpy(placed)].argmax())]
        assert tuple(grid.patch_places[best]) == (row, col)


@pytest.mark.parametrize("model_type", ["minicpmv4_6", "minicpmv4_7"])
def test_merged_windows_are_in_image_order(model_type) -> None:
    vlm = xi.VLM(*real(model_type))
    before = xi.capture(vlm, PICTURES, QUESTIONS[0])
    for number, grid in enumerate(before.grids):
        view = grid.thumbnail or grid
        step = np.divide(PICTURES[number].size, (view.patch_cols, view.patch_rows))
        for row, col in [(1, 3), (2, 1)]:
            painted = [picture.copy() for picture in PICTURES]
            box = np.round([*(step * (col, row)), *(step * (col + 1, row + 1))]).astype(int)
            painted[number].paste((250, 20, 20), tuple(box.tolist()))
            after = xi.capture(vlm, painted, QUESTIONS[0])
            queries = (each.call(0, tower="connector", call=number).q for each in (after, before))
            change = torch.sub(*queries).norm(dim=-1).sum(1)[0]
            assert len(change) == len(grid.patch_places)
            of_view = "image" if grid.thumbnail is None else "thumbnail"
            arranged = after.grid(change, number, view=of_view)
            assert np.unravel_index(arranged.argmax(), arranged.shape) == (row, col)


def test_pieces_per_token_are_assigned_to_their_image() -> None:
    grids = xi.capture(xi.VLM(*real("llava")), PICTURES, QUESTIONS[0]).grids
    counts = [grid.n_tokens for grid in grids]
    q, k = torch.randn(sum(counts), 1, 1, 2), torch.randn(sum(counts), 1, 4, 2)
    whole = AttentionCall("connector", "cross", 0, "attn", 0, q, k, 1.0)
    first, second = calls_by_image([whole], grids)
    assert [first.n_queries, second.n_queries] == counts
    assert first.q is not None
    assert torch.equal(first.q[0, 0], q[: counts[0], 0, 0])


def test_pieces_that_match_no_image_are_an_error() -> None:
    grids = xi.capture(xi.VLM(*real("llava")), PICTURES, QUESTIONS[0]).grids
    q = torch.randn(3, 1, 7, 2)
    with pytest.raises(CaptureError) as error:
        calls_by_image([AttentionCall("vision", "self", 0, "attn", 0, q, q, 1.0)], grids)
    assert str(error.value) == (
        "vision self-attention, layer 0, call 0: 3 pieces of 7, 7, 7, ... keys cannot be assigned "
        "to 2 images of 65, 65, ... patches. Capture the samples one by one, or leave the tower "
        "out of Keep(towers=...)."
    )


def test_packed_images_that_attend_to_each_other_are_an_error() -> None:
    grids = xi.capture(xi.VLM(*real("llava")), PICTURES, QUESTIONS[0]).grids
    q = torch.randn(1, 1, 130, 2)
    with pytest.raises(CaptureError) as error:
        calls_by_image([AttentionCall("vision", "self", 0, "attn", 0, q, q, 1.0)], grids)
    assert str(error.value) == (
        "In vision self-attention, layer 0, call 0, the image at positions 0 to 64 of a packed row "
        "also attends to other positions, so the images cannot be separated. Capture the samples "
        "one by one, or leave the tower out."
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("side", [4, 8, 5], ids=["4", "8", "5, padded"])
@pytest.mark.parametrize("tiled", [False, True])
def test_windows_are_put_into_image_order(side: int, *, tiled: bool) -> None:
    """In image order, a patch attends to the square window that contains it."""
    known = real("got_ocr2")[0]
    config = copy.deepcopy(known.config)
    config.vision_config.window_size = side
    processor = settled("got_ocr2")
    n_views = 1
    if tiled:
        options = {"crop_to_patches": True, "min_patches": 2, "max_patches": 2}
        processor.images_kwargs = {**processor.images_kwargs, **options}
        n_views = 3
    model = type(known)(config).eval()
    prompt = "<img><imgpad></img>where is it?"
    sample = xi.capture(xi.VLM(model, processor), noise(128, 64, 0), prompt)
    probs = sample.probs(0, tower="vision").mean(0)
    n = 16 * 16
    assert probs.shape == (n_views * n, n_views * n)
    row, col = torch.arange(n) // 16, torch.arange(n) % 16
    window = (row // side) * 4 + col // side
    alike = torch.block_diag(*[window[:, None] == window[None]] * n_views).bool()
    assert probs[~alike].max() == 0.0
    assert probs[alike].min() > 0.0
    whole = torch.ones(n, dtype=torch.bool) if 16 % side == 0 else (row < 15) & (col < 15)
    sums = probs.sum(1).view(n_views, n)
    assert torch.allclose(sums[:, whole], torch.ones(()), atol=1e-5)
    assert (sums[:, ~whole] < 0.99).all()
