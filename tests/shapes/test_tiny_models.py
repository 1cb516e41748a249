"""The shipped processors match those that the recipe builds, and the Qwen2-VL one reads videos."""

import pytest
from transformers import AutoProcessor

import xmodal_interp as xi
from tests.helpers.tiny import picture
from xmodal_interp.models.loading import shipped_path
from xmodal_interp.shapes.tiny_models import build_processor


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_shipped_templates_match_the_recipe(family: str) -> None:
    shipped = AutoProcessor.from_pretrained(shipped_path(family))
    assert shipped.chat_template == build_processor(family).chat_template


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_shipped_qwen2_vl_reads_videos() -> None:
    scene, blank = picture(seed=3), picture(seed=3)
    blank.paste((0, 0, 0), (0, 0, *blank.size))
    film = xi.Video([scene, scene, blank, blank], fps=2)  # two frames are merged into one
    sample = xi.capture(xi.load("qwen2_vl"), [], "how many shapes ?", videos=film, max_new_tokens=1)
    assert sample.video_grids[0].frames == 2
    tokens = sample.where("video", frame=0)
    assert len(tokens) == len(sample.where("video", frame=1)) == len(sample.where("video")) // 2
    assert sample.grid(sample.probs()[0, -1, sample.where("video")], video=0).shape[0] == 2
