"""Capture of videos: token labels, grids, generation and batches, with real processors."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import xmodal_interp as xi
from tests.helpers.clips import QUESTION, clip, noise, vlm_of
from tests.helpers.real import real
from xmodal_interp.attention import AttentionCall
from xmodal_interp.errors import GeometryError, InputError
from xmodal_interp.models import open_video

pytestmark = pytest.mark.filterwarnings(  # processors warn about their own deprecations
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
TYPES = [
    *("gemma4", "gemma4_unified", "smolvlm", "glm5_next"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen2_5_omni_thinker", "exaone4_5"),
    *("ernie4_5_vl_moe", "glm4v", "glm46v", "video_llama_3", "internvl", "muse_glimmer"),
    *("llava_onevision", "llava_next_video", "video_llava", "perception_lm", "molmo2"),
    *("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"),
]
EITHER = {
    **dict.fromkeys(("glm4v", "glm46v", "smolvlm"), "Image features and image tokens do not match"),
    "molmo2": "pixel_values and pixel_values_videos are provided at the same time",
}
"""Types that use image tokens for videos and raise this error for images and videos together."""
BOTH = [name for name in TYPES if name not in EITHER]
WITHOUT_TOWER = {"gemma4_unified"}
"""Types without a vision tower: patches are projected into the language model."""
WITH_TOWER = [name for name in TYPES if name not in WITHOUT_TOWER]
ONLY_CACHED = {"ernie4_5_vl_moe"}
"""Types that cannot generate without a cache, also without recording."""
MERGING = {"minicpmv4_6", "minicpmv4_7"}
"""Types whose tower merges four patches into one after its first layer."""
STEPS = {"max_new_tokens": 4, "generation": {"min_new_tokens": 4}}


def close(one: AttentionCall, other: AttentionCall) -> None:
    torch.testing.assert_close(one.probs(), other.probs(), atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("model_type", TYPES)
def test_tokens_grids_and_calls_of_a_video(model_type: str) -> None:
    vlm, video = vlm_of(model_type), clip(4, 0)
    sample = xi.capture(vlm, [], QUESTION, videos=video, **STEPS)
    (grid,) = sample.video_grids
    tokens = sample.tokens
    assert len(sample.where("video", video=0)) == grid.n_tokens
    assert sample.grids == sample.images == ()
    assert sample.videos[0].fps == 2.0
    in_second = sample.where("video", frame=1)
    assert len(in_second) == grid.rows * grid.cols
    assert tokens["frame"].iloc[in_second].eq(1).all()
    asked = sample.find("where is the red circle")
    assert set(asked) <= set(sample.text_after_image())
    assert sample.text_after_image().min() > sample.where("video").max()
    assert next(iter(sample.groups())) == "video 0"
    assert sum(group.astype(int) for group in sample.groups().values()).tolist() == [1] * len(
        sample
    )
    frames = sample.grid(sample.probs(-1)[0, -1, sample.where("video")], video=0)
    assert frames.shape == (grid.frames, grid.rows, grid.cols)
    assert np.array_equal(
        sample.grid(np.arange(grid.n_tokens), video=0, frame=1),
        sample.grid(np.arange(grid.n_tokens), video=0)[1],
    )
    placed = tokens.iloc[sample.where("video")].reset_index(drop=True)
    cells = sample.grid(placed.index, video=0).astype(int)
    read = placed.iloc[cells.ravel()][["frame", "row", "col"]].to_numpy(int)
    assert read.tolist() == np.argwhere(cells >= 0).tolist()
    tower = {key[2]: key for key in sample.calls if key[:2] == ("vision", "self")}
    for layer in tower:
        call = sample.call(layer, tower="vision")
        if model_type in MERGING and layer > 0:
            assert call.n_queries * 4 == len(grid.patch_places)
            continue
        assert call.n_queries == len(grid.patch_places)
        seen = sample.grid(call.probs()[0, 0, -1], video=0)
        assert seen.shape == (grid.patch_frames, grid.patch_rows, grid.patch_cols)
    assert bool(tower) == (model_type in WITH_TOWER)


@pytest.mark.parametrize("model_type", TYPES)
def test_answers_equal_those_without_capture(model_type: str) -> None:
    vlm, video = vlm_of(model_type), clip(4, 0)
    inputs, _ = vlm.prepare([[]], [QUESTION], videos=[[video]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    ids = vlm.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    cached = xi.capture(vlm, [], QUESTION, videos=video, **STEPS)
    assert cached.answer == vlm.tokenizer.decode(ids, skip_special_tokens=True).strip()
    options = {"min_new_tokens": 4, "use_cache": False}
    if model_type in ONLY_CACHED:
        with pytest.raises(IndexError):
            vlm.model.generate(**inputs, max_new_tokens=4, **options)
        return
    read_again = xi.capture(vlm, [], QUESTION, videos=video, max_new_tokens=4, generation=options)
    assert read_again.answer == cached.answer
    assert set(read_again.calls) == set(cached.calls)
    for key, call in cached.calls.items():
        close(read_again.calls[key], call)


@pytest.mark.parametrize("model_type", BOTH)
def test_images_and_videos_are_separated(model_type: str) -> None:
    """Each has the same calls as when captured alone, numbered by images, then by videos."""
    vlm = vlm_of(model_type)
    pictures, videos = [noise(64, 48, 1)], [clip(4, 0), clip(4, 1)]
    together = xi.capture(vlm, pictures, QUESTION, videos=videos)
    n_tokens = [len(together.where("video", video=i)) for i in (0, 1)]
    assert n_tokens == [grid.n_tokens for grid in together.video_grids]
    alone = [
        xi.capture(vlm, pictures, QUESTION),
        *(xi.capture(vlm, [], QUESTION, videos=video) for video in videos),
    ]
    n_compared = 0
    for number, sample in enumerate(alone):
        keys = [key for key in sample.calls if key[0] == "vision"]
        assert {key[3] for key in keys} == ({0} if model_type in WITH_TOWER else set())
        mine = [key for key in together.calls if key[0] == "vision" and key[3] == number]
        assert [key[:3] for key in mine] == [key[:3] for key in keys]
        for key in keys:
            close(together.calls[*key[:3], number], sample.calls[key])
            n_compared += 1
    assert n_compared >= 3 or model_type in WITHOUT_TOWER


@pytest.mark.parametrize("model_type", TYPES)
def test_a_padded_batch_with_images_and_videos(model_type: str) -> None:
    vlm = vlm_of(model_type)
    images, videos = [[noise(64, 48, 1)], []], [[clip(4, 0)], [clip(4, 1)]]
    if model_type in EITHER:
        images = [[], []]
    questions = [QUESTION, "how many?"]
    together = xi.capture_batch(vlm, images, questions, videos=videos, **STEPS)
    for i, sample in enumerate(together):
        alone = xi.capture(vlm, images[i], questions[i], videos=videos[i], **STEPS)
        pad = len(sample.where("padding"))
        assert sample.answer == alone.answer
        assert sample.tokens["token"][pad:].tolist() == alone.tokens["token"].tolist()
        assert set(sample.calls) == set(alone.calls)
        for key, call in alone.calls.items():
            ours = sample.calls[key].probs()
            ours = ours[:, :, pad:, pad:] if key[0] == "language" else ours
            torch.testing.assert_close(ours, call.probs(), atol=5e-5, rtol=0, equal_nan=True)
    assert len(together[1].where("padding")) > 0 or vlm.runs_alone


@pytest.mark.parametrize("model_type", EITHER)
def test_types_that_take_images_or_videos_raise_for_both(model_type: str) -> None:
    with pytest.raises(ValueError, match=EITHER[model_type]):
        xi.capture(vlm_of(model_type), noise(64, 48, 1), QUESTION, videos=clip(4, 0))


def test_a_prompt_may_have_the_video_before_the_image() -> None:
    """InternVL reads images and videos in prompt order; calls are numbered by images first."""
    vlm, image, video = vlm_of("internvl"), noise(64, 48, 1), clip(4, 0)
    sample = xi.capture(vlm, image, "user: <video> <IMG_CONTEXT> which ?", videos=video)
    assert sample.where("video").max() < sample.where("image").min()
    alone = xi.capture(vlm, image, QUESTION), xi.capture(vlm, [], QUESTION, videos=video)
    for number, other in enumerate(alone):
        close(sample.call(0, tower="vision", call=number), other.call(0, tower="vision"))


@pytest.mark.parametrize("model_type", ["smolvlm", "gemma4", "glm5_next"])
def test_videos_of_different_lengths_and_shapes_are_separated(model_type: str) -> None:
    """Padding of shorter videos is removed."""
    vlm, videos = vlm_of(model_type), [clip(3, 0), clip(1, 1, 64, 96)]
    merged = 2 if model_type == "glm5_next" else 1
    together = xi.capture(vlm, [], QUESTION, videos=videos)
    for number, video in enumerate(videos):
        alone = xi.capture(vlm, [], QUESTION, videos=video)
        grid, own = together.video_grids[number], alone.video_grids[0]
        assert grid.frames == len(grid.times) == -(-len(video) // merged)
        assert np.array_equal(grid.places, own.places)
        assert np.array_equal(grid.boxes, own.boxes)
        for layer in alone.layers("vision"):
            ours = together.call(layer, tower="vision", call=number)
            close(ours, alone.call(layer, tower="vision"))


def test_keep_text_keeps_text_after_the_video() -> None:
    vlm, video = vlm_of("qwen2_vl"), clip(4, 0)
    sample = xi.capture(vlm, [], QUESTION, videos=video, keep=xi.Keep(queries="text"))
    rows = sample.call(0).query_positions.numpy()
    assert rows.tolist() == sample.text_after_image().tolist()
    assert rows.min() > sample.where("video").max()


def test_error_messages() -> None:
    vlm = vlm_of("qwen2_vl")
    refusal = (
        "A video must be xi.Video([frame, ...], fps=...), each frame a path or another image; "
        "got {}. Video files are not decoded: decode yours and choose the frames for the model."
    )
    with pytest.raises(InputError) as path:
        open_video("clip.mp4")
    assert str(path.value) == refusal.format("'clip.mp4'")
    with pytest.raises(InputError) as frames:
        xi.Video("other.mp4")
    assert str(frames.value) == refusal.format("'other.mp4'")
    with pytest.raises(InputError) as image:
        open_video(noise(8, 8, 0))
    assert str(image.value) == refusal.format("an object of Image")
    with pytest.raises(InputError) as placeholder:
        xi.capture(vlm, [], "<|video_pad|> what ?", videos=[clip(2, 0), clip(2, 1)])
    assert str(placeholder.value) == (
        "The prompt has 1 video placeholders for 2 videos: '<|video_pad|> what ?'. Put "
        "<|video_pad|> where each video goes."
    )
    sample = xi.capture(vlm, [], QUESTION, videos=clip(2, 0))
    with pytest.raises(GeometryError) as image_grid:
        sample.grid(np.zeros(24))
    assert str(image_grid.value) == "There is no image 0: the sample has 0 images."
    with pytest.raises(GeometryError) as frame:
        sample.grid(np.zeros(24), video=0, frame=1)
    assert str(frame.value) == "There is no frame 1: the sample has 1 frames."
    with pytest.raises(GeometryError) as count:
        sample.grid(np.zeros(7), video=0)
    assert str(count.value) == (
        "Video 0 has 24 tokens (1 x 4 x 6) and 96 vision positions (1 x 8 x 12); got values of "
        "shape (7,). Pass one value per token, such as "
        "sample.probs(keys=xi.at.video(0))[head, query]."
    )


def test_a_chat_template_without_videos_is_an_error() -> None:
    vlm = xi.VLM(*real("qwen2_vl"))
    processor = copy.copy(vlm.processor)
    processor.chat_template = "{{ messages[0]['content'][-1]['text'] }}"
    with pytest.raises(InputError) as refusal:
        xi.capture(xi.VLM(vlm.model, processor), [], QUESTION, videos=clip(2, 0))
    assert str(refusal.value) == (
        f"The chat template's prompt has 0 video placeholders for 1 videos: {QUESTION!r}. Put "
        "<|video_pad|> where each video goes."
    )


@pytest.mark.parametrize("model_type", WITH_TOWER)
def test_grid_places_match_the_positions_of_the_tower(model_type: str) -> None:
    """Paint one patch of one frame: in the first layer, its query changes the most."""
    vlm = vlm_of(model_type)
    (grid,) = vlm.prepare([[]], [QUESTION], videos=[[clip(4, 0)]])[1][0].video_grids
    size = grid.patch_cols * 8, grid.patch_rows * 8
    plain = [Image.new("RGB", size, (90, 90, 90))] * 4
    (grid,) = vlm.prepare([[]], [QUESTION], videos=[[xi.Video(plain, fps=2.0)]])[1][0].video_grids
    together = 4 // grid.patch_frames
    before = xi.capture(vlm, [], QUESTION, videos=xi.Video(plain, fps=2.0))
    first = before.layers("vision")[0]
    width, height = size[0] // grid.patch_cols, size[1] // grid.patch_rows
    for frame, row, col in [(0, 0, 0), (1, 1, grid.patch_cols - 1)]:
        painted = [image.copy() for image in plain]
        for image in painted[frame * together : (frame + 1) * together]:
            x, y = col * width, row * height
            image.paste((250, 20, 20), (x, y, x + width, y + height))
        after = xi.capture(vlm, [], QUESTION, videos=xi.Video(painted, fps=2.0))
        queries = (each.call(first, tower="vision").q for each in (after, before))
        change = torch.sub(*queries).norm(dim=-1).sum(1)[0]
        change[torch.from_numpy(grid.patch_places[:, 0] < 0)] = 0  # a class token sees all patches
        assert tuple(grid.patch_places[int(change.argmax())]) == (frame, row, col)


def test_tokens_that_a_processor_drops_have_no_place() -> None:
    """VideoLLaMA3 keeps the first frame, and only the changed patches of later frames."""
    vlm = vlm_of("video_llama_3")
    still = [Image.new("RGB", (96, 64), (90, 90, 90)) for _ in range(3)]
    still[2].paste((250, 20, 20), (64, 0, 96, 32))
    moving = clip(2, 0)
    sample = xi.capture(vlm, [], QUESTION, videos=[xi.Video(still, fps=2.0), moving])
    first, second = sample.video_grids
    n_cells = first.rows * first.cols
    assert n_cells < first.n_tokens < 3 * n_cells
    assert second.n_tokens == 2 * second.rows * second.cols
    shown = ~np.isnan(sample.grid(np.ones(first.n_tokens), video=0))
    assert shown[0].all()
    assert shown[1].sum() == 1  # each frame keeps at least one token
    changed = sample.tokens.iloc[sample.where("video", video=0, frame=2)]
    assert len(changed) == shown[2].sum() < n_cells
    assert (changed["x1"] > 64).all()
    assert sample.call(0, tower="vision").n_queries == len(first.patch_places) > 4 * n_cells
