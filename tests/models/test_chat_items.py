"""Chats as files and data sets hold them: the same samples from each."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import xmodal_interp as xi
from tests.helpers.store_samples import shipped
from tests.helpers.tiny import picture
from xmodal_interp.capturing.dataset import capture_dataset
from xmodal_interp.capturing.run import capture
from xmodal_interp.cli.commands import app
from xmodal_interp.errors import InputError
from xmodal_interp.models.chats import read_chat

ONE, OTHER = picture(seed=1), picture(seed=2)
FIRST, SECOND = "what color is the circle ?", "where is it ?"


def messages(*pictures) -> list[dict]:
    """Return a chat with an image in each question, as lists of parts without None."""
    parts = [{"type": "image", **({} if each is None else {"image": each})} for each in pictures]
    return [
        {"role": "user", "content": [parts[0], {"type": "text", "text": FIRST}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": [{"type": "text", "text": SECOND}, parts[1]]},
        {"role": "assistant", "content": [{"type": "text", "text": "top left"}]},
    ]


CONVERSATION = [
    {"from": "human", "value": f"<image>\n{FIRST}"},
    {"from": "gpt", "value": "red"},
    {"from": "human", "value": f"{SECOND}\n<image>"},
    {"from": "gpt", "value": "top left"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ONE.save(tmp_path / "one.png")
    OTHER.save(tmp_path / "other.png")
    return tmp_path


def write(folder: Path, kind: str) -> Path:
    """Write one item, in one of the forms, and return its path."""
    paths = ["one.png", "other.png"]
    row = {"id": "007", "messages": messages(*paths)}
    if kind == "llava.json":
        row = {"id": "007", "image": paths, "conversations": CONVERSATION}
        (folder / kind).write_text(json.dumps([row]))
    elif kind == "qwen.jsonl":
        (folder / kind).write_text(json.dumps(row) + "\n")
    elif kind == "separate.jsonl":
        row = {"id": "007", "messages": messages(None, None), "images": paths}
        (folder / kind).write_text(json.dumps(row) + "\n")
    elif kind == "prompt.jsonl":
        row = {"id": "007", "prompt": messages(*paths)}
        (folder / kind).write_text(json.dumps(row) + "\n")
    elif kind == "cells.csv":
        cells = {"id": "007", "messages": json.dumps(messages(*paths))}
        pd.DataFrame([cells]).to_csv(folder / kind, index=False)
    elif kind == "structs.parquet":
        pd.DataFrame([row]).to_parquet(folder / kind)
    else:
        datasets = pytest.importorskip("datasets")
        row = {"id": "007", "messages": messages(None, None), "images": [ONE, OTHER]}
        features = datasets.Features(
            {
                "id": datasets.Value("string"),
                "images": datasets.List(datasets.Image()),
                "messages": datasets.List(
                    {
                        "role": datasets.Value("string"),
                        "content": datasets.List(
                            {"type": datasets.Value("string"), "text": datasets.Value("string")}
                        ),
                    }
                ),
            }
        )
        datasets.Dataset.from_list([row], features=features).save_to_disk(folder / kind)
    return folder / kind


KINDS = (
    *("llava.json", "qwen.jsonl", "separate.jsonl", "prompt.jsonl", "cells.csv"),
    *("structs.parquet", "saved"),
)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_samples_from_each_form_and_the_command_line(kind: str, folder: Path) -> None:
    path = write(folder, kind)
    options = ["--items", str(path), "--given-answers"]
    shown = CliRunner().invoke(app, ["capture", str(folder / "run"), *options])
    assert shown.exit_code == 0, shown.output
    (sample,) = xi.open_store(folder / "run")
    expected = capture(shipped(), prompt=messages(ONE, OTHER))
    pd.testing.assert_frame_equal(sample.tokens, expected.tokens)
    assert torch.equal(sample.probs(), expected.probs())
    assert (sample.name, sample.answer, sample.question) == ("007", "top left", SECOND)
    assert sample.labels == {"answer": "top left"}
    assert [each.tobytes() for each in sample.images] == [ONE.tobytes(), OTHER.tobytes()]
    assert sample.provenance["messages"] == expected.provenance["messages"]
    resumed = capture_dataset(shipped(), path, folder / "run", given_answers=True, progress=False)
    assert resumed.names == ("007",)


def test_rows_of_a_data_set_in_memory(folder: Path) -> None:
    """``datasets`` fills the missing entries of parts with None."""
    datasets = pytest.importorskip("datasets")
    content = [
        {"type": "text", "text": FIRST, "image": None},
        {"type": "image", "image": "one.png"},
    ]
    content[1] = {**content[1], "image": str(folder / "one.png")}
    rows = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": content}]}])
    assert rows[0]["messages"][0]["content"][1]["text"] is None
    (sample,) = capture_dataset(shipped(), rows, folder / "run", progress=False)
    assert sample.text == f"<bos>user: {FIRST} <image> assistant:"
    assert sample.images[0].tobytes() == ONE.tobytes()


PLACES = "({'type': 'image'} or <image>)"
MISMATCHED = {
    "too many images": (
        "<image> where ?",
        [ONE, OTHER],
        f"The messages have 1 places for images that are passed separately {PLACES}, but 2 were "
        "passed. Pass one image for each place.",
    ),
    "too few images": (
        [{"type": "image"}, {"type": "image"}, "where ?"],
        [ONE],
        f"The messages have 2 places for images that are passed separately {PLACES}, but 1 were "
        "passed. Pass one image for each place.",
    ),
    "all places are filled": (
        [{"type": "image", "image": ONE}, "where ?"],
        [OTHER],
        f"The messages have 0 places for images that are passed separately {PLACES}, but 1 were "
        "passed. Pass one image for each place.",
    ),
}


@pytest.mark.parametrize("case", MISMATCHED)
def test_images_that_do_not_match_the_places(case: str) -> None:
    content, images, message = MISMATCHED[case]
    with pytest.raises(InputError) as refusal:
        capture(shipped(), images, [{"role": "user", "content": content}])
    assert str(refusal.value) == message


def test_images_of_an_item_that_do_not_match_the_places(tmp_path: Path) -> None:
    item = {"image": [ONE], "conversations": CONVERSATION, "id": "x"}
    with pytest.raises(InputError) as refusal:
        capture_dataset(shipped(), [item], tmp_path / "run", progress=False)
    assert str(refusal.value) == (
        f"Item 0 ('x'): The messages have 2 places for images that are passed separately {PLACES}, "
        "but 1 were passed. Pass one image for each place."
    )


def test_messages_and_conversations_together(tmp_path: Path) -> None:
    item = {"messages": messages(ONE, OTHER), "conversations": CONVERSATION}
    with pytest.raises(InputError) as refusal:
        capture_dataset(shipped(), [item], tmp_path / "run", progress=False)
    assert str(refusal.value) == (
        "Item 0 ('item-000000') has both 'messages' and 'conversations' (its entries are messages, "
        "conversations). Give exactly one that is not None."
    )


@pytest.mark.parametrize("url", ["image_url", "url"])
def test_a_picture_of_a_message_is_fetched_from_a_file_url(url: str, folder: Path) -> None:
    address = (folder / "one.png").as_uri()
    part = (
        {"type": "image_url", "image_url": {"url": address, "detail": "auto"}}
        if url == "image_url"
        else {"type": "image", "url": address}
    )
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "where ?"}]}]
    sample = capture(shipped(), prompt=chat)
    assert sample.images[0].tobytes() == ONE.tobytes()


def test_a_detail_that_would_not_be_read_is_an_error() -> None:
    part = {"type": "image_url", "image_url": {"url": "one.png", "detail": "high"}}
    with pytest.raises(InputError) as refusal:
        capture(shipped(), prompt=[{"role": "user", "content": [part, "where ?"]}])
    assert str(refusal.value) == (
        "The detail 'high' of an image_url would not be read. Leave it out; processor_options sets "
        "the resolution."
    )


def test_messages_are_not_changed() -> None:
    given = messages(ONE, OTHER)
    before = json.dumps(given, default=str)
    read_chat(given)
    capture(shipped(), prompt=given)
    assert json.dumps(given, default=str) == before
