"""Damaged and crafted files of a store are detected, and never read as wrong numbers."""

import contextlib
import io
import json
import os
import shutil
import sys
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from tests.helpers.store_samples import SETTINGS, N, assert_same, call, sample
from xmodal_interp.errors import StoreError
from xmodal_interp.store import StoreWriter, check_store, encoding, files, open_store, schema

N_FLIPS = 72


@pytest.fixture(autouse=True)
def _no_type_checks(any_type):
    """Disable the type checks of tests, which read every call of a new Sample."""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "run"
    mask = torch.ones(1, 1, N, N, dtype=torch.bool).tril()
    with StoreWriter(path, SETTINGS) as writer:
        for name in ("b", "a", "c"):
            bias = torch.randn(1, 2, N, N)
            calls = [call(i, mask=mask, causal=False, bias=bias) for i in range(2)]
            writer.write(sample(name, calls))
        for i in range(2):
            writer.note_failure({"item": i, "name": f"x{i}", "error": "E", "message": "m"})
    return path


@pytest.fixture
def path(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def tables(sample):
    """Read the tables and grids of a sample."""
    return sample.tokens, sample.cross_keys, sample.grids, sample.video_grids


def everything(path, wanted=("b", "a", "c")):
    """Return a store's names, failures and some samples, with all tensors and images read."""
    store = open_store(path)
    samples = [store[name] for name in wanted]
    for each in samples:
        tables(each)
        for stored in each.calls.values():
            stored.probs()
        [image.load() for image in each.images]
    return store.names, store.failures.to_dict("records"), samples


def is_refused(path, expected, wanted):
    """Return whether reading raises; if it does not, assert that all values are as written."""
    try:
        names, failures, samples = everything(path, wanted)
    except StoreError:
        return True
    assert names == expected[0]
    assert len(failures) <= len(expected[1])
    assert [each for each in failures if each not in expected[1]] == []
    for found in samples:
        made = next(each for each in expected[2] if each.name == found.name)
        assert_same(found, made)
        assert found.labels == made.labels
        assert found.provenance == made.provenance
    return False


def is_found(path):
    try:
        return not check_store(path)["ok"].all()
    except StoreError:  # the damaged manifest states another version
        return True


def test_flipped_bytes_are_found_and_never_read_as_wrong_numbers(written, path):
    """In every file: reading raises or returns the written values, and ``check`` finds it."""
    chosen = np.random.default_rng(0)
    expected = everything(written)
    all_files = [p for p in sorted(path.rglob("*")) if p.is_file() and p.name != schema.LOCK]
    all_files = [p for p in all_files if p.parent.name != "c"]
    missed = []
    for i in range(N_FLIPS):
        file = all_files[i % len(all_files)]
        whole = file.read_bytes()
        place, bits = int(chosen.integers(len(whole))), int(chosen.integers(1, 256))
        flipped = bytearray(whole)
        flipped[place] ^= bits
        file.write_bytes(flipped)
        is_refused(path, expected, [name for name in "ab" if file.parent.name == name])
        if not is_found(path) and file.name not in (schema.SAMPLE, schema.MANIFEST):
            missed.append((file.name, place, bits))
        file.write_bytes(whole)
    assert missed == []  # JSON files are excluded: changed white space is not damage


def test_damage_may_go_unnoticed_without_verifying(path):
    file = path / schema.SAMPLES / "b" / "language-self-000.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 64
    file.write_bytes(content)
    with pytest.raises(StoreError, match="its checksum differs from the recorded one"):
        open_store(path)["b"].call(0)
    other = open_store(path, verify=False)["b"].call(0).probs()
    assert not torch.equal(other, open_store(path)["a"].call(0).probs())


def test_a_file_is_compared_once_and_again_if_it_changes(path, monkeypatch):
    compared = []
    original = files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda p: compared.append(p.name) or original(p))
    store = open_store(path)
    layer = "language-self-000.safetensors"
    for _ in range(3):
        tables(store["b"])
        store["b"].call(0)
    assert sorted(compared) == sorted([schema.TOKENS, schema.GRIDS, layer, schema.SHARED])
    file = path / schema.SAMPLES / "b" / layer
    os.utime(file, ns=(1, 1))
    store["b"].call(0)
    assert compared[-1] == layer


def rewritten(path, name, change):
    """Change a sample's ``sample.json`` and update its digest."""
    folder = path / schema.SAMPLES / name
    record = files.read_record(folder)
    change(record)
    text = schema.json_text({**record, "digest": schema.digest_of(record)})
    (folder / schema.SAMPLE).write_text(text)


def swapped(path, file, content):
    """Replace the content of a file and update its checksum."""
    (path / schema.SAMPLES / "b" / file).write_bytes(content)
    about = {"bytes": len(content), "sha256": files.sha256_of(path / schema.SAMPLES / "b" / file)}
    rewritten(path, "b", lambda record: record["files"].__setitem__(file, about))


def npz(places_header, n_bytes=64):
    """Return an npz file whose ``places`` array has this header and ``n_bytes`` of data."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, places_header)
        archive.writestr("0.places.npy", header.getvalue() + bytes(n_bytes))
    return sink.getvalue()


def huge_table():
    column = pa.array(np.zeros(schema.MAX_ROWS + 1, dtype=np.int8))
    sink = io.BytesIO()
    parquet.write_table(pa.table({"token": column}), sink, compression="zstd")
    return sink.getvalue()


def replace_member(name, value):
    return lambda record: record.__setitem__(name, value)


CRAFTED = {
    "a picture outside the folder": lambda record: record["images"][0].__setitem__(
        "file", "../../x.png"
    ),
    "a file outside the folder": lambda record: record["files"].__setitem__(
        "../a/tokens.parquet", {"bytes": 1, "sha256": "0" * 64}
    ),
    "a layer in another folder": lambda record: record["calls"][0].__setitem__(
        "tower", "../a/language"
    ),
    "a missing mask": lambda record: record["calls"][0]["shared"].update(mask="shared-9"),
    "an unknown tensor name": lambda record: record["calls"][0]["tensors"].append("__class__"),
    "a layer that is a string": lambda record: record["calls"][0].__setitem__("layer", "0"),
    "no calls": replace_member("calls", {}),
    "no files": lambda record: record.pop("files"),
    "a text that is a number": replace_member("text", 3),
    "a picture of negative width": lambda record: record["images"][0].__setitem__("width", -8),
    "grids without numbers": lambda record: record["grids"][0].__setitem__("rows", "many"),
    "a mask of a huge shape": lambda record: record["shared"]["shared-0"].update(
        shape=[10**6, 10**6]
    ),
    "labels that are a list": replace_member("labels", [[]]),
}


@pytest.mark.parametrize("how", CRAFTED)
def test_crafted_records_raise(path, how):
    rewritten(path, "b", CRAFTED[how])
    with pytest.raises(StoreError, match="sample 'b'"):
        everything(path)
    assert_same(open_store(path)["a"], open_store(path)["a"])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (schema.GRIDS, lambda: npz({"descr": "<i8", "fortran_order": False, "shape": (10**13,)})),
        (schema.GRIDS, lambda: npz({"descr": "|O", "fortran_order": False, "shape": (1,)})),
        (schema.GRIDS, lambda: npz({"descr": "|i1", "fortran_order": False, "shape": (1,)}, 2**21)),
        (schema.TOKENS, huge_table),
        (schema.TOKENS, lambda: encoding.table_bytes(pd.DataFrame({"token": ["a"]}))),
    ],
)
def test_crafted_tables_and_grids_raise_before_they_are_uncompressed(
    path, file, content, monkeypatch
):
    monkeypatch.setattr(schema, "MAX_GRID_BYTES", 2**20)
    swapped(path, file, content())
    with pytest.raises(StoreError, match=f"{file} of sample 'b'"):
        tables(open_store(path)["b"])


def deep(n):
    return '{"format": ' + "[" * n + "]" * n + "}"


@pytest.mark.parametrize(
    "name", [schema.MANIFEST, schema.NAMES, schema.FAILURES, f"{schema.SAMPLES}/b/{schema.SAMPLE}"]
)
def test_deep_json_raises(path, name):
    (path / name).write_text(deep(100_000))
    with contextlib.suppress(StoreError):
        everything(path)
    assert is_found(path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pipes in folders")
@pytest.mark.parametrize(
    "name",
    [
        *(schema.MANIFEST, schema.NAMES, schema.FAILURES),
        *(f"{schema.SAMPLES}/b/{name}" for name in (schema.SAMPLE, schema.TOKENS, "image-0.png")),
        f"{schema.SAMPLES}/b/language-self-000.safetensors",
    ],
)
def test_pipes_raise_without_blocking(path, name):
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(StoreError):
        everything(path)
    assert is_found(path)


def test_an_image_outside_the_store_that_changed_or_is_not_a_file(tmp_path):
    picture = tmp_path / "picture.png"
    made = sample("d")
    made.images[0].save(picture)
    digest = files.sha256_of(picture)
    made.provenance.update(images=[str(picture)], image_digests=[digest])
    with StoreWriter(tmp_path / "other", SETTINGS, images=False) as writer:
        writer.write(made)
    open_store(tmp_path / "other")[0].images[0].load()
    made.images[0].rotate(180).save(picture)
    with pytest.raises(StoreError) as refusal:
        open_store(tmp_path / "other")[0].images[0].load()
    assert str(refusal.value) == (
        f"{picture}, an image of a stored sample, has changed since it was captured. Restore the "
        "original image, or capture the sample again."
    )
    open_store(tmp_path / "other", verify=False)[0].images[0].load()
    picture.unlink()
    os.mkfifo(picture)
    with pytest.raises(StoreError, match="is not a regular file"):
        open_store(tmp_path / "other")[0].images[0].load()


def test_one_unreadable_file_does_not_stop_the_check(path):
    (path / schema.MANIFEST).write_bytes(b"{")
    (path / schema.NAMES).write_bytes(b"\xff\xfe\n")
    folder = path / schema.SAMPLES
    (folder / "b" / schema.TOKENS).unlink()
    (folder / "b" / schema.TOKENS).mkdir()
    (folder / "a" / schema.SAMPLE).write_text(json.dumps({**schema.STAMP, "name": float("nan")}))
    table = check_store(path)
    bad = table.loc[~table["ok"], ["sample", "file"]].to_numpy().tolist()
    assert bad == [
        ["", schema.MANIFEST],
        ["", schema.NAMES],
        ["b", schema.TOKENS],
        ["a", schema.SAMPLE],
    ]
    assert table.loc[table["sample"] == "c", "ok"].all()
