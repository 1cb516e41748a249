"""Tables: order of rows, keys in front, and attributes that can be written as JSON."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from tests.helpers.synthetic import sample_of
from xmodal_interp.analysis.tables import Taken, long_table, over_samples, stacked


def test_rows_are_in_the_order_of_the_axes() -> None:
    values = {"p": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "n": np.array([[5], [6]])}
    part = {"tower": "vision"} | long_table({"head": [4, 7], "query": ["x", "y"]}, values)
    table = stacked([part])
    assert table.to_numpy().tolist() == [
        ["vision", 4, "x", 1.0, 5],
        ["vision", 4, "y", 2.0, 5],
        ["vision", 7, "x", 3.0, 6],
        ["vision", 7, "y", 4.0, 6],
    ]


def test_provenance_is_listed_once_if_only_the_date_and_the_item_differ() -> None:
    samples = [
        sample_of("t", [], provenance={"model": model, "item": item, **of_sample})
        for model, item, of_sample in (
            ("m", "a", {"created": "today", "batch_size": 2}),
            ("m", "b", {"created": "today", "batch_size": 1, "videos": [["a.png"]]}),
            ("n", "a", {"created": "tomorrow"}),
        )
    ]
    table = over_samples(
        samples,
        lambda _: [long_table({"head": [0]}, {"share": 0.5})],
        "something",
        {},
    )
    assert table.attrs["provenance"] == [
        {"model": "m"},
        {"model": "n"},
    ]


def test_samples_with_the_same_name_are_numbered_in_the_order_given() -> None:
    names = ["a", "b", "a", "a (2)", "a"]
    table = over_samples(
        [sample_of("t", [], name=name) for name in names],
        lambda _: [long_table({"head": [0]}, {"share": 0.5})],
        "something",
        {},
    )
    assert table["sample"].tolist() == ["a", "b", "a (2)", "a (2) (2)", "a (3)"]
    assert table.attrs["numbered"] == {"a (2)": "a", "a (2) (2)": "a (2)", "a (3)": "a"}


def test_attributes_are_json() -> None:
    parameters = {
        "queries": torch.tensor([1, 2]),
        "heads": slice(0, None, 2),
        "sinks": {3, 1},
        "threshold": np.float64(0.3),
        "layers": (0, -1),
    }
    table = over_samples(
        sample_of("t", [], provenance={"model": "m", "layers": (0, 1)}),
        lambda _: [long_table({"head": [0]}, {"share": 0.5})],
        "something",
        parameters,
    )
    assert json.loads(json.dumps(table.attrs)) == table.attrs
    assert table.attrs == {
        "analysis": "something",
        "parameters": {
            "queries": [1, 2],
            "heads": "0::2",
            "sinks": [1, 3],
            "threshold": 0.3,
            "layers": [0, -1],
        },
        "provenance": {"model": "m", "layers": [0, 1]},
        "n_samples": 1,
    }


def test_text_of_many_parts_is_one_chunk_in_the_order_given() -> None:
    """A column of one chunk per part would be many times slower to filter."""
    tokens = [pd.array(words, dtype="string") for words in (["a", "b"], ["c", None, "e"])]
    numbers = pd.array([1, None], dtype="Int64")
    parts = [
        {"sample": "one", "token": Taken(tokens[0], np.array([1, 0])), "image": numbers},
        {"sample": "two", "token": Taken(tokens[1], np.array([2, 1])), "image": numbers},
        {"sample": "one", "token": Taken(tokens[0], np.array([0, 0])), "image": numbers},
    ]
    table = stacked(parts)
    assert table["sample"].tolist() == ["one", "one", "two", "two", "one", "one"]
    assert table["token"].tolist() == ["b", "a", "e", pd.NA, "a", "a"]
    assert table["image"].tolist() == [1, pd.NA] * 3
    assert table.dtypes[["token", "image"]].astype(str).tolist() == ["string", "Int64"]
    for name in ("sample", "token"):
        assert isinstance(pa.array(table[name]), pa.Array)  # else a ChunkedArray
