"""Items of files, tables and data sets: values are those of the file, and the same everywhere."""

import json

import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

import xmodal_interp as xi
from tests.helpers.store_samples import items, shipped
from xmodal_interp.cli.commands import app
from xmodal_interp.errors import InputError, StoreError
from xmodal_interp.models.item_files import read_items, rows_of
from xmodal_interp.models.known_answers import batches_of

ID = "000000039769"
LONG = 1234567890123456789012
ROWS = [
    {"id": ID, "image": "a.png", "question": "how many shapes ?", "answer": "04", "note": ""},
    {"id": str(LONG), "image": "b.png", "question": 'what, "now" ?', "answer": "1e5", "note": "NA"},
]
CSV = (
    "\ufeffid,image,question,answer,note\r\n"
    f"{ID},a.png,how many shapes ?,04,\r\n"
    f'{LONG},b.png,"what, ""now"" ?",1e5,NA\r\n'
)


@pytest.fixture
def folder(tmp_path):
    for name, each in zip("ab", items(2), strict=True):
        each["image"].save(tmp_path / f"{name}.png")
    return tmp_path


def without_empty(rows, folder, **changes):
    """The rows as they are read: without empty strings, and with paths."""
    return [
        {k: v for k, v in row.items() if v != ""}
        | {"image": [str(folder / row["image"])]}
        | changes
        for row in rows
    ]


def test_cells_of_csv_are_strings(folder):
    (folder / "items.csv").write_bytes(CSV.encode())
    (folder / "items.tsv").write_bytes(b"id\timage\tprompt\n007\ta.png\t3,5 ?\n\n")
    assert read_items(folder / "items.csv") == without_empty(ROWS, folder)
    assert read_items(folder / "items.tsv") == [
        {"id": "007", "image": [str(folder / "a.png")], "prompt": "3,5 ?"}
    ]


def test_a_cell_may_hold_a_list_of_images_or_a_whole_image(folder):
    uri = "data:image/png;base64," + "A" * 200_000  # longer than the limit of the csv module
    lines = ["images,prompt", '"[""a.png"", ""b.png""]",?', "[, ?", f'"{uri}",?']
    (folder / "items.csv").write_text("\n".join([*lines[:2], lines[3]]))
    found = read_items(folder / "items.csv")
    assert [each["images"] for each in found] == [
        [str(folder / "a.png"), str(folder / "b.png")],
        [uri],
    ]
    (folder / "items.csv").write_text("\n".join(lines[:3]))
    with pytest.raises(InputError, match=r"items\.csv cannot be read as CSV: Expecting value"):
        read_items(folder / "items.csv")


def test_values_of_json_keep_their_types(folder):
    rows = [
        {"id": ID, "images": ["a.png"], "prompt": "?", "answer": "04", "n": 4, "hard": None},
        {"id": LONG, "image": str(folder / "b.png"), "prompt": "?", "share": 0.5, "hard": True},
        {"id": 3, "image": "https://example.org/a.png", "prompt": "?", "box": [1, 2]},
    ]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (folder / "items.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (folder / "items.json").write_text(json.dumps(rows))
    expected = [dict(row) for row in rows]
    expected[0]["images"] = [str(folder / "a.png")]
    expected[1]["image"] = [str(folder / "b.png")]
    expected[2]["image"] = ["https://example.org/a.png"]
    for name in ("items.jsonl", "items.json"):
        assert read_items(folder / name) == expected
        assert type(read_items(folder / name)[0]["n"]) is int


def test_values_of_parquet_keep_their_types(folder):
    table = pd.DataFrame({"id": [ID, str(LONG)], "prompt": ["?", "?"], "answer": ["04", None]})
    table["n"] = pd.array([2**53 + 1, None], dtype="Int64")
    contents = [(folder / name).read_bytes() for name in ("a.png", "b.png")]
    table["image"] = [
        {"bytes": contents[0], "path": None},
        {"bytes": None, "path": "b.png"},
    ]
    table.set_index("id").to_parquet(folder / "items.parquet")
    first, second = read_items(folder / "items.parquet")
    assert (first["id"], first["answer"], first["n"]) == (ID, "04", 2**53 + 1)
    assert first["image"][0]["bytes"] == contents[0]
    assert (second["id"], second["answer"], second["n"]) == (str(LONG), None, None)
    assert second["image"] == [str(folder / "b.png")]


def test_folders(folder):
    datasets = pytest.importorskip("datasets")
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "prompt": "?"}\n{"file_names": ["a.png", "b.png"], "prompt": "?"}'
    )
    assert read_items(folder) == [
        {"image": [str(folder / "a.png")], "prompt": "?"},
        {"images": [str(folder / "a.png"), str(folder / "b.png")], "prompt": "?"},
    ]
    features = datasets.Features(image=datasets.Image(), prompt=datasets.Value("string"))
    columns = {"image": [str(folder / "a.png")], "prompt": ["?"]}
    made = datasets.Dataset.from_dict(columns, features=features)
    made.save_to_disk(str(folder / "saved"))
    (found,) = read_items(folder / "saved")
    assert found["image"]["bytes"] == (folder / "a.png").read_bytes()
    (folder / "empty").mkdir()
    with pytest.raises(InputError) as refusal:
        read_items(folder / "empty")
    assert str(refusal.value) == (
        f"The folder of items {str(folder / 'empty')!r} must contain exactly one of "
        "metadata.jsonl, metadata.csv, metadata.parquet, or be written by "
        "datasets.Dataset.save_to_disk; it contains none of them."
    )


COCO = {
    "info": {"year": 2017},
    "images": [
        {"id": 39769, "file_name": "b.png", "width": 96, "height": 96},
        {"id": 7, "file_name": "a.png", "width": 96, "height": 96},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": "Two shapes ."},
        {"id": 2, "image_id": 7, "caption": "A circle ."},
    ],
}


def test_an_item_of_coco_captions_is_an_image(folder, tmp_path):
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "captions.json"
    file.write_text(json.dumps(COCO))
    assert read_items(file, image_folder=folder, prompt="what ?") == [
        {"id": 39769, "image": [str(folder / "b.png")], "captions": [], "prompt": "what ?"},
        {
            "id": 7,
            "image": [str(folder / "a.png")],
            "captions": ["Two shapes .", "A circle ."],
            "prompt": "what ?",
        },
    ]
    assert read_items(file)[0]["image"] == [str(file.parent / "b.png")]


def test_a_prompt_is_the_question_of_items_that_have_none(folder):
    (folder / "items.csv").write_text("image,question\na.png,how many ?\nb.png,\n")
    first, second = read_items(folder / "items.csv", prompt="what ?")
    assert first == {"image": [str(folder / "a.png")], "question": "how many ?"}
    assert second == {"image": [str(folder / "b.png")], "prompt": "what ?"}
    with pytest.raises(InputError) as refusal:
        read_items(folder / "items.csv", image_folder=folder / "no")
    assert str(refusal.value) == f"The folder of the images {str(folder / 'no')!r} does not exist."


def test_a_video_of_a_file_is_a_list_of_frames(folder):
    row = {"video": {"frames": ["a.png", "b.png"], "fps": 2.0}, "prompt": "?"}
    (folder / "items.jsonl").write_text(json.dumps(row))
    ((video,),) = [each["video"] for each in read_items(folder / "items.jsonl")]
    assert video.frames == (str(folder / "a.png"), str(folder / "b.png"))
    assert video.fps == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{}\n[1]", "a.jsonl cannot be read as JSONL: line 2 is a list, not an object."),
        (
            "a.jsonl",
            '{"id": NaN}',
            "a.jsonl cannot be read as JSONL: line 1: NaN is not a JSON value; null is a missing "
            "one.",
        ),
        (
            "a.jsonl",
            '{"id": 1}\n{"im',
            "a.jsonl cannot be read as JSONL: line 2: Unterminated string starting at: line 1 "
            "column 2 (char 1).",
        ),
        (
            "a.json",
            "{}",
            "a.json cannot be read as JSON: it must be a list of objects, not a dict.",
        ),
        ("a.json", "[1]", "a.json cannot be read as JSON: entry 0 is a int, not an object."),
        (
            "a.json",
            '{"images": [], "annotations": [{"id": 4, "bbox": [0, 0, 1, 1]}]}',
            "a.json cannot be read as JSON: the annotation 4 has no caption: only COCO files of "
            "captions are items.",
        ),
        (
            "a.json",
            '{"images": [], "annotations": [{"id": 4, "image_id": 9, "caption": "?"}]}',
            "a.json cannot be read as JSON: there is no image 9, which has a caption.",
        ),
        (
            "a.json",
            '{"images": [{"id": 1}, {"id": 1}], "annotations": []}',
            "a.json cannot be read as JSON: several entries of images have the same id.",
        ),
        (
            "a.csv",
            "image,prompt\na.png,what, now ?",
            "a.csv cannot be read as CSV: line 2 has 3 cells, and the header has 2.",
        ),
        (
            "a.csv",
            "image,id,id\na.png,1,2",
            "a.csv cannot be read as CSV: the header has several columns 'id'.",
        ),
        (
            "a.jsonl",
            '{"id": 1, "id": 2}',
            "a.jsonl cannot be read as JSONL: line 1: an object has several entries 'id'.",
        ),
        (
            "a.json",
            '[{"box": [{"x": 1, "y": 2, "x": 3}]}]',
            "a.json cannot be read as JSON: an object has several entries 'x'.",
        ),
        (
            "a.jsonl",
            '{"share": 1e400}',
            "a.jsonl cannot be read as JSONL: line 1: the number 1e400 is larger than a float can "
            "be.",
        ),
        (
            "a.json",
            '{"images": ["a.png"], "annotations": []}',
            "a.json cannot be read as JSON: entry 0 of images has no id.",
        ),
        (
            "a.json",
            '{"images": [{"id": 1}], "annotations": []}',
            "a.json cannot be read as JSON: entry 0 of images has no file_name.",
        ),
        (
            "a.json",
            '{"images": [], "annotations": [{"id": 4, "caption": "?"}]}',
            "a.json cannot be read as JSON: the annotation 4 has no image_id.",
        ),
        (
            "a.csv",
            "image,prompt, answer\na.png,?, yes",
            "a.csv cannot be read as CSV: the header has names with spaces around them, "
            "' answer'; remove the spaces after separators.",
        ),
        (
            "a.csv",
            "image,prompt,\na.png,?,yes",
            "a.csv cannot be read as CSV: column 3 of the header has no name.",
        ),
        ("a.csv", "", "a.csv has no rows; it must have at least one item."),
        (
            "a.xlsx",
            "",
            "The file of items must be one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet; got "
            "'a.xlsx'.",
        ),
    ],
)
def test_files_that_cannot_be_read_are_errors(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as refusal:
        read_items(tmp_path / name)
    assert str(refusal.value) == message


def test_the_index_of_a_table():
    table = pd.DataFrame({"prompt": ["a", "b", "c"], "n": [1, None, 3]})
    assert rows_of(table)[0] == {"prompt": "a", "n": 1.0}
    named = table.set_axis(pd.Index(["7", "08", "9"], name="image_id"))
    assert [row["image_id"] for row in rows_of(named)] == ["7", "08", "9"]
    assert "id" not in rows_of(named)[0]
    assert [row["id"] for row in rows_of(table.set_axis(["x", "y", "z"]))] == ["x", "y", "z"]
    assert [row["id"] for row in rows_of(table[table["n"] > 1])] == [2]
    assert all("id" not in row for row in rows_of(table.set_axis([0, 1, 0])))
    with_names = table.assign(name=["p", "q", "r"])
    assert rows_of(with_names[::2])[1] == {"prompt": "c", "n": 3.0, "name": "r"}
    assert rows_of(with_names.set_axis(["x", "y", "z"]))[0]["index"] == "x"
    levels = pd.MultiIndex.from_tuples([("v", 0), ("v", 1), ("w", 0)], names=["split", "id"])
    assert [(r["split"], r["id"]) for r in rows_of(table.set_axis(levels))] == [*levels]
    with pytest.raises(InputError) as refusal:
        rows_of(table.set_axis(pd.Index([1, 2, 3], name="n")))
    assert str(refusal.value) == (
        "The table has several columns (or a column and an index) named 'n'. Rename all except one."
    )


def test_the_index_that_pandas_wrote_into_a_csv_file_is_that_of_the_table(tmp_path):
    table = pd.DataFrame({"prompt": ["a", "b"]})
    tables = [table, table.set_axis([5, 7]), table.set_axis(["x", "y"])]
    found = []
    for each in [*tables, table.assign(name=["p", "q"]).set_axis(["x", "y"])]:
        each.to_csv(tmp_path / "a.csv")
        found.append(read_items(tmp_path / "a.csv"))
    assert found == [
        [{"prompt": "a"}, {"prompt": "b"}],
        [{"prompt": "a", "id": "5"}, {"prompt": "b", "id": "7"}],
        [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "y"}],
        [{"prompt": "a", "name": "p", "index": "x"}, {"prompt": "b", "name": "q", "index": "y"}],
    ]
    (tmp_path / "a.csv").write_text("prompt,,\na,,\n")  # empty columns, as Excel writes them
    with pytest.raises(InputError) as refusal:
        read_items(tmp_path / "a.csv")
    assert str(refusal.value) == ("a.csv cannot be read as CSV: the header has several columns ''.")
    (tmp_path / "a.csv").write_text("prompt,\na,\n")
    assert read_items(tmp_path / "a.csv") == [{"prompt": "a"}]


def test_numbers_of_a_table_are_not_rounded():
    table = pd.DataFrame({"n": [2**53 + 1, 2], "share": [0.5, 0.25]})  # no column of strings
    assert rows_of(table)[0] == {"n": 2**53 + 1, "share": 0.5}


def of_file(rows, folder):
    lines = [json.dumps(row) for row in rows]
    (folder / "items.jsonl").write_text("\n".join(lines))
    return folder / "items.jsonl"


def of_parquet(rows, folder):
    table = pd.DataFrame(rows).drop(columns="image")
    table["image"] = [
        {"bytes": (folder / row["image"]).read_bytes(), "path": row["image"]} for row in rows
    ]
    table.to_parquet(folder / "items.parquet")
    return folder / "items.parquet"


def of_csv(rows, folder):
    pd.DataFrame(rows).to_csv(folder / "items.csv", index=False, encoding="utf-8-sig")
    return folder / "items.csv"


def of_frame(rows, folder):
    paths = [folder / row["image"] for row in rows]
    return pd.DataFrame(rows).assign(image=paths).set_index("id")


def of_dataset(rows, folder):
    datasets = pytest.importorskip("datasets")
    strings = {name: datasets.Value("string") for name in rows[0]}
    features = datasets.Features(strings | {"image": datasets.Image()})
    columns = {name: [row[name] or None for row in rows] for name in rows[0]}
    columns["image"] = [str(folder / row["image"]) for row in rows]
    return datasets.Dataset.from_dict(columns, features=features)


def of_decoded(rows, folder):
    return [row | {"image": Image.open(folder / row["image"]), "note": None} for row in rows]


FORMS = {
    "csv": of_csv,
    "jsonl": of_file,
    "parquet": of_parquet,
    "frame": of_frame,
    "dataset": of_dataset,
    "decoded": of_decoded,
}


@pytest.mark.parametrize("begun", FORMS)
def test_a_store_begun_in_one_form_is_resumed_in_every_other(folder, begun):
    """Files, their bytes and their decoded pixels are the same image."""
    rows = [{**row, "note": None} for row in ROWS]
    store = xi.capture_dataset(
        shipped(), FORMS[begun](rows, folder), folder / "run", progress=False
    )
    assert store.names == (ID, str(LONG))
    assert [each.labels for each in store] == [{"answer": "04"}, {"answer": "1e5"}]
    written = {path: path.stat().st_mtime_ns for path in (folder / "run/samples").rglob("*")}
    for form in FORMS.values():
        xi.capture_dataset(shipped(), form(rows, folder), folder / "run", progress=False)
    files = ["--items", str(of_file(rows, folder)), "--max-new-tokens", "0"]
    result = CliRunner().invoke(app, ["capture", str(folder / "run"), *files])
    assert result.exit_code == 0, result.output
    assert {
        path: path.stat().st_mtime_ns for path in (folder / "run/samples").rglob("*")
    } == written
    changed = of_decoded(rows, folder)
    changed[1]["image"] = changed[1]["image"].rotate(180)
    for asked in (changed, [{**rows[0], "image": folder / "b.png"}]):
        with pytest.raises(StoreError, match="differs in prompt, labels or images"):
            xi.capture_dataset(shipped(), asked, folder / "run", progress=False)


def test_a_file_of_items_is_taken_wherever_items_are(folder):
    path = of_file([{**row, "answer": "4"} for row in ROWS], folder)
    found = xi.answer_accuracy(shipped(), path, max_new_tokens=1)
    assert found["prompt"].tolist() == [row["question"] for row in ROWS]
    assert found["answer"].tolist() == ["4", "4"]


def test_images_of_a_dataset_are_not_decoded_before_they_are_needed(folder):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(images=datasets.List(datasets.Image()))
    made = datasets.Dataset.from_dict({"images": [[str(folder / "a.png")]]}, features=features)
    (row,) = rows_of(made)
    assert row["images"] == [{"bytes": None, "path": str(folder / "a.png")}]
    formatted = made.with_format("numpy")
    assert rows_of(formatted) is formatted  # a format of the user's is kept
    grey = made.cast(datasets.Features(images=datasets.List(datasets.Image(mode="L"))))
    assert rows_of(grey) is grey  # datasets converts the images to its mode


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_a_string_is_no_list_of_messages(folder, name):
    """It would be run as a question, with the braces of its JSON."""
    chat = json.dumps([{"role": "user", "content": "what ?"}])
    item = {"image": folder / "a.png", name: chat}
    with pytest.raises(InputError) as refusal:
        xi.capture_dataset(shipped(), [item], folder / "run", progress=False)
    assert str(refusal.value) == (
        f"Item 0 ('item-000000'): {name} must be a list of messages; got the string {chat!r}. "
        "Parse it with json.loads if it is JSON, or pass a question as prompt."
    )


@pytest.mark.parametrize("answer", [["red", "blue"], {"text": "red"}, float("nan"), True])
def test_the_model_is_run_on_answers_that_are_text(folder, answer):
    item = {"image": folder / "a.png", "prompt": "what ?", "answer": answer}
    message = (
        f"an answer must be a string or a number; got {answer!r}. Choose one string to run the "
        "model on."
    )
    with pytest.raises(InputError) as refusal:
        xi.capture_dataset(shipped(), [item], folder / "run", given_answers=True, progress=False)
    assert str(refusal.value) == f"Item 0 ('item-000000'): {message}"
    with pytest.raises(InputError) as refusal:
        batches_of(shipped(), [item], batch_size=1)
    assert str(refusal.value) == f"Item 0: {message}"


def test_an_answer_may_be_a_number_or_a_label_of_any_kind(folder):
    item = {"image": folder / "a.png", "prompt": "what ?", "answer": 4}
    run = {"progress": False}
    store = xi.capture_dataset(shipped(), [item], folder / "run", given_answers=True, **run)
    assert (store[0].answer, store[0].labels) == ("4", {"answer": 4})
    several = item | {"answer": ["red", "blue"]}
    store = xi.capture_dataset(shipped(), [several], folder / "generated", **run)
    assert store[0].labels == {"answer": ["red", "blue"]}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}},
    ],
)
def test_relative_paths_in_messages_start_at_the_folder_of_the_file(folder, part):
    message = {"role": "user", "content": [part, {"type": "text", "text": "what ?"}]}
    (folder / "items.jsonl").write_text(json.dumps({"messages": [message]}))
    store = xi.capture_dataset(shipped(), folder / "items.jsonl", folder / "run", progress=False)
    given = Image.open(folder / "a.png").convert("RGB")
    assert store[0].images[0].tobytes() == given.tobytes()


def test_a_data_set_that_is_streamed(folder):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [str(folder / "a.png")], "prompt": ["what ?"]}
    features = datasets.Features(image=datasets.Image(), prompt=datasets.Value("string"))
    streamed = datasets.Dataset.from_dict(columns, features=features).to_iterable_dataset()
    store = xi.capture_dataset(shipped(), streamed, folder / "run", progress=False)
    assert [each.question for each in store] == ["what ?"]
    given = Image.open(folder / "a.png").convert("RGB")
    assert store[0].images[0].tobytes() == given.tobytes()
