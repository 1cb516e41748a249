"""Strips of panels: the frames of a video, also as an animation, and the tokens of an answer."""

import dataclasses
import functools
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import xmodal_interp as xi
from tests.helpers import synthetic
from tests.helpers.clips import QUESTION, clip, vlm_of
from tests.helpers.figure_samples import bars, fake, panels, titles, words
from xmodal_interp import figures
from xmodal_interp.errors import InputError
from xmodal_interp.figures.overlay_panels import dimmed
from xmodal_interp.sample import Sample


@functools.cache
def video_sample() -> Sample:
    """Return a sample of a video of 8 frames in 4 frames of tokens, 1 s apart."""
    return xi.capture(vlm_of("qwen2_vl"), [], QUESTION, videos=clip(8, 1), max_new_tokens=2)


def frames_drawn(figure: figures.Picture) -> list[np.ndarray]:
    """Return the pixels of the frames without a map."""
    alone = [a for a in figure.axes if len(a.images) == 1 and a not in bars(figure)]
    return [np.asarray(axes.images[0].get_array()) for axes in alone]


def test_each_frame_is_drawn_above_its_attention() -> None:
    sample = video_sample()
    grid = sample.video_grids[0]
    figure = figures.video_overlays(sample, "red circle", 0, 1)
    assert titles(figure) == [f"frame {i} ({i} s)" for i in range(4)]
    probs = sample.probs(0, 1, "red circle", sample.where("video"))[0].mean(0)
    expected = sample.grid(probs, video=0)
    assert grid.frames == len(panels(figure)) == 4
    pictures = frames_drawn(figure)
    for i, axes in enumerate(panels(figure)):
        ground, drawn = axes.images
        np.testing.assert_allclose(drawn.get_array(), expected[i], rtol=1e-4)
        np.testing.assert_array_equal(pictures[i], np.asarray(sample.videos[0].frames[2 * i]))
        np.testing.assert_array_equal(ground.get_array(), dimmed(pictures[i]))
    assert len({id(axes.images[1].norm) for axes in panels(figure)}) == len(bars(figure)) == 1
    said = words(figure).replace("\n", " ")
    assert '"red circle", language layer 0, head 1' in said
    assert "A frame of tokens is 2 frames of the video, drawn over the first." in said


def test_shares_are_of_the_attention_on_the_whole_video() -> None:
    figure = figures.video_overlays(video_sample(), "circle", show="share")
    drawn = [axes.images[1].get_array() for axes in panels(figure)]
    assert sum(float(cells.sum()) for cells in drawn) == pytest.approx(1, abs=1e-5)


def test_a_list_of_phrases_has_a_row_each_and_frames_can_be_chosen() -> None:
    sample = video_sample()
    figure = figures.video_overlays(sample, ["red", "circle"], frames=[3, 1])
    assert titles(figure) == ["frame 3 (3 s)", "frame 1 (1 s)"]
    assert [axes.get_ylabel() for axes in panels(figure)] == ['"red"', "", '"circle"', ""]
    probs = sample.probs(-1, None, "circle", sample.where("video"))[:, 0].mean(0)
    expected = sample.grid(probs, video=0, frame=3)
    np.testing.assert_allclose(panels(figure)[2].images[1].get_array(), expected, rtol=1e-4)
    assert "2 of 4 frames are drawn" in words(figure).replace("\n", " ")
    with pytest.raises(InputError) as beyond:
        figures.video_overlays(sample, "red", frames=[4])
    assert str(beyond.value) == "frames must be 1 to 24 frames between 0 and 3; got [4]."


def test_a_video_is_animated_as_gif(tmp_path: Path) -> None:
    path = figures.video_animation(video_sample(), "red circle", path=tmp_path / "new" / "a.gif")
    assert path == tmp_path / "new" / "a.gif"
    with Image.open(path) as animation:
        assert animation.n_frames == 4
        assert animation.info["duration"] == 1000  # ms: a frame of tokens is 1 s
        assert animation.info["loop"] == 0
        shown = []
        for i in range(4):
            animation.seek(i)
            shown.append(np.asarray(animation.convert("RGB")).astype(int))
    assert all(np.abs(shown[0] - other).max() > 100 for other in shown[1:])
    fast = figures.video_animation(video_sample(), "red", path=tmp_path / "b.gif", fps=10)
    with Image.open(fast) as animation:
        assert animation.info["duration"] == 100


def test_mp4_requires_ffmpeg_and_gives_it_all_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)  # as if it were not installed
    monkeypatch.setenv("PATH", str(tmp_path))
    target = tmp_path / "a.mp4"
    with pytest.raises(InputError) as missing:
        figures.video_animation(video_sample(), "red", path=target)
    assert str(missing.value) == (
        f"Writing {str(target)!r} requires ffmpeg. Install it, or run 'pip install "
        "imageio-ffmpeg'; or choose a path that ends in .gif."
    )
    program = tmp_path / "ffmpeg"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nopen(sys.argv[-1], 'w').write("
        "' '.join(sys.argv[1:-1]) + ' ' + str(len(sys.stdin.buffer.read())))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    figures.video_animation(video_sample(), "red", path=target, fps=4)
    *options, n_bytes = target.read_text().split()
    width, height = map(int, options[options.index("-s") + 1].split("x"))
    assert width % 2 == height % 2 == 0
    assert int(n_bytes) == 4 * 3 * width * height
    assert options[options.index("-r") + 1] == "4"
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no encoder')\n")
    with pytest.raises(InputError) as failed:
        figures.video_animation(video_sample(), "red", path=target)
    assert str(failed.value) == (
        f"ffmpeg could not write {str(target)!r}: no encoder. Choose a path that ends in .gif."
    )


def test_strips_refuse_samples_without_a_video_or_an_answer(tmp_path: Path) -> None:
    sample = video_sample()
    for call, message in (
        (
            lambda: figures.video_overlays(fake(), 9),
            "Sample 'fake' has no video to draw on. Capture it with xi.Video(frames).",
        ),
        (
            lambda: figures.video_overlays(sample, "red", video=1),
            "video must be between 0 and 0; got 1.",
        ),
        (
            lambda: figures.video_overlays(dataclasses.replace(sample, videos=()), "red"),
            "Sample 'sample-0' has the grids of 1 videos, but the frames of 0. Add the videos with "
            "dataclasses.replace(sample, videos=...).",
        ),
        (
            lambda: figures.video_overlays(sample, [0]),
            f"\"{sample.tokens['token'].iloc[0]}\" of sample 'sample-0' cannot attend to any of "
            f"the {len(sample.where('video'))} tokens of video 0. Choose a later position.",
        ),
        (
            lambda: figures.video_animation(sample, "red", path=tmp_path / "a.avi"),
            f"The file of a figure must end in gif, mp4; got {str(tmp_path / 'a.avi')!r}.",
        ),
        (
            lambda: figures.answer_overlays(fake("bsvvvvvvtt")),
            "Sample 'fake' has no generated tokens. Capture it with max_new_tokens=...",
        ),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value) == message


@pytest.mark.parametrize("predicts", [True, False])
def test_the_answer_is_drawn_token_by_token(predicts: bool) -> None:
    layout = "bs" + "v" * 6 + "tt" + "o" * 5
    sample = fake(layout, call=synthetic.random_call(len(layout)))
    figure = figures.answer_overlays(sample, head=1, predicts=predicts)
    assert titles(figure) == ["image", *(f"o{i}" for i in range(10, 15))]
    for i, axes in enumerate(panels(figure)):
        row = 10 + i - int(predicts)
        probs = sample.probs(-1, 1, [row], torch.arange(2, 8))[0, 0].numpy().reshape(2, 3)
        np.testing.assert_allclose(axes.images[1].get_array(), probs, rtol=1e-5)
    how = "that predicts it" if predicts else "of the token itself"
    said = words(figure).replace("\n", " ")
    assert f"Each panel: a generated token, with the attention of the position {how}." in said


def test_long_answers_have_pages_of_small_panels() -> None:
    layout = "bs" + "v" * 6 + "tt" + "o" * 200
    sample = fake(layout, call=synthetic.random_call(len(layout)))
    figure = figures.answer_overlays(sample, page=3)
    assert titles(figure)[1:] == [f"o{i}" for i in range(190, 210)]
    first = figures.answer_overlays(sample)
    assert len(panels(first)) == 60
    assert first.get_figwidth() < 14.5
    assert "Page 0: queries 1 to 60 of 200; 4 pages, by page=0 to 3." in words(first)
