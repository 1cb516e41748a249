"""Reading a store: laziness, indexing and errors."""

import hashlib
import json
import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from jaxtyping import config as jaxtyping_config
from PIL import Image

from tests.helpers.store_samples import SETTINGS, N, assert_same, call, sample
from xmodal_interp.errors import NotRecordedError, StoreError
from xmodal_interp.sample import Sample
from xmodal_interp.store import StoreWriter, check_store, files, open_store, schema

RUN_CHECK = (
    "Run `xmodal check` on the store to list all damaged files; delete a damaged sample's folder "
    "and capture the sample again."
)


@pytest.fixture
def store_path(tmp_path):
    mask = torch.ones(1, 1, N, N, dtype=torch.bool).tril()
    with StoreWriter(tmp_path / "run", SETTINGS) as writer:
        for name in ("b", "a", "c"):
            writer.write(sample(name, [call(i, mask=mask, causal=False) for i in range(3)]))
    return tmp_path / "run"


def of_sample(store_path, name="b"):
    return store_path / schema.SAMPLES / name


def whole(sample):
    """Read the tables, the grids and the first layer of a sample."""
    return sample.tokens, sample.cross_keys, sample.grids, sample.video_grids, sample.call(0)


@pytest.fixture(autouse=True)
def _no_type_checks():
    """Disable the type checks of tests, which read every mapping passed to a Sample."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture
def opened_files(monkeypatch):
    """Return a list to which the names of opened tensor files are added."""
    names: list[str] = []

    def counted(path, **options):
        names.append(path.name)
        return original(path, **options)

    original = files.safe_open
    monkeypatch.setattr(files, "safe_open", counted)
    return names


def test_a_layer_reads_its_own_file(store_path, opened_files):
    found = open_store(store_path)[0]
    assert found.layers() == [0, 1, 2]
    assert len(found.calls) == 3
    assert ("language", "self", 7, 0) not in found.calls
    repr(found), repr(open_store(store_path)), found.groups(), found.where("text")
    assert opened_files == []
    held = found.call(1)
    assert opened_files == ["language-self-001.safetensors", schema.SHARED]
    assert found.call(1) is held
    found.call(2)
    assert opened_files[2:] == ["language-self-002.safetensors"]  # layer 1's mask is reused


def test_images_are_read_when_used(store_path):
    image = open_store(store_path)[0].images[0]
    (of_sample(store_path) / "image-0.png").unlink()
    assert image.size == (8, 4)
    with pytest.raises(StoreError) as refusal:
        image.load()
    assert str(refusal.value) == (
        f"image-0.png of sample 'b' in {of_sample(store_path)} is damaged: it is missing. "
        f"{RUN_CHECK}"
    )


def test_sequence(store_path):
    store = open_store(store_path)
    assert len(store) == 3
    assert store.names == ("b", "a", "c")  # as written
    assert [each.name for each in store] == ["b", "a", "c"]
    assert [each.name for each in reversed(store)] == ["c", "a", "b"]
    assert [each.name for each in store[1:]] == ["a", "c"]
    assert (store[0].name, store[-1].name, store["a"].name) == ("b", "c", "a")
    assert "a" in store
    assert store[0] in store
    assert "d" not in store
    assert isinstance(store[0], Sample)
    assert [each.name for each in pickle.loads(pickle.dumps(store))] == ["b", "a", "c"]
    assert store.n_bytes == sum(p.stat().st_size for p in store_path.rglob("*") if p.is_file())
    assert repr(store) == f"Store({str(store_path)!r}: 3 samples; none; values: False)"
    assert store.manifest["settings"] == SETTINGS
    assert len(store.failures) == 0


def test_a_pickled_sample_has_neither_pixels_nor_the_files_that_others_verified(store_path):
    store = open_store(store_path)
    size = len(pickle.dumps(store["a"]))
    for each in store:
        whole(each)
    sample = store["a"]
    assert len(pickle.dumps(sample)) < size + 50  # references to equal strings differ
    (of_sample(store_path, "a") / "image-0.png").unlink()
    (image,) = pickle.loads(pickle.dumps(sample)).images
    with pytest.raises(StoreError, match=r"image-0\.png of sample 'a'"):
        image.load()


def test_a_stored_sample_can_be_pickled(store_path):
    found = open_store(store_path)[0]
    assert_same(pickle.loads(pickle.dumps(found)), found)


def test_missing_samples_and_layers(store_path):
    store = open_store(store_path)
    with pytest.raises(IndexError) as refusal:
        store[3]
    assert str(refusal.value) == f"{store_path} has no sample 3: it has 3 samples."
    with pytest.raises(NotRecordedError) as refusal:
        store["x"]
    assert str(refusal.value) == f"{store_path} has no sample 'x'. It has 'b', 'a', 'c'."
    with pytest.raises(NotRecordedError) as refusal:
        store[0].call(3)  # the sample's provenance lists layer 3
    assert "was not kept; kept layers: [0, 1, 2]." in str(refusal.value)


def test_queries_that_were_not_recorded(tmp_path):
    with StoreWriter(tmp_path, SETTINGS) as writer:
        rows = call(q=torch.randn(1, 2, 2, 3), rows=torch.tensor([1, 4]))
        writer.write(sample(calls=[rows]))
    found = open_store(tmp_path)[0]
    assert found.probs(0, queries=[1, 4]).shape == (2, 2, N)
    with pytest.raises(NotRecordedError, match=r"the query rows 2; it holds 1, 4\."):
        found.probs(0, queries=[1, 2])


def test_no_store(tmp_path):
    for path, problem in (
        (tmp_path, "it contains no file manifest.json"),
        (tmp_path / "x", "it does not exist"),
    ):
        for action in (open_store, check_store):
            with pytest.raises(StoreError) as refusal:
                action(path)
            assert str(refusal.value) == (
                f"{path} is not a store: {problem}. Pass a folder that capture_dataset has written."
            )


@pytest.mark.parametrize("of", [schema.MANIFEST, f"{schema.SAMPLES}/b/{schema.SAMPLE}"])
def test_another_version_or_format(store_path, of):
    path = store_path / of
    written = path.read_text()
    path.write_text(json.dumps({**json.loads(written), "version": 5}))
    with pytest.raises(StoreError) as refusal:
        open_store(store_path)[0]
    read = "version 2" if of == schema.MANIFEST else "version 2 or 3 or 4"
    assert str(refusal.value) == (
        f"{path} has version 5 of the store format, but this release reads {read}. Open it with "
        "the release that wrote it, or capture again."
    )
    path.write_text(json.dumps({**json.loads(written), "format": "zarr"}))
    with pytest.raises(StoreError) as refusal:
        open_store(store_path)[0]
    assert str(refusal.value) == (
        f"{path} is not a file of a store, or is damaged: its format is zarr instead of "
        "xmodal_interp.store."
    )


@pytest.mark.parametrize("file", [schema.TOKENS, schema.GRIDS, "language-self-000.safetensors"])
def test_another_version_of_one_file(store_path, file, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(schema.STAMP, "version", 9)
        patch.setattr("xmodal_interp.store.encoding._TEXT_STAMP", {**schema.STAMP, "version": "9"})
        patch.setattr(schema, "VERSION", 9)
        with StoreWriter(store_path.with_name("later"), SETTINGS) as writer:
            writer.write(sample("b", [call(0)]))
    path = of_sample(store_path) / file
    later = of_sample(store_path.with_name("later")) / file
    path.write_bytes(later.read_bytes())
    record = files.read_record(of_sample(store_path))
    record["files"][file] = {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    record["digest"] = schema.digest_of(record)
    (of_sample(store_path) / schema.SAMPLE).write_text(schema.json_text(record))
    with pytest.raises(StoreError) as refusal:
        whole(open_store(store_path)[0])
    assert str(refusal.value) == (
        f"{path} has version 9 of the store format, but this release reads version 2. Open it with "
        "the release that wrote it, or capture again."
    )


def test_truncated_tensors(store_path):
    path = of_sample(store_path) / "language-self-001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    store = open_store(store_path)
    store[0].call(0)  # other layers can be read
    with pytest.raises(StoreError) as refusal:
        store[0].call(1)
    assert str(refusal.value) == (
        f"language-self-001.safetensors of sample 'b' in {path.parent} is damaged: it has "
        f"{len(whole) - 8} bytes instead of {len(whole)}. {RUN_CHECK}"
    )
    path.unlink()
    with pytest.raises(StoreError) as refusal:
        store[0].call(1)
    assert f"{path.name} of sample 'b' in {path.parent} is damaged: it is missing." in str(
        refusal.value
    )


@pytest.mark.parametrize(
    "file", [schema.SAMPLE, schema.TOKENS, schema.GRIDS, "language-self-000.safetensors"]
)
@pytest.mark.parametrize("garbage", [b"", b"\x00" * 40, b"{}", b"\xff\xfe[1]"])
def test_garbage(store_path, file, garbage):
    path = of_sample(store_path) / file
    n_bytes = path.stat().st_size
    path.write_bytes(garbage.ljust(n_bytes, b"\x00") if file.endswith("tensors") else garbage)
    with pytest.raises(StoreError) as refusal:
        whole(open_store(store_path)["b"])
    assert str(path.parent) in str(refusal.value)
    assert file in str(refusal.value)
    table = check_store(store_path)
    assert table.loc[~table["ok"], ["sample", "file"]].to_numpy().tolist() == [["b", file]]


def test_edited_json(store_path):
    path = of_sample(store_path) / schema.SAMPLE
    path.write_text(path.read_text().replace('"is it"', '"is he"'))
    with pytest.raises(StoreError) as refusal:
        open_store(store_path)[0]
    assert str(refusal.value) == (
        f"sample.json of sample 'b' in {path.parent} is damaged: its digest does not match its "
        f"content. {RUN_CHECK}"
    )
    manifest = store_path / schema.MANIFEST
    manifest.write_text(manifest.read_text().replace("none", "some"))
    with pytest.raises(StoreError) as refusal:
        open_store(store_path)
    assert str(refusal.value) == (
        f"manifest.json of the store in {store_path} is damaged: its digest does not match its "
        f"settings. {RUN_CHECK}"
    )


def test_check(store_path):
    table = check_store(store_path)
    assert list(table.columns) == ["sample", "file", "ok", "problem"]
    assert table["ok"].all()
    assert (table["problem"] == "").all()
    own = {schema.SAMPLE, schema.TOKENS, schema.GRIDS, schema.SHARED, "image-0.png"}
    own |= {f"language-self-00{i}.safetensors" for i in range(3)}
    assert table.loc[table["sample"] == "", "file"].tolist() == [schema.MANIFEST, schema.NAMES]
    assert len(table) == 2 + 3 * len(own)
    assert set(table.loc[table["sample"] == "a", "file"]) == own

    flipped = of_sample(store_path, "a") / "language-self-000.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    cut = of_sample(store_path, "a") / "image-0.png"
    size = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[:10])
    (of_sample(store_path, "a") / schema.SHARED).unlink()
    (of_sample(store_path, "a") / "notes.txt").write_text("")
    of_sample(store_path, "c").rename(of_sample(store_path, "d"))
    table = check_store(store_path)
    assert {
        tuple(row) for row in table.loc[~table["ok"], ["sample", "file", "problem"]].to_numpy()
    } == {
        ("a", flipped.name, "its checksum differs from the recorded one"),
        ("a", cut.name, f"it has 10 bytes instead of {size}"),
        ("a", schema.SHARED, "it is missing"),
        ("a", "notes.txt", "it is not part of the sample"),
        ("d", schema.SAMPLE, "it belongs to sample 'c'"),
        ("c", schema.SAMPLE, "the sample was written, but its folder does not exist"),
    }


def test_check_without_samples(store_path):
    shutil.rmtree(store_path / schema.SAMPLES)
    assert len(open_store(store_path)) == 0
    assert check_store(store_path)["ok"].tolist() == [True, True, False, False, False]


def test_order_is_restored_without_the_list_of_names(store_path):
    (store_path / schema.NAMES).unlink()
    assert open_store(store_path).names == ("b", "a", "c")
    for name in "abc":  # records of the first release have no number
        record = files.read_record(of_sample(store_path, name))
        del record["number"]
        text = schema.json_text({**record, "digest": schema.digest_of(record)})
        (of_sample(store_path, name) / schema.SAMPLE).write_text(text)
    assert open_store(store_path).names == ("a", "b", "c")


def test_tables_keep_their_column_types(store_path):
    found = open_store(store_path)[0]
    pd.testing.assert_series_equal(found.tokens.dtypes, sample().tokens.dtypes)
    assert found.grid(np.arange(2.0)).tolist() == [[0, 1]]
    assert isinstance(found.images[0], Image.Image)


def test_tables_and_grids_are_read_when_they_are_accessed(store_path, monkeypatch):
    """A sample that is only counted, listed or selected by its labels reads no table."""
    read = []
    for name in ("table_from", "grids_from"):
        original = getattr(files.encoding, name)

        def counted(*args, original=original, name=name):
            read.append(name)
            return original(*args)

        monkeypatch.setattr(files.encoding, name, counted)
    store = open_store(store_path)
    assert [(each.name, each.question) for each in store] == [(n, "is it") for n in "bac"]
    first = store[0]
    renamed, sent = first.changed(name="other"), pickle.loads(pickle.dumps(first))
    assert read == []
    assert first.tokens is first.tokens
    assert read == ["table_from"]
    assert first.grids is first.grids
    assert read == ["table_from", "grids_from"]
    assert renamed.name == "other"
    for copied in (renamed, sent):
        pd.testing.assert_frame_equal(copied.tokens, sample("b").tokens)
    assert read == ["table_from", "grids_from", "table_from", "table_from"]


def test_a_damaged_table_raises_each_time_it_is_accessed(store_path):
    """An error of one table hides neither the rest of the sample nor the next error."""
    path = of_sample(store_path) / schema.TOKENS
    whole_file = path.read_bytes()
    path.unlink()
    found = open_store(store_path)["b"]
    assert found.question == sample("b").question
    found.call(0)
    for _ in range(2):
        with pytest.raises(StoreError) as refusal:
            len(found)
        assert str(refusal.value) == (
            f"{schema.TOKENS} of sample 'b' in {path.parent} is damaged: it is missing. {RUN_CHECK}"
        )
    path.write_bytes(whole_file)
    assert len(found) == len(sample("b"))
    with pytest.raises(AttributeError) as unknown:
        found.nothing  # noqa: B018
    assert str(unknown.value) == "'Sample' object has no attribute 'nothing'"
