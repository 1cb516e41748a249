"""The page as a file: its size, its text, what it refuses."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import xmodal_interp as xi
from tests.helpers.figure_samples import fake
from tests.helpers.store_samples import items
from tests.helpers.viewer_samples import scene_sample
from xmodal_interp.cli.commands import app
from xmodal_interp.errors import InputError, StoreError
from xmodal_interp.viewer.codes import decoded
from xmodal_interp.viewer.page import json_for_html, packed

HOSTILE = "</script><img src=x onerror=alert(1)>&amp;\u2028\x1b[31m"


class Scripts(HTMLParser):
    """Collects the text of each script by id, and the names of all elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts, self.tags, self.open = {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.open = dict(attrs).get("id", "module")
            self.scripts[self.open] = ""

    def handle_endtag(self, tag) -> None:
        self.open = None if tag == "script" else self.open

    def handle_data(self, data) -> None:
        if self.open:
            self.scripts[self.open] += data


def contents(page: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Return header and arrays of a page, read as the script reads them."""
    scripts = Scripts(page).scripts
    header = json.loads(scripts["header"])
    blocks = gzip.decompress(base64.b64decode(scripts["blocks"]))
    arrays = {}
    for name, about in header["blocks"].items():
        count = int(np.prod(about["shape"]))
        array = np.frombuffer(blocks, about["dtype"], count, about["offset"])
        arrays[name] = array.reshape(about["shape"])
    return header, arrays


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("viewer") / "store"
    return xi.capture_dataset(xi.load(), items(3), folder, max_new_tokens=2)


def test_a_page_holds_the_values_of_its_samples(tmp_path) -> None:
    sample = scene_sample()
    viewed = xi.view({"one": sample, "two": scene_sample(5)})
    path = viewed.save(tmp_path / "new" / "page.html")
    header, arrays = contents(path.read_text("utf-8"))
    assert [each["title"] for each in header["samples"]] == ["one", "two"]
    rows = viewed.rows[0]
    query = rows.queries.tolist().index(sample.last)
    row = rows.rows.index((2, 5))
    values = decoded(arrays["0.codes"], arrays["0.largest"])[query, row]
    expected = sample.probs(2, 5, [sample.last])[0, 0].numpy()
    seen = ~np.isnan(values)
    assert seen.sum() == sample.last + 1
    assert np.abs(values - expected)[seen].max() <= header["largest_error"]
    assert 0 < header["largest_error"] < 0.004
    mass = arrays["0.mass"][query, 2, 5, 0]
    assert mass == pytest.approx(float(expected[sample.where("image")].sum()), abs=1e-6)


def test_the_page_loads_nothing() -> None:
    text = xi.view(scene_sample()).html
    assert "default-src 'none'" in text
    assert "connect-src" not in text  # default-src forbids it
    assert not re.findall(r"https?://", text)
    tags = Scripts(text).tags
    assert tags.count("script") == 3
    assert not {"link", "img", "iframe", "object", "base"} & set(tags)


def test_the_same_samples_give_the_same_page() -> None:
    assert xi.view(scene_sample()).html == xi.view(scene_sample()).html


def test_the_size_is_known_before() -> None:
    viewed = xi.view(scene_sample())
    rows = viewed.rows[0]
    codes, sums = rows.codes(), rows.sums()
    held = codes["codes"].nbytes + codes["largest"].nbytes + sums["mass"].nbytes
    held += sums["entropy"].nbytes
    assert viewed.n_bytes == pytest.approx(held, rel=0.05)
    assert repr(viewed) == (
        f"View(1 of 1 sample, {len(rows.queries)} query rows, "
        f"{viewed.n_bytes / 1e6:.1f} MB of values before compression)"
    )


def test_hostile_text_stays_text() -> None:
    sample = fake()
    tokens = sample.tokens.assign(token=HOSTILE)
    hostile = sample.changed(
        tokens=tokens, name=HOSTILE, question=HOSTILE, answer=HOSTILE, text=HOSTILE * 20
    )
    text = xi.view({HOSTILE: hostile}, rollout=False).html
    parsed = Scripts(text)
    assert parsed.tags.count("script") == 3
    assert "img" not in parsed.tags
    header = json.loads(parsed.scripts["header"])
    shown = header["samples"][0]["question"]
    assert shown == "</script><img src=x onerror=alert(1)>&amp;\\u2028\\x1b[31m"


def test_json_cannot_end_its_element() -> None:
    assert json_for_html("</script>&\u2028") == r'"\u003c/script\u003e\u0026\u2028"'


def test_packed_arrays_are_aligned() -> None:
    about, data = packed({"a": np.arange(3, dtype=np.uint8), "b": np.ones(2, np.float32)})
    assert about == {
        "a": {"dtype": "uint8", "shape": [3], "offset": 0},
        "b": {"dtype": "float32", "shape": [2], "offset": 8},
    }
    assert data == b"\0\1\2\0\0\0\0\0" + np.ones(2, "<f4").tobytes()


def test_a_store_is_shown_by_name_and_number(store) -> None:
    viewed = xi.view(store, n_samples=2)
    assert viewed.titles == store.names[:2]
    assert viewed.n_given == 3
    chosen = xi.view(store, names=[store.names[2], store.names[0]])
    assert chosen.titles == (store.names[2], store.names[0])
    source = chosen.header["samples"][0]["source"]
    assert source == f"xi.open_store({str(store.path)!r})[{store.names[2]!r}]"
    assert eval(source, {"xi": xi}).name == store.names[2]


def test_a_saved_page_holds_no_folder_of_this_machine(store, tmp_path, monkeypatch) -> None:
    """It may be mailed; the copied call runs in the folder that holds the store."""
    assert store.path.is_absolute()
    page = Scripts(xi.view(store, n_samples=1).save(tmp_path / "page.html").read_text("utf-8"))
    assert str(store.path.parent) not in page.scripts["header"]
    source = json.loads(page.scripts["header"])["samples"][0]["source"]
    assert source == f"xi.open_store({store.path.name!r})[{store.names[0]!r}]"
    monkeypatch.chdir(store.path.parent)
    assert eval(source, {"xi": xi}).name == store.names[0]


def test_pictures_are_embedded_at_a_bounded_size() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1000, 3000, 3), dtype=np.uint8)
    sample = fake().changed(images=(Image.fromarray(noise),))
    source = xi.view(sample).header["samples"][0]["pictures"][0]["src"]
    assert source.startswith("data:image/jpeg;base64,")
    small = xi.view(fake()).header["samples"][0]["pictures"][0]["src"]
    assert small.startswith("data:image/png;base64,")
    none = xi.view(fake().changed(images=())).header["samples"][0]["pictures"][0]
    assert none["src"] is None
    assert (none["width"], none["height"]) == (30, 20)


def test_a_broken_sample_is_a_clear_error(store, tmp_path) -> None:
    import shutil

    copy = tmp_path / "store"
    shutil.copytree(store.path, copy)
    damaged = next((copy / "samples" / store.names[1]).glob("*language*"))
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\xff\xff\xff\xff")
    with pytest.raises(StoreError) as error:
        xi.view(xi.open_store(copy)).save(tmp_path / "page.html")
    assert str(error.value) == (
        f"{damaged.name} of sample {store.names[1]!r} in {damaged.parent} is damaged: its checksum "
        "differs from the recorded one. Run `xmodal check` on the store to list all damaged files; "
        "delete a damaged sample's folder and capture the sample again."
    )
    assert not (tmp_path / "page.html").exists()


@pytest.mark.usefixtures("any_type")
def test_refusals(store, tmp_path) -> None:
    sample = scene_sample()
    for call, message in (
        (lambda: xi.view([]), "samples is empty. Pass at least one sample."),
        (lambda: xi.view([3]), "samples must be samples; got 3."),
        (
            lambda: xi.view(sample).save(tmp_path / "page.pdf"),
            f"The file of a page must end in .html; got {str(tmp_path / 'page.pdf')!r}.",
        ),
        (
            lambda: xi.view(sample).save(store.path / "page.html"),
            f"{str(store.path / 'page.html')!r} is inside the store {str(store.path)!r}, where "
            "pages must not be saved. Choose another path.",
        ),
        (
            lambda: xi.view([sample], names=["scene-3"]),
            "names selects samples of a store, but samples is none. Pass the samples to show "
            "instead.",
        ),
        (
            lambda: xi.view(sample, n_samples=0),
            "n_samples must be an integer from 1 to 10000000; got 0.",
        ),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value) == message


def test_a_notebook_shows_the_page_in_a_frame() -> None:
    viewed = xi.view(scene_sample())
    shown = viewed._repr_html_()
    parsed = Scripts(shown)
    assert parsed.tags == ["iframe"]
    assert 'sandbox="allow-scripts allow-downloads"' in shown


def test_the_command_writes_a_page(store, tmp_path) -> None:
    path = tmp_path / "page.html"
    arguments = ["view", str(store.path), "--export", str(path), "--sample", "1", "--heads", "2"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    header, _ = contents(path.read_text("utf-8"))
    (shown,) = header["samples"]
    assert shown["name"] == store.names[1]
    assert [row for row in shown["rows"] if row[1] >= 0] == [[layer, 2] for layer in range(4)]
    assert f"{path.stat().st_size / 1e6:.1f} MB written to" in done.output
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "exists. Choose another --export, or pass --force" in again.output.replace("\n", " ")
