"""A store as a ``datasets.Dataset``, and back."""

import re

import numpy as np
import pytest
from datasets import load_from_disk

import xmodal_interp as xi
from tests.helpers.tiny import picture
from xmodal_interp.errors import InputError

QUESTION = "where is the red circle ?"


def captured(tmp_path, *labels, **options):
    items = [
        {"name": f"item-{i}", "image": picture(), "prompt": QUESTION, **each}
        for i, each in enumerate(labels)
    ]
    keep = xi.Keep(layers=[0])
    return xi.capture_dataset(
        xi.load(), items, tmp_path / "store", max_new_tokens=2, keep=keep, progress=False, **options
    )


def test_rows_hold_pictures_questions_answers_and_labels(tmp_path) -> None:
    store = captured(tmp_path, {"answer": "left", "box": [1, 2, 3, 4]}, {"answer": "right"})
    data = store.to_dataset()
    assert data.column_names == ["name", "images", "prompt", "captured_answer", "answer", "box"]
    assert data["name"][:] == ["item-0", "item-1"]
    assert data["prompt"][:] == [QUESTION] * 2
    assert data["captured_answer"][:] == [sample.answer for sample in store]
    assert data["box"][:] == [[1, 2, 3, 4], None]
    np.testing.assert_array_equal(np.asarray(data[0]["images"][0]), np.asarray(picture()))


def test_a_data_set_is_captured_again_with_the_same_attention(tmp_path) -> None:
    store = captured(tmp_path, {"answer": "left"})
    store.to_dataset().save_to_disk(tmp_path / "data")
    again = xi.capture_dataset(
        xi.load(), load_from_disk(tmp_path / "data"), tmp_path / "again", max_new_tokens=2,
        keep=xi.Keep(layers=[0]), progress=False,
    )  # fmt: skip
    assert again[0].answer == store[0].answer
    np.testing.assert_array_equal(again[0].probs(layer=0), store[0].probs(layer=0))


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (
            [{"prompted": 1}, {"prompted": "a"}],
            {},
            "The label 'prompted' has values of several types, which a column cannot hold (",
        ),
        (
            [{"captured_answer": "x"}],
            {},
            "Sample 'item-0' has a label 'captured_answer', which is the name of a column of the "
            "data set. Capture the sample with another name for the label; name, images, prompt, "
            "captured_answer are used.",
        ),
        (
            [{}],
            {"images": False},
            "The images of sample 'item-0' are not in the store. Capture it with images=True.",
        ),
    ],
)
def test_what_a_column_cannot_hold_is_an_error(tmp_path, labels, options, message) -> None:
    store = captured(tmp_path, *labels, **options)
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        store.to_dataset()
