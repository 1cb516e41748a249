"""The local server: its address, what it computes, what it refuses."""

import json
import struct
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from typer.testing import CliRunner

import xmodal_interp as xi
from tests.helpers.store_samples import items
from tests.helpers.viewer_samples import browser, need_browser, scene_sample, wait_for_viewer
from tests.viewer.test_browser import STATE, VALUES, close_to
from tests.viewer.test_page import Scripts
from xmodal_interp.cli import commands
from xmodal_interp.errors import InputError
from xmodal_interp.viewer import serve, shown_values
from xmodal_interp.viewer.codes import ERROR, decoded


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "store"
    return xi.capture_dataset(xi.load(), items(3), folder, max_new_tokens=2)


@pytest.fixture(scope="module")
def server(store):
    with serve(store) as running:
        yield running


def answer(url: str, **headers: str) -> tuple[int, bytes]:
    """Return status and content of a request, without a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=30) as found:
            return found.status, found.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_page_has_titles_only(server, store) -> None:
    status, content = answer(server.url)
    assert status == 200
    header = json.loads(Scripts(content.decode()).scripts["header"])
    assert header == {"titles": list(store.names), "n_given": 3}
    assert server.url == f"http://127.0.0.1:{server.port}/"


def test_rows_are_the_sample_s_probabilities(server, store) -> None:
    _, content = answer(f"{server.url}sample?sample=1")
    header = json.loads(content)
    assert header["name"] == store.names[1]
    query = len(header["queries"]) - 1
    _, content = answer(f"{server.url}rows?sample=1&query={query}")
    size, zero = struct.unpack("<II", content[:8])
    about, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    assert zero == 0
    arrays = {
        name: np.frombuffer(data, of["dtype"], int(np.prod(of["shape"])), of["offset"]).reshape(
            of["shape"]
        )
        for name, of in about.items()
    }
    values = decoded(arrays["codes"], arrays["largest"])[0]
    position = header["queries"][query]
    for layer, head in ((0, 3), (3, 7)):
        expected = store[1].probs(layer, head, [position])[0, 0].numpy()
        found = values[header["rows"].index([layer, head])]
        seen = ~np.isnan(found)
        assert np.abs(found - expected)[seen].max() <= ERROR * expected.max()
        mass = arrays["mass"][0, layer, head, 0]
        image = expected[store[1].where("image")].sum()
        assert mass == pytest.approx(float(image), abs=1e-6)


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("sample?sample=9", 500, "There is no sample 9: there are 3."),
        ("rows?sample=0&query=999", 500, "There is no query 999: there are "),
        ("rows?sample=0", 400, "The request is not valid."),
        ("sample?sample=x", 400, "The request is not valid."),
        ("../manifest.json", 404, "There is no such page."),
        ("manifest.json", 404, "There is no such page."),
    ],
)
def test_wrong_requests(server, path, status, message) -> None:
    found, content = answer(server.url + path)
    assert found == status
    assert json.loads(content)["error"].startswith(message)


def test_other_hosts_are_refused(server) -> None:
    status, content = answer(server.url, Host=f"evil.example:{server.port}")
    assert (status, json.loads(content)) == (403, {"error": "Use the address of the server."})


def test_a_port_in_use_is_an_error(server) -> None:
    with pytest.raises(InputError) as error:
        serve([scene_sample()], port=server.port)
    assert str(error.value) == (
        f"Port {server.port} of 127.0.0.1 cannot be used: Address already in use. Pass another "
        "port."
    )
    with pytest.raises(InputError) as error:
        serve([])
    assert str(error.value) == "samples is empty. Pass at least one sample."


def test_the_command_serves_until_it_is_stopped(store, monkeypatch) -> None:
    seen = []

    def wait(server) -> None:
        seen.append(answer(f"{server.url}sample?sample=0")[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(xi.viewer.ViewServer, "wait", wait)
    before = threading.active_count()
    done = CliRunner().invoke(commands.app, ["view", str(store.path), "--sample", "2"])
    assert seen == [200]
    assert done.exit_code == 130
    assert "shows 1 sample; Ctrl-C stops the server" in done.output
    assert threading.active_count() <= before + 1


def test_the_browser_shows_rows_as_they_arrive(server, store) -> None:
    need_browser()
    with browser() as chrome:
        page = chrome.new_page()
        problems, requests = [], []
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on("request", lambda r: requests.append(r.url))
        page.goto(f"{server.url}#sample=1")
        wait_for_viewer(page)
        settled(page)
        sample = store[1]
        position = page.evaluate(STATE)["pins"][0] - 1
        values = np.array(page.evaluate(VALUES)[0], dtype=float)
        largest = float(sample.probs(3, None, [position]).mean(0).max())
        close_to(values, shown_values(sample, [position], {3: None}), largest)
        page.get_by_label("Sample").select_option("2")
        while page.evaluate(STATE)["sample"] != 2:
            page.wait_for_timeout(20)
        settled(page)
        assert store[2].question in page.locator("h1").first.inner_text()
        assert problems == []
        assert all(each.startswith((server.url, "data:")) for each in requests)


def settled(page) -> None:
    """Wait until all rows of the shown sample have arrived and are drawn."""
    for _ in range(400):
        page.wait_for_timeout(50)
        if page.evaluate(
            """() => {
              const { viewer } = document.getElementById("viewer");
              const { sample } = viewer;
              return sample.blocks.size > 0 && !sample.queue.length && !sample.running;
            }"""
        ):
            page.wait_for_timeout(200)
            return
    raise TimeoutError("Rows have not arrived within 20 seconds.")


def test_a_damaged_sample_is_reported_on_the_page(store, tmp_path) -> None:
    import shutil

    need_browser()
    copy = tmp_path / "store"
    shutil.copytree(store.path, copy)
    damaged = next((copy / "samples" / store.names[1]).glob("*language*"))
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\xff\xff\xff\xff")
    with serve(xi.open_store(copy)) as server, browser() as chrome:
        page = chrome.new_page()
        page.goto(server.url)
        wait_for_viewer(page)
        page.get_by_label("Sample").select_option("1")
        alert = page.get_by_role("alert")
        alert.wait_for()
        assert "is damaged: its checksum differs from the recorded one." in alert.inner_text()
        page.get_by_role("button", name="Close", exact=True).click()
        assert page.evaluate(STATE)["sample"] == 0
