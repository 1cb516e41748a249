"""``Recording.sample``: samples of vision models without a processor of transformers."""

from typing import Any

import numpy as np
import pytest
import torch

import xmodal_interp as xi
from tests.helpers.tiny import picture, tiny_vlm
from tests.helpers.vision import registers_vlm
from xmodal_interp.errors import CaptureError, GeometryError, InputError
from xmodal_interp.hooks import Recording

NAMES = ["class", "register 0", "register 1"]


def recorded(*images: Any) -> Recording:
    vlm = registers_vlm()
    inputs, _ = vlm.prepare([[image] for image in images], [""] * len(images))
    with torch.no_grad(), xi.record(vlm.model) as recording:
        vlm.model(**inputs)
    return recording


def test_a_sample_of_a_recording_equals_the_captured_one() -> None:
    images = [picture(60, 40), picture(60, 40, seed=1)]
    recording = recorded(*images)
    for index, image in enumerate(images):
        sample = recording.sample(image, grid=(4, 4), before=NAMES, index=index, name="it")
        captured = xi.capture(registers_vlm(), image, name="it")
        assert sample.tower == "vision"
        assert sample.tokens.equals(captured.tokens)
        for layer in captured.layers():
            assert (sample.probs(layer) - captured.probs(layer)).abs().max() < 1e-5
        mine, theirs = (xi.attention_rollout(each) for each in (sample, captured))
        np.testing.assert_allclose(mine["rollout"], theirs["rollout"], atol=1e-5)


def test_a_timm_model() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=64, depth=2, num_heads=3
    ).eval()
    with torch.no_grad(), xi.record(model) as recording:
        model(torch.rand(1, 3, 64, 64))
    sample = recording.sample(picture(96, 96), grid=(4, 4), before=["class"], box=(0, 0, 96, 80))
    assert sample.layers() == [0, 1]
    assert sample.tokens["y1"].max() == 80
    table = xi.attention_rollout(sample)
    assert table["rollout"].sum() == pytest.approx(1)
    assert table["query_token"].eq("class").all()


def test_other_positions_must_be_named() -> None:
    with pytest.raises(GeometryError) as caught:
        recorded(picture()).sample(picture(), grid=(4, 4))
    assert str(caught.value) == (
        "vision self-attention, layer 0, call 0 has 19 queries and 19 keys, but the grid has 4 x 4 "
        "patches and 0 other positions. Name the other positions, such as before=['class']."
    )
    with pytest.raises(InputError) as refused:
        recorded(picture()).sample(picture(), grid=(0, 4), before=NAMES)
    assert str(refused.value) == "grid must be an integer from 1 to 10000000; got 0."
    with pytest.raises(InputError) as outside:
        recorded(picture()).sample(picture(), grid=(4, 4), before=NAMES, index=1)
    assert str(outside.value) == "index must be an integer from 0 to 0; got 1."


def test_recordings_without_one_run_of_a_vision_model() -> None:
    vlm = registers_vlm()
    inputs, _ = vlm.prepare([[picture()]], [""])
    with torch.no_grad(), xi.record(vlm.model) as recording:
        vlm.model(**inputs)
        vlm.model(**inputs)
    with pytest.raises(CaptureError) as caught:
        recording.sample(picture(), grid=(4, 4), before=NAMES)
    assert str(caught.value) == (
        "Vision self-attention of layer 0 ran 2 times. Run the model once inside the block, on a "
        "batch of images without windows."
    )
    language = tiny_vlm("llava")
    inputs, _ = language.prepare([[picture()]], ["what is it ?"])
    with torch.no_grad(), xi.record(language.model, towers=["language"]) as recording:
        language.model(**inputs)
    with pytest.raises(CaptureError) as caught:
        recording.sample(picture(), grid=(4, 4))
    assert str(caught.value) == (
        "The recording holds no call of a vision tower; it holds: language. Call sample after the "
        "block, and run a vision model inside it."
    )
