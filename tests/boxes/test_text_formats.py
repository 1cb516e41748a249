"""Answers of models, read and written back."""

import math

import pandas as pd
import pytest

from xmodal_interp.boxes import TEXT_FORMATS, pixel_boxes, read_text, write_text
from xmodal_interp.errors import InputError

SIZE = (640, 480)
CAT, MUG = [160, 120, 480, 360], [0, 0, 320, 240]

ANSWERS = {
    "paligemma": "<loc0256><loc0256><loc0768><loc0768> person's hat, red ; "
    "<loc0000><loc0000><loc0512><loc0512> mug",
    "kosmos2": "<phrase>person's hat, red</phrase><object><patch_index_0264><patch_index_0759>"
    "</object><phrase>mug</phrase><object><patch_index_0000><patch_index_0495></object>",
    "qwen2_vl": "<|object_ref_start|>person's hat, red<|object_ref_end|><|box_start|>(250,250),"
    "(750,750)<|box_end|><|object_ref_start|>mug<|object_ref_end|><|box_start|>(0,0),(500,500)"
    "<|box_end|>",
    "internvl": "<ref>person's hat, red</ref><box>[[250, 250, 750, 750]]</box>"
    "<ref>mug</ref><box>[[0, 0, 500, 500]]</box>",
    "qwen3_vl": '[{"bbox_2d": [250, 250, 750, 750], "label": "person\'s hat, red"}, '
    '{"bbox_2d": [0, 0, 500, 500], "label": "mug"}]',
    "qwen2_5_vl": '[{"bbox_2d": [80, 30, 240, 90], "label": "person\'s hat, red"}, '
    '{"bbox_2d": [0, 0, 160, 60], "label": "mug"}]',
    "json yxyx 0..1": '[{"bbox_2d": [0.25, 0.25, 0.75, 0.75], "label": "person\'s hat, red"}, '
    '{"bbox_2d": [0, 0, 0.5, 0.5], "label": "mug"}]',
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_read_and_written_back(name: str) -> None:
    """Apostrophes and commas belong to the phrase (supervision 0.31.2 cuts it there)."""
    where = {"size": SIZE, "resized": (320, 120)}
    table = read_text(ANSWERS[name], name, **where)
    assert table["phrase"].tolist() == ["person's hat, red", "mug"]
    assert pixel_boxes(table).tolist() == [CAT, MUG]
    assert table[["x", "y"]].isna().all(axis=None)
    assert write_text(table, name, **where) == ANSWERS[name]


def test_bins_that_cannot_hold_these_boxes() -> None:
    answer = "café<loc_10><loc_20><loc_30><loc_40><loc_50><loc_60><loc_70><loc_80>dog"
    answer += "<loc_1><loc_2><loc_3><loc_4>"
    table = read_text(f"</s><s>{answer}</s>", "florence2", size=(1000, 2000))
    assert table["phrase"].tolist() == ["café", "café", "dog"]
    assert table[["x0", "y0", "x1", "y1"]].to_numpy().tolist() == [
        [10.5, 41, 30.5, 81],
        [50.5, 121, 70.5, 161],
        [1.5, 5, 3.5, 9],
    ]
    assert write_text(table, "florence2", size=(1000, 2000)) == answer
    answer = "<|ref|>a tree<|/ref|><|det|>[[100, 200, 999, 999], [0, 0, 9, 9]]<|/det|>"
    table = read_text(answer, "deepseek_vl2", size=(999, 999))
    assert pixel_boxes(table).tolist() == [[100, 200, 999, 999], [0, 0, 9, 9]]
    assert write_text(table, "deepseek_vl2", size=(999, 999)) == answer


def test_several_boxes_of_one_phrase() -> None:
    answer = (
        "<grounding> Two<phrase> cats</phrase><object><patch_index_0000><patch_index_0000>"
        "</delimiter_of_multi_objects/><patch_index_0033><patch_index_0099></object> and more"
        "<object><patch_index_1023><patch_index_1023></object>"
    )
    table = read_text(answer, "kosmos2", size=(320, 320))
    assert table["phrase"].isna().tolist() == [False, False, True]
    assert table["phrase"].tolist()[:2] == ["cats", "cats"]
    assert pixel_boxes(table).tolist() == [[0, 0, 10, 10], [10, 10, 40, 40], [310, 310, 320, 320]]
    assert write_text(table[:2], "kosmos2", size=(320, 320)) == (
        "<phrase>cats</phrase><object><patch_index_0000><patch_index_0000>"
        "</delimiter_of_multi_objects/><patch_index_0033><patch_index_0099></object>"
    )


def test_segmentation_tokens_are_passed_over() -> None:
    """supervision 0.31.2 finds no box in an answer of PaliGemma's task "segment"."""
    answer = "<loc0256><loc0256><loc0768><loc0768>" + "<seg012>" * 16 + " cat"
    table = read_text(answer, "paligemma", size=SIZE)
    assert table["phrase"].tolist() == ["cat"]
    assert pixel_boxes(table).tolist() == [CAT]


def test_the_forms_of_json() -> None:
    """A code block, one object, a list of boxes in one object, no label, and points."""
    one = '```json\n{"bbox_2d": [[250, 250, 750, 750], [0, 0, 500, 500]]}\n```'
    table = read_text(one, "qwen3_vl", size=SIZE)
    assert pixel_boxes(table).tolist() == [CAT, MUG]
    assert table["phrase"].isna().all()
    points = '[{"point_2d": [500, 250], "label": "eye"}, {"bbox_2d": [0, 0, 500, 500]}]'
    table = read_text(f"Here they are:\n```json\n{points}\n```", "qwen3_vl", size=SIZE)
    assert table[["x", "y"]].iloc[0].tolist() == [320, 120]
    assert table.iloc[0][["x0", "y0", "x1", "y1"]].isna().all()
    assert table.iloc[1][["x0", "y0", "x1", "y1"]].tolist() == MUG
    assert write_text(table, "qwen3_vl", size=SIZE) == points
    within = f'The mug is at {{"bbox_2d": [0, 0, 500, 500]}}, and also: {points}. That is all.'
    assert read_text(within, "qwen3_vl", size=SIZE)["x0"].dropna().tolist() == [0, 0]
    y_first = '[{"box_2d": [0, 500, 500, 1000], "label": "lamp"}]'
    table = read_text(y_first, "json yxyx 0..1000", size=SIZE)
    assert pixel_boxes(table).tolist() == [[320, 0, 640, 240]]


def test_points_in_per_cent() -> None:
    one = '<point x="50.0" y="25.0" alt="a &quot;b&quot; &amp; c">a &quot;b&quot; &amp; c</point>'
    table = read_text(f"It is here: {one}.", "molmo", size=SIZE)
    assert table[["phrase", "x", "y"]].to_numpy().tolist() == [['a "b" & c', 320, 120]]
    assert write_text(table, "molmo", size=SIZE) == one
    two = '<points x1="50.0" y1="25.0" x2="10.5" y2="90.0" alt="cats">cats</points>'
    table = read_text(two, "molmo", size=SIZE)
    assert table["x"].tolist() == [320, pytest.approx(67.2)]
    assert write_text(table, "molmo", size=SIZE) == two


def test_an_answer_without_boxes_is_an_empty_table() -> None:
    for name in TEXT_FORMATS:
        empty = ["[]"] if name.startswith(("json", "qwen2_5", "qwen3")) else []
        for answer in ("There is no cat.", *empty):
            table = read_text(answer, name, size=SIZE, resized=SIZE)
            assert len(table) == 0, name
            assert table.columns.tolist() == ["phrase", "x0", "y0", "x1", "y1", "x", "y"]


REFUSALS = {
    "cut": (
        lambda: read_text(
            "<loc0001><loc0002><loc0300><loc0400> cat ; <loc0001>", "paligemma", size=SIZE
        ),
        "The text has '<loc0001>' outside whole boxes of this format. Check the name of the format "
        "and that the answer was not cut.",
    ),
    "the other loc": (
        lambda: read_text("cat<loc_1><loc_2><loc_300><loc_400>", "paligemma", size=SIZE),
        "The text has '<loc_1> <loc_2> <loc_300> <loc_400>' outside whole boxes of this format. "
        "Check the name of the format and that the answer was not cut.",
    ),
    "JSON as tags": (
        lambda: read_text('[{"bbox_2d": [1, 2, 3, 4]}]', "internvl", size=SIZE),
        "The text has '\"bbox_2d\"' outside whole boxes of this format. Check the name of the "
        "format and that the answer was not cut.",
    ),
    "cut JSON": (
        lambda: read_text('[{"bbox_2d": [1, 2', "qwen3_vl", size=SIZE),
        "The text has a bracket that is not JSON (Expecting ',' delimiter: line 1 column 19 (char "
        "18)): '[{\"bbox_2d\": [1, 2'. Check the name of the format and that the answer was not "
        "cut.",
    ),
    "lists without objects": (
        lambda: read_text("Here it is: [[1, 2, 3, 4]]", "qwen3_vl", size=SIZE),
        "The JSON must be a list of objects; got [[1, 2, 3, 4]].",
    ),
    "tags as JSON": (
        lambda: read_text("cat<box>[]</box>", "qwen3_vl", size=SIZE),
        "The text has '<box>' outside whole boxes of this format. Check the name of the format and "
        "that the answer was not cut.",
    ),
    "no box in an object": (
        lambda: read_text('{"label": "cat"}', "qwen3_vl", size=SIZE),
        "An object must have one of bbox_2d, bbox, box_2d, point_2d, point; got label.",
    ),
    "three numbers": (
        lambda: read_text('{"bbox_2d": [1, 2, 3]}', "qwen3_vl", size=SIZE),
        "The format 'xyxy 0..1000' has 4 numbers for each box or point; got [[1, 2, 3]].",
    ),
    "no resized size": (
        lambda: read_text('{"bbox_2d": [1, 2, 3, 4]}', "qwen2_5_vl", size=SIZE),
        "The format 'xyxy resized px' requires resized=(width, height) of the picture that the "
        "model read.",
    ),
    "a cut point": (
        lambda: read_text('<point x="5', "molmo", size=SIZE),
        "The text has '<point x=\"5' outside whole boxes of this format. Check the name of the "
        "format and that the answer was not cut.",
    ),
    "no such format": (
        lambda: read_text("cat", "qwen", size=SIZE),
        "There is no text format 'qwen'. The formats are paligemma, florence2, kosmos2, qwen2_vl, "
        "internvl, deepseek_vl2, molmo, qwen2_5_vl, qwen3_vl, and 'json ORDER UNIT' such as 'json "
        "xyxy 0..1000'.",
    ),
    "no columns": (
        lambda: write_text(pd.DataFrame({"phrase": ["cat"]}), "qwen3_vl", size=SIZE),
        "boxes lacks the columns x0, y0, x1, y1.",
    ),
    "a box as a point": (
        lambda: write_text(
            pd.DataFrame([["cat", *CAT]], columns=["phrase", "x0", "y0", "x1", "y1"]),
            "molmo",
            size=SIZE,
        ),
        "The format 'molmo' has points only; got a box.",
    ),
    "a point as a box": (
        lambda: write_text(
            pd.DataFrame(
                [["cat", *[math.nan] * 4, 3.0, 4.0]],
                columns=["phrase", "x0", "y0", "x1", "y1", "x", "y"],
            ),
            "kosmos2",
            size=SIZE,
        ),
        "This format has no points; drop the rows without a box.",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    ask, message = REFUSALS[name]
    with pytest.raises(InputError) as refusal:
        ask()
    assert str(refusal.value) == message


def test_a_label_that_is_null_is_no_phrase():
    (row,) = read_text(
        '[{"bbox_2d": [250, 250, 750, 750], "label": null}]', "qwen3_vl", size=(640, 480)
    ).to_dict("records")
    assert row["phrase"] is None
    assert [row[name] for name in ("x0", "y0", "x1", "y1")] == [160, 120, 480, 360]


def test_an_object_with_two_boxes_of_one_name_is_an_error():
    text = '[{"bbox_2d": [1, 2, 3, 4], "bbox_2d": [5, 6, 7, 8]}]'
    with pytest.raises(InputError) as refusal:
        read_text(text, "qwen3_vl", size=(640, 480))
    assert str(refusal.value) == (
        "An object must have one value for each name; got [('bbox_2d', [1, 2, 3, 4]), "
        "('bbox_2d', [5, 6, 7, 8])]. Choose one."
    )
