"""Writing a store: after any failure, a sample is complete or absent."""

import errno
import json
import shutil
import unicodedata
from pathlib import Path

import pytest

from tests.helpers.store_samples import SETTINGS, assert_same, sample
from xmodal_interp.errors import InputError, StoreError
from xmodal_interp.store import StoreWriter, check_store, files, open_store, schema, writer


def leftovers(path: Path) -> list[str]:
    return [p.name for p in path.rglob("*") if p.name.startswith(schema.UNFINISHED)]


@pytest.fixture
def full_disk(monkeypatch):
    """Return a function that makes writing fail after a number of files."""

    def after(n_files):
        left = [n_files]

        def write_file(path, content, *, append=False):
            left[0] -= 1
            if left[0] < 0:
                with path.open("ab") as file:  # a partial write
                    file.write(content[:7])
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            original(path, content, append=append)

        monkeypatch.setattr(writer, "write_file", write_file)

    original = writer.write_file
    return after


def failing_rename(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("n_files", range(5))  # tokens, grids, image, layer, sample.json
def test_full_disk(tmp_path, full_disk, monkeypatch, n_files):
    with StoreWriter(tmp_path, SETTINGS) as store:
        store.write(sample("one"))
        n_bytes = store.n_bytes
        full_disk(n_files)
        with pytest.raises(StoreError) as refusal:
            store.write(sample("two"))
        assert str(refusal.value) == (
            f"Writing sample 'two' to {tmp_path} failed: No space left on device. Free disk space "
            "or choose another disk, and run again; samples already safe in the store: 1."
        )
        assert refusal.value.__cause__.errno == errno.ENOSPC
        assert leftovers(tmp_path) == []
        assert store.names == ["one"]
        assert store.n_bytes == n_bytes
        monkeypatch.undo()
        store.write(sample("two"))
    assert check_store(tmp_path)["ok"].all()
    assert open_store(tmp_path).names == ("one", "two")


def test_full_disk_after_the_sample(tmp_path, full_disk, monkeypatch):
    """The line in ``names.jsonl`` is truncated; the sample keeps its number."""
    with StoreWriter(tmp_path, SETTINGS) as store:
        store.write(sample("z"))
        full_disk(5)
        with pytest.raises(StoreError, match="safe in the store: 2"):
            store.write(sample("y"))
        monkeypatch.undo()
        store.write(sample("x"))
    assert open_store(tmp_path).names == ("z", "y", "x")
    assert [line["name"] for line in files.read_lines(tmp_path / schema.NAMES)] == ["z", "y", "x"]
    assert check_store(tmp_path)["ok"].all()


def test_a_refused_folder_is_unchanged(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match=r"has no manifest\.json, but thesis\.tex"):
        StoreWriter(theirs, SETTINGS)
    assert [path.name for path in theirs.rglob("*")] == ["thesis.tex"]
    with StoreWriter(tmp_path / "run", SETTINGS) as store:
        store.write(sample())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for path, settings in (
        ("run", {}),
        ("run/samples/one/inner", SETTINGS),
        ("run/new/inner", SETTINGS),
    ):
        with pytest.raises(StoreError):
            StoreWriter(tmp_path / path, settings)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.parametrize("name", [schema.NAMES, schema.FAILURES, schema.LOCK, schema.SAMPLES])
@pytest.mark.parametrize("is_there", [True, False])
def test_links_are_not_followed(tmp_path, name, is_there):
    with StoreWriter(tmp_path / "run", SETTINGS) as store:
        store.note_failure({"item": 0, "name": None, "error": "E", "message": "m"})
    target, place = tmp_path / "precious", tmp_path / "run" / name
    if place.is_dir():
        place.rmdir()
        target.mkdir()
    elif place.exists():
        place.rename(target)
    else:
        target.write_text("work")
    if not is_there:
        target.rename(tmp_path / "elsewhere")
    place.symlink_to(target)
    with pytest.raises(StoreError, match=f"{name} in .* is a symbolic link, which"):
        StoreWriter(tmp_path / "run", SETTINGS)
    assert target.exists() == is_there
    with pytest.raises(OSError, match="symbolic links"):
        writer.write_file(place if name != schema.SAMPLES else tmp_path / "run" / name, b"")


@pytest.mark.parametrize("at", ["after the rename", "within the line", "before the list"])
def test_a_kill_before_a_name_is_listed_keeps_the_order(tmp_path, monkeypatch, at):
    """The order is right both for a reader and after the next writer has repaired the list."""
    for name in ("c", "b"):
        with StoreWriter(tmp_path, SETTINGS) as store, monkeypatch.context() as patch:
            if name == "b":
                patch.setattr(StoreWriter, "_list", failing_rename)
                with pytest.raises(KeyboardInterrupt):
                    store.write(sample(name))
            else:
                store.write(sample(name))
    names = tmp_path / schema.NAMES
    if at == "within the line":
        names.write_text(names.read_text() + '{"digest": "12')
    if at == "before the list":
        names.unlink()
    assert open_store(tmp_path).names == ("c", "b")
    with StoreWriter(tmp_path, SETTINGS) as store:
        store.write(sample("a"))
    assert open_store(tmp_path).names == ("c", "b", "a")
    assert [line["number"] for line in files.read_lines(names)] == [0, 1, 2]
    assert files.line_problems(names) == []
    shutil.rmtree(tmp_path / schema.SAMPLES / "b")  # as a user does with a damaged sample
    with StoreWriter(tmp_path, SETTINGS) as store:
        store.write(sample("b"))
    assert open_store(tmp_path).names == ("c", "b", "a")


def test_lists_of_the_first_release(tmp_path):
    """Lists without digests are read and extended; damaged lines are skipped and reported."""
    with StoreWriter(tmp_path, SETTINGS) as store:
        for name in ("z", "y"):
            store.write(sample(name))
    names, stamp = tmp_path / schema.NAMES, schema.json_text(schema.STAMP)
    names.write_text(f'{stamp}\n{{"name": "y"}}\n{{"name": "z"}}\n')
    assert open_store(tmp_path).names == ("y", "z")
    with StoreWriter(tmp_path, SETTINGS) as store:
        store.write(sample("x"))
    assert open_store(tmp_path).names == ("y", "z", "x")
    failures = tmp_path / schema.FAILURES
    good = {"item": 3, "name": None, "error": "E", "message": "m"}
    failures.write_text(f'{stamp}\n{schema.json_text(good)}\n{{"item": 3}}\n[1]\nnull\n')
    assert open_store(tmp_path).failures.to_dict("records") == [good]
    assert check_store(tmp_path).set_index("file").loc[schema.FAILURES, "problem"] == (
        "line 3 is damaged; line 4 is damaged; line 5 is damaged"
    )
    with StoreWriter(tmp_path, SETTINGS):
        pass
    assert files.line_problems(failures) == []
    assert open_store(tmp_path).failures.to_dict("records") == [good]


def test_full_disk_before_the_manifest(tmp_path, full_disk, monkeypatch):
    full_disk(0)
    with pytest.raises(StoreError) as refusal:
        StoreWriter(tmp_path / "run", SETTINGS)
    assert str(refusal.value).startswith(f"Cannot write a store to {tmp_path / 'run'}: ")
    monkeypatch.undo()
    with StoreWriter(tmp_path / "run", SETTINGS) as store:  # neither manifest nor lock is left
        store.write(sample())
    assert len(open_store(tmp_path / "run")) == 1


def test_a_crash_leaves_no_incomplete_sample(tmp_path, monkeypatch):
    with StoreWriter(tmp_path, SETTINGS) as store:
        store.write(sample("one"))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", failing_rename)
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # no clean-up after a crash
            with pytest.raises(KeyboardInterrupt):
                store.write(sample("two"))
    (tmp_path / schema.SAMPLES / f"{schema.UNFINISHED}old").mkdir()
    assert sorted(leftovers(tmp_path)) == [".writing-old", ".writing-two"]
    assert open_store(tmp_path).names == ("one",)
    assert check_store(tmp_path)["ok"].all()
    with StoreWriter(tmp_path, SETTINGS) as store:
        assert leftovers(tmp_path) == []
        store.write(sample("two"))
    assert_same(open_store(tmp_path)["two"], sample("two"))


def test_an_interrupt_cleans_up(tmp_path, monkeypatch):
    with StoreWriter(tmp_path, SETTINGS) as store, monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing_rename)
        with pytest.raises(KeyboardInterrupt):
            store.write(sample("two"))
    assert leftovers(tmp_path) == []
    assert len(open_store(tmp_path)) == 0


def test_a_truncated_line(tmp_path):
    with StoreWriter(tmp_path, SETTINGS) as store:
        store.write(sample("b"))
    names = tmp_path / schema.NAMES
    names.write_text(names.read_text() + '{"name": "\u00e9'.encode()[:-1].decode(errors="ignore"))
    with StoreWriter(tmp_path, SETTINGS) as store:
        store.write(sample("a"))
    assert open_store(tmp_path).names == ("b", "a")


def test_writing_a_name_twice(tmp_path):
    for name in ("one", "One"):
        with StoreWriter(tmp_path, SETTINGS) as store:
            if not store.names:
                store.write(sample("one"))
            assert "one" in store
            assert "One" not in store
            with pytest.raises(StoreError) as refusal:
                store.write(sample(name))
            assert str(refusal.value) == (
                f"{tmp_path} already has a sample 'one', ignoring case; got {name!r}. Choose "
                "another name, or another folder."
            )
    assert_same(open_store(tmp_path)[0], sample("one"))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "it is empty"),
        ("..", "it begins with a dot or a space"),
        (".hidden", "it begins with a dot or a space"),
        (" a", "it begins with a dot or a space"),
        ("a ", "it ends with a dot or a space"),
        ("a.", "it ends with a dot or a space"),
        ("../a", "it begins with a dot or a space"),
        ("train/0001", "it contains '/'"),
        ("a\\b:c", "it contains ':', '\\\\'"),
        ("a\nb", "it contains characters that cannot be printed"),
        ("a\x00b", "it contains characters that cannot be printed"),
        ("a\u202eb", "it contains characters that cannot be printed"),
        ("\ud800", "it contains characters that cannot be printed"),
        (unicodedata.normalize("NFD", "caf\u00e9"), "it is not in Unicode normal form NFC"),
        ("\u732b" * 67, "it has 201 bytes"),
    ],
)
def test_unsafe_names(tmp_path, name, problem):
    with StoreWriter(tmp_path, SETTINGS) as store, pytest.raises(InputError) as refusal:
        store.write(sample(name))
    assert str(refusal.value) == (
        f"{name!r} is not a valid sample name: {problem}. Use up to 200 bytes of printable "
        'characters without " * / : < > ? \\ |, and no dot or space at either end.'
    )
    assert list((tmp_path / schema.SAMPLES).iterdir()) == []


def test_labels_that_are_not_json(tmp_path):
    with StoreWriter(tmp_path, SETTINGS) as store:
        with pytest.raises(InputError) as refusal:
            store.write(sample(labels={"colors": {"red"}}))
        assert str(refusal.value) == (
            "JSON cannot represent a value that the store must keep: got {'red'} (set). Use "
            "strings, finite numbers, booleans, None, lists and dicts."
        )
        with pytest.raises(InputError, match="Out of range float values are not JSON compliant"):
            store.write(sample(labels={"iou": float("nan")}))
    assert leftovers(tmp_path) == []


def test_other_settings(tmp_path):
    with StoreWriter(tmp_path, SETTINGS) as store:
        store.write(sample())
    StoreWriter(tmp_path, json.loads(json.dumps(SETTINGS))).close()
    other = {"model": "other", "kept": {"layers": (1, 2)}, "system": None}
    with pytest.raises(StoreError) as refusal:
        StoreWriter(tmp_path, other)
    assert str(refusal.value) == (
        f"The settings differ from those of the store {tmp_path}: kept.layers is None in the store "
        "and [1, 2] now; kept.values is False in the store and not set now; model is 'none' in the "
        "store and 'other' now; system is not set in the store and None now. Use the same "
        "settings, or another folder."
    )
    StoreWriter(tmp_path, SETTINGS).close()  # the refused writer has released the lock


def test_another_version(tmp_path):
    StoreWriter(tmp_path, SETTINGS).close()
    path = tmp_path / schema.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 3}))
    with pytest.raises(StoreError, match=r"has version 3 .* reads version 2"):
        StoreWriter(tmp_path, SETTINGS)


def test_a_folder_with_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StoreError) as refusal:
        StoreWriter(tmp_path, SETTINGS)
    assert str(refusal.value) == (
        f"{tmp_path} is neither empty nor a store: it has no manifest.json, but thesis.tex. Choose "
        "a new or empty folder."
    )


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(StoreError, match="Cannot write a store to"):
        StoreWriter(tmp_path / "run", SETTINGS)


def test_one_writer_at_a_time(tmp_path):
    with StoreWriter(tmp_path, SETTINGS):
        with pytest.raises(StoreError) as refusal:
            StoreWriter(tmp_path, SETTINGS)
        assert str(refusal.value) == (
            f"Another writer has {tmp_path} open. Wait until it has finished, or write to another "
            "folder."
        )
        assert len(open_store(tmp_path)) == 0  # reading needs no lock
    StoreWriter(tmp_path, SETTINGS).close()


def test_a_store_without_samples_gets_the_settings_of_its_next_writer(tmp_path):
    with StoreWriter(tmp_path, SETTINGS) as store:
        store.note_failure({"item": 0, "name": None, "error": "E", "message": "m"})
    StoreWriter(tmp_path, SETTINGS).close()
    assert len(open_store(tmp_path).failures) == 1
    other = {"model": "other"}
    with StoreWriter(tmp_path, other) as store:
        assert open_store(tmp_path).manifest["settings"] == other
        store.write(sample())
    assert len(open_store(tmp_path).failures) == 0
    assert check_store(tmp_path)["ok"].all()
    with pytest.raises(StoreError, match="model is 'other' in the store and 'none' now"):
        StoreWriter(tmp_path, SETTINGS)
