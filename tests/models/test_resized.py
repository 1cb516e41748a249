"""Pictures and frames that a model's own utility resized: boxes, times, stores and refusals."""

import numpy as np
import pytest
import torch
from PIL import Image

import xmodal_interp as xi
from tests.helpers.clips import QUESTION, clip, noise, vlm_of
from tests.helpers.pixel_changes import language_inputs, painted
from tests.helpers.pixel_changes import vlm_of as without_mixing
from tests.helpers.store_samples import SETTINGS, assert_same
from xmodal_interp import figures
from xmodal_interp.capturing.items import item_of
from xmodal_interp.errors import InputError
from xmodal_interp.store import StoreWriter, open_store

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
ORIGINAL, SMALLER = (170, 90), (112, 56)
CORNERS = ["x0", "y0", "x1", "y1"]


def shrunk(image: Image.Image) -> Image.Image:
    """The picture on multiples of 28 or 56 px, as utilities of Qwen's models return it."""
    return image.resize(SMALLER, Image.Resampling.BICUBIC)


def floats(frames: list[Image.Image]) -> torch.Tensor:
    """Frames as qwen-vl-utils 0.0.14 returns them: 0 to 255, ``[frame, channel, row, col]``."""
    pixels = np.stack([np.asarray(shrunk(frame)) for frame in frames])
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).float()


def test_boxes_are_in_pixels_of_the_original_image() -> None:
    """Painting a token's box in the original changes this token most, after both resizes."""
    vlm, image = without_mixing("qwen2_vl"), Image.new("RGB", ORIGINAL, (40, 40, 40))

    def read(picture: Image.Image):
        inputs, (prompt,) = vlm.prepare([[xi.resized(shrunk(picture), ORIGINAL)]], [QUESTION])
        return language_inputs(vlm, inputs), prompt

    plain, prompt = read(image)
    (grid,), tokens = prompt.grids, prompt.tokens
    assert (grid.width, grid.height) == ORIGINAL
    positions = np.flatnonzero(tokens["kind"].eq("image"))
    boxes = tokens[CORNERS].to_numpy(dtype=float)
    assert boxes[positions].min(0)[:2].tolist() == [0, 0]
    assert boxes[positions].max(0)[2:] == pytest.approx(ORIGINAL)
    for token in positions:
        change = np.linalg.norm(read(painted(image, boxes[token]))[0] - plain, axis=1)
        assert positions[change[positions].argmax()] == token
    inputs, (unscaled,) = vlm.prepare([[shrunk(image)]], [QUESTION])
    np.testing.assert_array_equal(language_inputs(vlm, inputs), plain)
    expected = unscaled.grids[0].boxes * np.tile(np.divide(ORIGINAL, SMALLER), 2)
    np.testing.assert_allclose(grid.boxes, expected)


def test_float_frames_of_a_utility_are_read_as_bytes() -> None:
    vlm, frames = vlm_of("qwen2_vl"), [noise(*ORIGINAL, i) for i in range(4)]
    given = {
        "floats": floats(frames),
        "array": floats(frames).numpy(),
        "pictures": [shrunk(frame) for frame in frames],
    }
    found = {}
    for name, of in given.items():
        video = xi.Video(of, fps=2.0, original_size=ORIGINAL)
        found[name] = vlm.prepare([[]], [QUESTION], videos=[[video]])
    inputs, (prompt,) = found.pop("pictures")
    for other, (labelled,) in found.values():
        for name, value in inputs.items():
            assert torch.equal(other[name], value), name
        assert labelled.tokens.equals(prompt.tokens)
    (grid,) = prompt.video_grids
    assert (grid.width, grid.height) == ORIGINAL
    of_video = prompt.tokens[prompt.tokens["kind"] == "video"]
    assert of_video[CORNERS].to_numpy(dtype=float).max(0)[2:] == pytest.approx(ORIGINAL)


def test_dark_float_frames_are_never_read_as_white() -> None:
    """A clip of black and nearly black pixels as floats 0 and 1: white may be 1 or 255."""
    dark = torch.zeros(2, 3, 56, 112)
    assert not xi.Video(dark, original_size=ORIGINAL).opened().pixels().any()
    dark[0, 0, :4] = 1
    for frames, kind in ((dark, "float32"), (dark.double().numpy(), "float64")):
        with pytest.raises(InputError) as refusal:
            xi.Video(frames, original_size=ORIGINAL).opened()
        assert str(refusal.value) == (
            f"The range of an array of {kind} is not known: it has the values 0 to 1, whose white "
            "may be 1 or 255. Convert it to bytes, 0 to 255 (np.uint8)."
        )
    assert xi.Video(dark.byte()).opened().pixels().max() == 1
    dark[0, 0, :4] = 0.5  # no utility returns fractions of a byte
    assert xi.Video(dark).opened().pixels().max() == 128
    dark[0, 0, :4] = 2
    with pytest.raises(InputError, match="whose white may be 1 or 255"):
        xi.Video(dark).opened()
    dark[0, 0, :4] = 3
    assert xi.Video(dark).opened().pixels().max() == 3


def test_a_painted_box_of_a_frame_changes_its_token() -> None:
    vlm = without_mixing("qwen2_vl")
    frames = [Image.new("RGB", ORIGINAL, (40 + i, 40, 40)) for i in range(4)]

    def read(pictures: list[Image.Image]):
        video = xi.Video(floats(pictures), fps=2.0, original_size=ORIGINAL)
        inputs, (prompt,) = vlm.prepare([[]], [QUESTION], videos=[[video]])
        return language_inputs(vlm, inputs), prompt

    plain, prompt = read(frames)
    positions = np.flatnonzero(prompt.tokens["kind"].eq("video"))
    for token in positions[:: len(positions) // 5]:
        box = prompt.tokens.loc[token, CORNERS].to_numpy(float)
        frame = int(prompt.tokens["frame"][token])
        other = [painted(each, box) if i // 2 == frame else each for i, each in enumerate(frames)]
        change = np.linalg.norm(read(other)[0] - plain, axis=1)
        assert positions[change[positions].argmax()] == token


def in_time(video: xi.Video, model_type: str = "qwen2_vl") -> tuple[list, list, str]:
    """Source frame and time of the frames of tokens, and the tokens of the prompt."""
    _, (prompt,) = vlm_of(model_type).prepare([[]], [QUESTION], videos=[[video]])
    of_video = prompt.tokens[prompt.tokens["kind"] == "video"].drop_duplicates("frame")
    others = prompt.tokens[prompt.tokens["kind"] != "video"]
    assert others[["source_frame", "time_s"]].isna().all(axis=None)
    return (
        of_video["source_frame"].tolist(),
        of_video["time_s"].tolist(),
        "".join(prompt.tokens["token"]),
    )


def test_indices_and_timestamps_are_kept_in_the_token_table() -> None:
    """Two frames are merged into one of tokens, which has the values of the first."""
    frames = clip(4, 0).frames
    assert in_time(xi.Video(frames, fps=2.0))[:2] == ([0, 2], [0, 1])
    sampled = xi.Video(frames, fps=25.0, indices=[0, 14, 28, 42])
    assert in_time(sampled)[:2] == ([0, 28], [0, 28 / 25])
    sampled = xi.Video(frames, fps=25.0, indices=torch.tensor([0, 14, 28, 42]))
    assert in_time(sampled)[:2] == ([0, 28], [0, 28 / 25])
    variable = xi.Video(frames, indices=[0, 39, 40, 43], timestamps=[0, 0.78, 0.8, 2.0])
    assert in_time(variable)[:2] == ([0, 40], [0, 0.8])
    source, times, _ = in_time(xi.Video(frames))
    assert (source, np.isnan(times).all()) == ([0, 2], True)
    _, (still,) = vlm_of("qwen2_vl").prepare([[noise(64, 64, 0)]], [QUESTION])
    assert "time_s" not in still.tokens


def test_a_processor_that_writes_times_is_given_those_of_the_frames() -> None:
    """Qwen3-VL writes the mean of two frames: 0.28 and 1.40 s, not those of the first seconds."""
    frames = clip(4, 0).frames
    sampled = xi.Video(frames, fps=25.0, indices=[0, 14, 28, 42])
    given = xi.Video(frames, timestamps=[0, 0.56, 1.12, 1.68])
    for video in (sampled, given):
        text = in_time(video, "qwen3_vl")[2]
        assert "<0.3 seconds>" in text, text
        assert "<1.4 seconds>" in text, text


def test_the_rate_of_sampled_frames_is_that_of_their_indices() -> None:
    """Qwen2.5-VL spaces its rotary positions by it: 14 of 25 frames a second apart, in pairs."""
    vlm, frames = vlm_of("qwen2_5_vl"), clip(4, 0).frames
    for video, pace in (
        (xi.Video(frames, fps=2.0), 0.5),
        (xi.Video(frames, fps=25.0, indices=[0, 14, 28, 42]), 0.56),
        (xi.Video(frames, timestamps=[0, 0.56, 1.12, 1.68]), 0.56),
    ):
        inputs, _ = vlm.prepare([[]], [QUESTION], videos=[[video]])
        assert float(inputs["second_per_grid_ts"][0]) == pytest.approx(2 * pace)


def test_a_resized_picture_is_stored_and_drawn(tmp_path) -> None:
    vlm = vlm_of("qwen2_vl")
    video = xi.Video(
        floats([noise(*ORIGINAL, i) for i in range(4)]),
        fps=25.0,
        indices=[0, 14, 28, 42],
        original_size=ORIGINAL,
    )
    image = xi.resized(shrunk(noise(*ORIGINAL, 9)), ORIGINAL)
    before = xi.capture(vlm, image, QUESTION, videos=video, max_new_tokens=2)
    assert before.tokens["time_s"].dropna().unique().tolist() == [0, 28 / 25]
    with StoreWriter(tmp_path / "store", SETTINGS) as writer:
        writer.write(before)
    after = open_store(tmp_path / "store")[0]
    assert_same(after, before)
    assert after.videos[0].original_size == ORIGINAL
    assert tuple(after.videos[0].indices) == (0, 14, 28, 42)
    assert (after.grids[0].width, after.grids[0].height) == ORIGINAL
    figure = figures.overlay(after, "circle", boxes=[(0, 0, 170, 90)])
    (outline,) = [patch for patch in figure.axes[0].patches if not patch.get_fill()]
    assert outline.get_bbox().extents.tolist() == [0, 0, 170, 90]
    assert figure.axes[0].images[0].get_extent() == [0, 170, 90, 0]


def test_items_that_differ_in_size_or_time_have_different_digests() -> None:
    picture, frames = noise(*SMALLER, 1), clip(2, 0).frames

    def digest(**item: object) -> str:
        return item_of(0, "x", {"prompt": QUESTION, **item}).digest

    digests = [
        digest(image=picture),
        digest(image=xi.resized(picture, ORIGINAL)),
        digest(video=xi.Video(frames, fps=2.0)),
        digest(video=xi.Video(frames, fps=2.0, original_size=ORIGINAL)),
        digest(video=xi.Video(frames, fps=2.0, indices=[0, 9])),
        digest(video=xi.Video(frames, fps=2.0, timestamps=[0, 4.5])),
    ]
    assert len(set(digests)) == len(digests)


def test_the_doctor_checks_boxes_in_the_pixels_that_it_paints() -> None:
    picture = xi.resized(noise(112, 56, 0), (1120, 280))
    checkup = xi.doctor(vlm_of("qwen2_vl"), picture, QUESTION)
    assert checkup.ok, checkup


FRAMES = [noise(8, 8, i) for i in range(3)]
REFUSALS = {
    "too few": (
        lambda: xi.Video(FRAMES, indices=[0, 1]),
        "indices must have one entry per frame; got 2 for 3 frames.",
    ),
    "falling": (
        lambda: xi.Video(FRAMES, timestamps=[0, 2, 1]),
        "An entry of timestamps must be a number from 2 to inf; got 1.",
    ),
    "no integer": (
        lambda: xi.Video(FRAMES, indices=[0, 0.5, 1]),
        "An entry of indices must be an integer from 0 to 10000000; got 0.5.",
    ),
    "a contradiction": (
        lambda: xi.Video(FRAMES, fps=25.0, indices=[0, 25, 50], timestamps=[0, 2, 4]),
        "The timestamps differ from indices / fps by up to 2 s. Leave out fps for a video of "
        "variable frame rate.",
    ),
    "frames and metadata": (
        lambda: xi.Video((torch.zeros(4, 3, 56, 112), {"fps": 2.0})),
        "A frame must be one image; got an array of the shape (4, 3, 56, 112). Pass this array "
        "itself as the frames: xi.Video(array, ...).",
    ),
    "no size": (
        lambda: xi.resized(FRAMES[0], 170),
        "original_size must be an ordered sequence, such as a list; got int 170.",
    ),
    "three sides": (
        lambda: xi.Video(FRAMES, original_size=(3, 90, 170)),
        "original_size must be (width, height) in px; got (3, 90, 170).",
    ),
    "no width": (
        lambda: xi.resized(FRAMES[0], (0, 90)),
        "A side of original_size must be an integer from 1 to 10000000; got 0.",
    ),
}


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    ask, message = REFUSALS[name]
    with pytest.raises(InputError) as refusal:
        ask()
    assert str(refusal.value) == message
