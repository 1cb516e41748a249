"""Summaries in notebooks: what they state, and that text of users is inert."""

import re
from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

import xmodal_interp as xi
from tests.helpers.store_samples import items, shipped
from xmodal_interp.html_summary import html_summary

HOSTILE = "<script>alert(1)</script>\x1b[31m & \u202e"


def rows_of(page: str) -> dict[str, str]:
    return dict(re.findall(r"<tr><th[^>]*>(.*?)</th><td[^>]*>(.*?)</td></tr>", page))


def pictures_in(page: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [Image.open(BytesIO(b64decode(each))) for each in found]


def test_text_is_escaped_and_empty_rows_are_left_out() -> None:
    page = html_summary(HOSTILE, {"a": HOSTILE, "b": ""})
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[31m &amp; \\u202e"
    assert page == (
        f"<div><strong>{escaped}</strong><div></div><table><tr>"
        f'<th style="text-align:left">a</th><td style="text-align:left">{escaped}</td></tr>'
        "</table></div>"
    )


def test_pictures_are_small_and_few() -> None:
    images = [Image.new("RGB", (3000, 1000), "red"), *(Image.new("L", (9, 7)) for _ in range(7))]
    page = html_summary("x", {}, images)
    found = pictures_in(page)
    assert [each.size for each in found] == [(720, 240), *((9, 7) for _ in range(5))]
    assert found[0].getpixel((0, 0)) == (255, 0, 0)
    assert "<div>and 2 more images</div>" in page


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> xi.Store:
    folder = tmp_path_factory.mktemp("html") / "store"
    return xi.capture_dataset(shipped(), items(6), folder, max_new_tokens=2, progress=False)


def test_a_sample_shows_its_images_and_what_was_asked(store) -> None:
    sample = store[0]
    page = sample._repr_html_()
    rows = rows_of(page)
    assert rows["question"] == sample.question
    assert rows["answer"] == sample.answer
    kinds = sample.tokens["kind"].value_counts()
    assert rows["tokens"] == ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    assert rows["layers"] == "4 language self, 3 vision self"
    (picture,) = pictures_in(page)
    assert np.array_equal(np.asarray(picture), np.asarray(sample.images[0]))


def test_a_sample_without_its_image_files_has_a_summary(tmp_path) -> None:
    (item,) = items(1)
    item["image"].save(tmp_path / "a.png")
    asked = [{"image": str(tmp_path / "a.png"), "prompt": item["prompt"]}]
    xi.capture_dataset(shipped(), asked, tmp_path / "run", images=False, progress=False)
    (tmp_path / "a.png").unlink()
    page = xi.open_store(tmp_path / "run")[0]._repr_html_()
    assert "question" in rows_of(page)
    assert pictures_in(page) == []


def test_a_store_shows_its_samples_and_settings(store) -> None:
    rows = rows_of(store._repr_html_())
    first = ", ".join(f"item-{i:06d}" for i in range(5))
    assert rows["samples"] == f"6: {first}, ..."
    assert rows["dtype"] == store.manifest["settings"]["dtype"]
    assert f"<strong>Store {store.path}</strong>" in store._repr_html_()


def test_a_model_shows_its_class_and_number_of_weights() -> None:
    vlm = shipped()
    rows = rows_of(vlm._repr_html_())
    n_weights = sum(each.numel() for each in vlm.model.parameters())
    assert rows == {
        "model": "LlavaForConditionalGeneration",
        "processor": "LlavaProcessor",
        "model type": "llava",
        "weights": f"{n_weights:,} in torch.float32 on cpu",
    }
