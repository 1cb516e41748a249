"""Items of ten kinds give the same samples, through Python and the command line."""

import base64
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import xmodal_interp as xi
from tests.helpers.store_samples import items, shipped
from xmodal_interp.cli.commands import app

QUESTION = "how many shapes ?"
NAMES = ("000000039769", "007")
FILES = ("a.png", "b.png")
ANSWERS = ("04", "1e5")
LABELLED = [
    {"id": name, "image": file, "prompt": QUESTION, "answer": answer}
    for name, file, answer in zip(NAMES, FILES, ANSWERS, strict=True)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, each in zip(FILES, items(2), strict=True):
        each["image"].save(tmp_path / name)
    return tmp_path


@pytest.fixture
def url(folder: Path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


def lines(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "items.jsonl"


def of_jsonl(folder: Path, _: str) -> Path:
    return lines(folder, LABELLED)


def of_csv_with_bom(folder: Path, _: str) -> Path:
    pd.DataFrame(LABELLED).to_csv(folder / "items.csv", index=False, encoding="utf-8-sig")
    assert (folder / "items.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    return folder / "items.csv"


def of_parquet(folder: Path, _: str) -> Path:
    pd.DataFrame(LABELLED).to_parquet(folder / "items.parquet")
    return folder / "items.parquet"


def of_datasets(folder: Path, _: str) -> Path:
    datasets = pytest.importorskip("datasets")
    strings = {name: datasets.Value("string") for name in LABELLED[0]}
    columns = {name: [row[name] for row in LABELLED] for name in LABELLED[0]}
    columns["image"] = [str(folder / file) for file in FILES]
    features = datasets.Features(strings | {"image": datasets.Image()})
    made = datasets.Dataset.from_dict(columns, features=features)
    made.save_to_disk(str(folder / "saved"))
    return folder / "saved"


def of_llava_conversations(folder: Path, _: str) -> Path:
    rows = [
        {
            "id": row["id"],
            "image": row["image"],
            "conversations": [
                {"from": "human", "value": f"<image>\n{row['prompt']}"},
                {"from": "gpt", "value": row["answer"]},
            ],
        }
        for row in LABELLED
    ]
    (folder / "llava.json").write_text(json.dumps(rows))
    return folder / "llava.json"


def of_qwen_messages(folder: Path, _: str) -> Path:
    rows = []
    for row in LABELLED:
        content = [
            {"type": "image", "image": row["image"]},
            {"type": "text", "text": row["prompt"]},
        ]
        answer = {"role": "assistant", "content": row["answer"]}
        messages = [{"role": "user", "content": content}, answer]
        rows.append({"id": row["id"], "messages": messages})
    return lines(folder, rows)


def of_coco_captions(folder: Path, _: str) -> Path:
    images = [{"id": i, "file_name": file} for i, file in enumerate(FILES)]
    captions = [{"id": 1, "image_id": 1, "caption": "Two shapes ."}]
    (folder / "captions.json").write_text(
        json.dumps({"images": images, "annotations": captions, "info": {}})
    )
    return folder / "captions.json"


def of_a_folder(folder: Path, _: str) -> Path:
    named = pd.DataFrame(LABELLED).rename(columns={"image": "file_name"})
    named.to_csv(folder / "metadata.csv", index=False)
    return folder


def of_bytes(folder: Path, _: str) -> Path:
    table = pd.DataFrame(LABELLED)
    table["image"] = [{"bytes": (folder / file).read_bytes(), "path": None} for file in FILES]
    table.to_parquet(folder / "bytes.parquet")
    return folder / "bytes.parquet"


def of_urls(folder: Path, url: str) -> Path:
    inline = base64.b64encode((folder / FILES[1]).read_bytes()).decode()
    addresses = [f"{url}/{FILES[0]}", f"data:image/png;base64,{inline}"]
    return lines(folder, [row | {"image": at} for row, at in zip(LABELLED, addresses, strict=True)])


KINDS = {
    "JSONL": of_jsonl,
    "CSV with BOM": of_csv_with_bom,
    "Parquet": of_parquet,
    "datasets": of_datasets,
    "LLaVA conversations": of_llava_conversations,
    "Qwen messages": of_qwen_messages,
    "COCO captions": of_coco_captions,
    "folder": of_a_folder,
    "bytes": of_bytes,
    "URLs": of_urls,
}


@pytest.fixture(scope="module")
def expected() -> list[xi.Sample]:
    return [xi.capture(shipped(), each["image"], QUESTION, max_new_tokens=2) for each in items(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_items_gives_the_same_samples(kind, folder, url, expected) -> None:
    file = KINDS[kind](folder, url)
    is_coco = kind == "COCO captions"
    options = {"prompt": QUESTION} if is_coco else {}
    store = xi.capture_dataset(
        shipped(),
        xi.read_items(file, **options),
        folder / "python",
        max_new_tokens=2,
        progress=False,
    )
    command = ["capture", str(folder / "line"), "--items", str(file), "--max-new-tokens", "2"]
    done = CliRunner().invoke(app, [*command, *(["--prompt", QUESTION] if is_coco else [])])
    assert done.exit_code == 0, done.output
    labels = [{"answer": answer} for answer in ANSWERS]
    if is_coco:
        labels = [{"captions": []}, {"captions": ["Two shapes ."]}]
    for made in (store, xi.open_store(folder / "line")):
        assert made.names == (("0", "1") if is_coco else NAMES)
        for sample, label, same in zip(made, labels, expected, strict=True):
            assert sample.labels == label
            assert sample.question == QUESTION
            assert sample.answer == same.answer
            tokens = sample.tokens.copy()
            if "turn" in tokens:  # of chats only: the question, then the generated answer
                turn = tokens.pop("turn")
                assert turn.dropna().unique().tolist() == [0, 1]
                is_generated = tokens["role"].eq("generated")
                assert turn.eq(1).fillna(False).tolist() == is_generated.tolist()
            pd.testing.assert_frame_equal(tokens, same.tokens)
            assert np.array_equal(np.asarray(sample.images[0]), np.asarray(same.images[0]))
            for layer in sample.layers():
                assert torch.equal(sample.probs(layer), same.probs(layer))
    if not is_coco:  # a run that Python began is continued by the command line
        before = {path: path.stat().st_mtime_ns for path in (folder / "python").rglob("*.json")}
        command[1] = str(folder / "python")
        resumed = CliRunner().invoke(app, command)
        assert resumed.exit_code == 0, resumed.output
        after = {path: path.stat().st_mtime_ns for path in (folder / "python").rglob("*.json")}
        assert {k: v for k, v in after.items() if "samples" in k.parts} == {
            k: v for k, v in before.items() if "samples" in k.parts
        }
