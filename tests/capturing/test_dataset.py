"""Capture of data sets: resumed runs, batches, errors and failures."""

import logging
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import xmodal_interp as xi
from tests.helpers.store_samples import assert_same, items, shipped
from xmodal_interp.capturing import dataset
from xmodal_interp.capturing.dataset import capture_dataset
from xmodal_interp.errors import CaptureError, InputError, NotRecordedError, StoreError
from xmodal_interp.models import processor_calls
from xmodal_interp.store import check_store, open_store, schema, writer


@pytest.fixture
def captured(monkeypatch):
    """The batch size of each call of ``capture_batch``."""
    sizes: list[int] = []

    def counted(vlm, images, prompts, **options):
        sizes.append(len(prompts))
        return original(vlm, images, prompts, **options)

    original = dataset.capture_batch
    monkeypatch.setattr(dataset, "capture_batch", counted)
    return sizes


def run(path, asked, **options):
    return capture_dataset(shipped(), asked, path, **{"progress": False, **options})


def test_samples_equal_those_of_capture(tmp_path):
    asked = items(2)
    store = run(tmp_path, asked, max_new_tokens=3)
    assert store.names == ("item-000000", "item-000001")
    for found, item in zip(store, asked, strict=True):
        alone = xi.capture(shipped(), item["image"], item["prompt"], max_new_tokens=3)
        object.__setattr__(alone, "name", found.name)
        assert_same(found, alone)
        assert found.labels == {"answer": item["answer"]}
        assert found.provenance["model"] == shipped().name
        assert found.provenance["batch_size"] == 1
    assert check_store(tmp_path)["ok"].all()


def test_batches(tmp_path, captured):
    asked = items(3)
    store = run(tmp_path, asked, batch_size=2, max_new_tokens=2)
    assert captured == [2, 1]
    images, prompts = [[i["image"]] for i in asked[:2]], [i["prompt"] for i in asked[:2]]
    together = xi.capture_batch(shipped(), images, prompts, max_new_tokens=2)
    for found, expected in zip(store, together, strict=False):
        object.__setattr__(expected, "name", found.name)
        assert_same(found, expected)


def test_a_datasets_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    asked = items(2)
    columns = {name: [each[name] for each in asked] for name in ("prompt", "answer")}
    features = datasets.Features(
        image=datasets.Image(), prompt=datasets.Value("string"), answer=datasets.Value("string")
    )
    made = datasets.Dataset.from_dict(
        {**columns, "image": [each["image"] for each in asked]}, features=features
    )
    store = run(tmp_path, made)
    assert [each.labels["answer"] for each in store] == [each["answer"] for each in asked]
    assert store[1].images[0].tobytes() == asked[1]["image"].tobytes()


def test_rows_of_a_table(tmp_path):
    asked = items(2)
    store = run(tmp_path, pd.DataFrame(asked).assign(kind=["colour", None]))
    assert [each.labels for each in store] == [
        {"answer": asked[0]["answer"], "kind": "colour"},
        {"answer": asked[1]["answer"]},
    ]


def test_resuming(tmp_path, captured, caplog, capsys):
    asked = items(5)
    run(tmp_path, asked[:2])
    assert captured == [1, 1]
    with caplog.at_level(logging.INFO, logger="xmodal_interp.capturing.dataset"):
        store = run(tmp_path, iter(asked), batch_size=2)
    assert captured[2:] == [2, 1]
    assert len(store) == 5
    assert caplog.messages == [
        f"{tmp_path}: 2 of 5 samples were already in the store, 3 were captured, 0 failed."
    ]
    run(tmp_path, asked, progress=True)
    assert captured[4:] == []
    shown = capsys.readouterr()
    assert shown.out == ""
    counted = f"{tmp_path}: 5 of 5 samples were already in the store, 0 were captured, 0 failed."
    assert counted in shown.err
    assert "sample/s" in shown.err


def test_an_interrupted_run_can_be_resumed(tmp_path, captured):
    def interrupted():
        yield from items(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted(), batch_size=2)
    assert len(open_store(tmp_path)) == 2
    assert check_store(tmp_path)["ok"].all()
    assert len(run(tmp_path, items(3))) == 3
    assert captured == [2, 1]


def test_full_disk(tmp_path, monkeypatch):
    original = writer.write_file

    def write_file(path, content, **options):
        if "item-000001" in str(path):
            raise OSError(28, "No space left on device")
        original(path, content, **options)

    monkeypatch.setattr(writer, "write_file", write_file)
    with pytest.raises(StoreError, match="safe in the store: 1"):
        run(tmp_path, items(3), on_error="skip")
    monkeypatch.undo()
    assert open_store(tmp_path).names == ("item-000000",)
    assert len(run(tmp_path, items(3))) == 3


def test_another_item_of_the_same_name(tmp_path):
    asked = items(2)
    run(tmp_path, asked[:1])
    moved = [{**asked[0], "prompt": "how many ?"}, {**asked[0], "answer": "?"}, asked[1]]
    for item in moved:
        with pytest.raises(StoreError) as refusal:
            run(tmp_path, [item], on_error="skip")
        assert str(refusal.value) == (
            "Item 0 ('item-000000') differs in prompt, labels or images from the sample "
            f"'item-000000' in {tmp_path}. Give each item a unique name or id, or write to another "
            "folder."
        )


def test_other_settings(tmp_path):
    run(tmp_path, items(1))
    with pytest.raises(StoreError) as refusal:
        run(tmp_path, items(1), max_new_tokens=2, keep=xi.Keep(layers=(1,)), system="be brief .")
    assert str(refusal.value) == (
        f"The settings differ from those of the store {tmp_path}: kept.layers is None in the store "
        "and [1] now; max_new_tokens is 0 in the store and 2 now; system is None in the store and "
        "'be brief .' now. Use the same settings, or another folder."
    )


def test_another_model_or_changed_weights(tmp_path):
    run(tmp_path, items(1))
    with pytest.raises(StoreError, match="model_type is 'llava' in the store and 'qwen2_vl' now"):
        capture_dataset(shipped("qwen2_vl"), items(1), tmp_path, progress=False)
    again = xi.load()
    assert len(capture_dataset(again, items(1), tmp_path, progress=False)) == 1
    with torch.no_grad():
        next(again.model.parameters()).mul_(1.01)
    with pytest.raises(StoreError) as refusal:
        capture_dataset(again, items(1), tmp_path, progress=False)
    assert re.findall(r"(\S+) is '\w+' in the store", str(refusal.value)) == ["weights_digest"]


def test_probabilities_instead_of_queries_and_keys(tmp_path):
    exact = run(tmp_path / "exact", items(1))[0]
    dense = run(tmp_path / "dense", items(1), keep=xi.Keep(probabilities=True))[0]
    assert list(dense.calls) == list(exact.calls)
    for key, call in dense.calls.items():
        assert call.q is None
        assert call.k is None
        assert call.dense.dtype == torch.float16
        probs = exact.calls[key].probs()
        error = (call.probs() - probs).abs()
        assert (error <= probs * 2**-11 + 2**-25).all()  # half an ulp of float16, or of subnormals
        assert torch.equal(call.visible(), exact.calls[key].visible())
        file = f"{key[0]}-{key[1]}-{key[2]:03d}.safetensors"
        size = (tmp_path / "dense" / schema.SAMPLES / dense.name / file).stat().st_size
        header = size - probs.numel() * 2
        assert 0 < header < 300
    groups = exact.groups()
    of_groups = torch.from_numpy(np.stack(list(groups.values())))
    mass = exact.call(0).mass(of_groups)
    assert (dense.call(0).mass(of_groups) - mass).abs().max() < 1e-3


def test_text_rows_of_some_layers(tmp_path):
    keep = xi.Keep(towers=("language",), layers=(1, 3), queries="text", probabilities=True)
    exact = xi.capture(shipped(), items(1)[0]["image"], items(1)[0]["prompt"])
    found = run(tmp_path, items(1), keep=keep)[0]
    assert found.layers() == [1, 3]
    rows = exact.text_after_image().tolist()
    assert found.call(1).n_queries == len(rows)
    torch.testing.assert_close(
        found.probs(1, queries=rows), exact.probs(1, queries=rows), rtol=2**-11, atol=2**-25
    )
    with pytest.raises(NotRecordedError) as refusal:
        found.probs(2)
    assert str(refusal.value) == (
        "Layer 2 of language self-attention was not kept; kept layers: [1, 3]. Capture again with "
        "this layer."
    )
    with pytest.raises(NotRecordedError, match="does not hold the query rows 0;"):
        found.probs(1, queries=[0])
    with pytest.raises(NotRecordedError, match="Layer 0 of vision self-attention was not kept"):
        found.call(0, tower="vision")
    assert found.call(1).v is None


@pytest.mark.usefixtures("any_type")
def test_skipped_items_are_listed_and_tried_again(tmp_path, monkeypatch):
    """Failures are listed until they succeed; the other items of the batch are captured alone."""
    asked = [{**each, "name": name} for each, name in zip(items(4), "abcd", strict=True)]
    broken = [asked[0], {**asked[1], "image": "nowhere.png"}, *asked[2:], "e"]
    original = dataset.capture_batch

    def refusing(vlm, images, prompts, **options):
        if asked[3]["prompt"] in prompts:
            raise IndexError("index out of range in self")  # as if the input were too long
        return original(vlm, images, prompts, **options)

    monkeypatch.setattr(dataset, "capture_batch", refusing)
    for _ in range(2):  # a failure is listed once
        store = run(tmp_path, broken, batch_size=3, on_error="skip")
        assert store.names == ("a", "c")
        assert store.failures.fillna("").to_dict("records") == [
            {
                "item": 1,
                "name": "b",
                "error": "InputError",
                "message": "Item 1 ('b'): There is no image file 'nowhere.png'. Pass the path of "
                "an existing file, or a PIL image.",
            },
            {
                "item": 3,
                "name": "d",
                "error": "IndexError",
                "message": "index out of range in self",
            },
            {
                "item": 4,
                "name": "",
                "error": "InputError",
                "message": "Item 4 is a str; it must be a dict with image and prompt.",
            },
        ]
    monkeypatch.setattr(dataset, "capture_batch", original)
    store = run(tmp_path, asked, on_error="skip")
    assert sorted(store.names) == ["a", "b", "c", "d"]
    assert store.failures["item"].tolist() == [4]
    assert check_store(tmp_path)["ok"].all()


def broken_images(folder):
    """Three items whose image cannot be decoded, is too large or is closed; and a good one."""
    good = items(1)[0]["image"]
    good.save(folder / "good.png")
    (folder / "text.png").write_text("not an image")
    Image.new("1", (20_000, 20_000)).save(folder / "large.png")
    closed = Image.open(folder / "good.png")
    closed.close()
    images = {"text": folder / "text.png", "large": folder / "large.png", "closed": closed}
    return [
        {"id": name, "image": image, "prompt": "how many shapes ?"}
        for name, image in {**images, "good": good}.items()
    ]


def test_images_that_cannot_be_read_are_skipped(tmp_path):
    asked = broken_images(tmp_path)
    for _ in range(2):
        store = run(tmp_path / "run", asked, on_error="skip")
        assert store.names == ("good",)
        assert store.failures["name"].tolist() == ["text", "large", "closed"]
        assert store.failures["error"].eq("InputError").all()
    for number, item in enumerate(asked[:3]):
        with pytest.raises(InputError) as refusal:
            run(tmp_path / "raising", [item])
        title = f"Item 0 ({item['id']!r}): Pillow cannot read "
        assert str(refusal.value).startswith(title)
        assert store.failures["message"][number] == str(refusal.value).replace(
            "Item 0", f"Item {number}"
        )


def test_an_undecodable_image_of_a_data_set_is_skipped(tmp_path):
    datasets = pytest.importorskip("datasets")
    whole = items(1)[0]["image"]
    whole.save(tmp_path / "whole.png")
    contents = [b"not an image", (tmp_path / "whole.png").read_bytes()]
    features = datasets.Features(
        id=datasets.Value("string"), image=datasets.Image(), prompt=datasets.Value("string")
    )
    columns = {
        "id": ["bad", "good"],
        "image": [{"bytes": content, "path": None} for content in contents],
        "prompt": ["how many shapes ?"] * 2,
    }
    made = datasets.Dataset.from_dict(columns, features=features)
    grey = made.cast_column("image", datasets.Image(mode="L"))  # decoded by datasets itself
    for name, asked in {"a": made, "b": grey}.items():
        store = run(tmp_path / name, asked, on_error="skip")
        assert store.names == ("good",)
        assert store.failures["item"].tolist() == [0]


@pytest.mark.usefixtures("any_type")
def test_items_that_cannot_be_read_are_skipped(tmp_path):
    class Rows:
        """A data set as torch has them: with a length and numbered items."""

        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise OSError("disk error")
            return items(3)[index]

    store = run(tmp_path / "skipped", Rows(), on_error="skip")
    assert store.names == ("item-000000", "item-000002")
    assert store.failures.to_dict("records") == [
        {"item": 1, "name": None, "error": "OSError", "message": "disk error"}
    ]
    with pytest.raises(OSError, match="disk error") as refusal:
        run(tmp_path / "raised", Rows())
    assert refusal.value.__notes__ == ["Raised when item 1 was read."]


def test_a_store_without_samples_takes_other_settings(tmp_path, monkeypatch):
    """A first capture that failed does not fix the settings."""

    def refusing(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "capture_batch", refusing)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(tmp_path, items(1), max_new_tokens=3)
        assert len(run(tmp_path, items(1), max_new_tokens=3, on_error="skip").failures) == 1
    store = run(tmp_path, items(1), keep=xi.Keep(layers=[1]))
    assert store.names == ("item-000000",)
    assert store.manifest["settings"]["max_new_tokens"] == 0
    assert store.manifest["settings"]["kept"]["layers"] == [1]
    assert len(store.failures) == 0
    assert check_store(tmp_path)["ok"].all()
    with pytest.raises(StoreError, match="max_new_tokens is 0 in the store and 3 now"):
        run(tmp_path, items(1), keep=xi.Keep(layers=[1]), max_new_tokens=3)


def test_a_transparent_image_gets_the_background_of_the_processor(tmp_path, monkeypatch):
    """As in ``capture``; without a background of the processor it is white."""
    image = items(1)[0]["image"].convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))

    def black(image):
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")

    asked = [{"image": image, "prompt": "how many shapes ?"}]
    white = run(tmp_path / "white", asked)[0].images[0]
    for module in (dataset, processor_calls):
        monkeypatch.setattr(module, "composite_of", lambda _: black)
    alone = xi.capture(shipped(), image, "how many shapes ?").images[0]
    stored = run(tmp_path / "black", asked)[0].images[0]
    assert stored.tobytes() == alone.tobytes() == black(image).tobytes() != white.tobytes()


@pytest.mark.parametrize("given", [39769.0, True, ["a"], {}])
def test_names_that_are_no_strings_or_integers_are_errors(tmp_path, given):
    with pytest.raises(InputError) as refusal:
        run(tmp_path, [{**items(1)[0], "id": given}])
    assert str(refusal.value) == (
        f"Item 0: a name or id must be a string or an integer; got {given!r}. Pandas rounds the "
        "numbers of a column with missing ones: read it with dtype=str."
    )


def test_errors_of_the_model_name_the_items(tmp_path, monkeypatch):
    def refusing(*_, **__):
        raise CaptureError("missed")

    monkeypatch.setattr(dataset, "capture_batch", refusing)
    with pytest.raises(CaptureError, match="missed") as refusal:
        run(tmp_path, items(2), batch_size=2)
    assert str(refusal.value) == "missed"
    assert refusal.value.__notes__ == ["Raised by Item 0 ('item-000000'), Item 1 ('item-000001')."]


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        (
            {"train": []},
            {},
            "items must be a sequence of dicts, or one split of a data set; got a dict.",
        ),
        ([], {"batch_size": 0}, "batch_size must be 1 or more; got 0."),
        ([], {"on_error": "ignore"}, "on_error must be 'raise' or 'skip'; got 'ignore'."),
    ],
)
def test_invalid_options(tmp_path, asked, options, message):
    with pytest.raises(InputError) as refusal:
        run(tmp_path, asked, **options)
    assert str(refusal.value) == message
    assert list(tmp_path.iterdir()) == []


def test_no_items(tmp_path):
    assert len(run(tmp_path, [])) == 0
