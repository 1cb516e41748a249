"""Videos in a store: grids and frames are read unchanged; stores without videos can be read."""

import copy
import json

import numpy as np
import pytest

import xmodal_interp as xi
from tests.helpers.clips import QUESTION, clip, noise, vlm_of
from tests.helpers.store_samples import SETTINGS, assert_same, assert_same_fields, sample
from xmodal_interp.capturing.items import item_of
from xmodal_interp.errors import InputError, StoreError
from xmodal_interp.store import StoreWriter, check_store, open_store, schema

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def captured(**options) -> xi.Sample:
    videos = [clip(4, 0), clip(2, 1, 64, 64)]
    return xi.capture(vlm_of("qwen2_vl"), noise(64, 48, 1), QUESTION, videos=videos, **options)


def test_a_sample_with_videos_is_read_unchanged(tmp_path) -> None:
    before = captured(max_new_tokens=2)
    with StoreWriter(tmp_path, SETTINGS) as writer:
        writer.write(before)
    after = open_store(tmp_path)[0]
    assert_same(after, before)
    assert [len(video) for video in after.videos] == [4, 2]
    assert after.grid(np.arange(after.video_grids[1].n_tokens), video=1).shape == (1, 4, 4)
    assert set(after.groups()) == set(before.groups())
    assert check_store(tmp_path)["ok"].all()


def test_slices_of_frames_are_read_unchanged(tmp_path) -> None:
    vlm = vlm_of("minicpm_ocr")
    processor = copy.copy(vlm.processor)
    processor.video_processor = copy.copy(processor.video_processor)
    processor.video_processor.max_slice_nums = 2
    before = xi.capture(xi.VLM(vlm.model, processor), [], QUESTION, videos=clip(2, 0))
    with StoreWriter(tmp_path, SETTINGS) as writer:
        writer.write(before)
    ((grid,), (other,)) = (open_store(tmp_path)[0].video_grids, before.video_grids)
    found, expected = dict(vars(grid)), dict(vars(other))
    small, of_other = found.pop("thumbnail"), expected.pop("thumbnail")
    assert_same_fields(found, expected)
    assert_same_fields(vars(small), vars(of_other))
    assert found["tiles"].max() == 1
    assert check_store(tmp_path)["ok"].all()


def test_frames_that_are_not_stored_are_read_from_their_source(tmp_path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        noise(64, 64, i).save(path)
    items = [{"video": xi.Video(paths, fps=1.0), "prompt": QUESTION, "name": "a"}]
    options = {"images": False, "progress": False}
    store = xi.capture_dataset(vlm_of("qwen2_vl"), items, tmp_path / "store", **options)
    (video,) = store["a"].videos
    np.testing.assert_array_equal(np.asarray(video.frames[1]), np.asarray(noise(64, 64, 1)))
    assert not list((tmp_path / "store").rglob("*.png"))
    again = xi.capture_dataset(vlm_of("qwen2_vl"), items, tmp_path / "store", **options)
    assert len(again) == 1
    slower = [{**items[0], "video": xi.Video(paths, fps=2.0)}]
    with pytest.raises(StoreError, match="differs in prompt, labels or images from the sample"):
        xi.capture_dataset(vlm_of("qwen2_vl"), slower, tmp_path / "store", **options)


def test_a_sample_without_videos_has_neither_file_nor_arrays(tmp_path) -> None:
    with StoreWriter(tmp_path, SETTINGS) as writer:
        writer.write(sample())
    folder = tmp_path / schema.SAMPLES / "one"
    assert not (folder / schema.VIDEO_GRIDS).exists()
    record = json.loads((folder / schema.SAMPLE).read_text())
    assert record.pop("video_grids") == record.pop("videos") == []
    del record["digest"]  # releases without videos wrote neither member
    record["digest"] = schema.digest_of(record)
    (folder / schema.SAMPLE).write_text(schema.json_text(record))
    old = open_store(tmp_path)[0]
    assert old.video_grids == old.videos == ()
    assert_same(old, sample())


def test_the_error_names_a_damaged_grid_file(tmp_path) -> None:
    with StoreWriter(tmp_path, SETTINGS) as writer:
        writer.write(captured())
    path = next(tmp_path.rglob(schema.VIDEO_GRIDS))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StoreError, match=r"video_grids\.npz of sample 'sample-0' in .* is damaged"):
        _ = open_store(tmp_path)[0].video_grids


def test_a_path_instead_of_a_video_raises() -> None:
    with pytest.raises(InputError) as refusal:
        item_of(3, "x", {"video": "clip.mp4", "prompt": "?"})
    assert str(refusal.value) == "Item 3 ('x'): a video must be an xi.Video; got str."
    video = clip(2, 0)
    item = item_of(0, "x", {"videos": [video], "prompt": "?", "n": 3})
    assert (item.images, item.videos, item.labels) == ((), (video,), {"n": 3})
    assert item.digest != item_of(0, "x", {"images": [], "prompt": "?", "n": 3}).digest
