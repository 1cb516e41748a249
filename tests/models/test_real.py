"""Every real processor can be saved and loaded, and its tiny model runs on its outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from tests.helpers.families import RECORDS
from tests.helpers.real import inputs, real
from tests.helpers.tiny import picture

SIZES = ((96, 96), (120, 64))  # width, height; px
BUILT = [name for name, record in RECORDS.items() if not record.obstacle]
SEVERAL = [name for name in BUILT if RECORDS[name].several]
# transformers converts tensors to numpy in a way that numpy deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def inputs_of(model_type: str, *images: Image.Image, processor: Any = None) -> dict[str, Any]:
    return inputs(model_type, [images], ["where is the red circle?"], processor=processor)


@pytest.mark.parametrize("model_type", BUILT)
def test_loads_as_it_was_saved(model_type: str, tmp_path: Path) -> None:
    _, made = real(model_type)
    made.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(made)
    before = inputs_of(model_type, picture(*SIZES[1]))
    after = inputs_of(model_type, picture(*SIZES[1]), processor=loaded)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", BUILT)
def test_runs_on_images_of_any_shape(model_type: str) -> None:
    model, _ = real(model_type)
    for width, height in SIZES:
        with torch.no_grad():
            output = model(**inputs_of(model_type, picture(width, height)))
        assert torch.isfinite(output.logits).all()


@pytest.mark.parametrize("model_type", BUILT)
def test_logits_depend_on_the_image(model_type: str) -> None:
    model, _ = real(model_type)
    logits = []
    for seed in (0, 1):
        with torch.no_grad():
            logits.append(model(**inputs_of(model_type, picture(96, 96, seed))).logits)
    assert not torch.equal(*logits)


@pytest.mark.parametrize("model_type", SEVERAL)
def test_runs_on_two_images(model_type: str) -> None:
    model, _ = real(model_type)
    first, second = picture(*SIZES[0]), picture(*SIZES[1], seed=1)
    one = inputs_of(model_type, first)["input_ids"]
    both = inputs_of(model_type, first, second)
    assert both["input_ids"].shape[1] > one.shape[1]
    with torch.no_grad():
        assert torch.isfinite(model(**both).logits).all()


@pytest.mark.parametrize("model_type", [name for name in RECORDS if name not in BUILT])
def test_the_obstacle_to_building_is_named(model_type: str) -> None:
    with pytest.raises(LookupError) as refusal:
        real(model_type)
    assert RECORDS[model_type].obstacle in str(refusal.value)
