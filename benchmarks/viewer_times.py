"""Measure a page of the viewer in Chromium: first paint, and the time of each gesture.

``python benchmarks/viewer_times.py page.html`` prints one line per measurement, in milliseconds:
median and largest of 40 gestures. The time of a gesture is that from its change of the state to
the end of drawing, without the browser's own painting. Without a page, one of the shipped model
is made.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, sync_playwright

import xmodal_interp as xi
from xmodal_interp.shapes.scenes import ask_all, sample_scene

GESTURES = {
    "hover a word": "viewer.hoverWord(words[i % words.length])",
    "hover a head": "hover({ layer: layers[i % layers.length], head: i % 3 })",
    "click a word": "viewer.pin(words[i % words.length], false)",
    "click a layer": "viewer.select([[layers[i % layers.length], null]], false)",
    "drag a box": "viewer.set({ box: { picture: 0, edges: [i, 8, 30 + i, 40] }, value: 'box' })",
}
MEASURE = """async () => {
  const { viewer } = document.getElementById("viewer");
  const words = [...viewer.shares.keys()];
  const layers = viewer.sample.header.layers;
  const hover = (cell) => { viewer.hover.cell = cell; viewer.schedule(); };
  const next = requestAnimationFrame;
  const frame = () => new Promise((done) => next(() => next(done)));
  viewer.hover = { word: null, cell: null, key: null };
  viewer.timings.draw.length = 0;
  for (let i = 0; i < 40; i++) { GESTURE; await frame(); }
  return viewer.timings.draw;
}"""


def shipped_page(folder: Path) -> Path:
    """Return a page of the shipped model's description of a scene."""
    scene = sample_scene(np.random.default_rng(3))
    question = ask_all(scene, np.random.default_rng(3))[-1].text
    sample = xi.capture(xi.load(), scene.image(), question, max_new_tokens=20)
    return xi.view(sample).save(folder / "page.html")


def measured(page: Page, path: Path) -> dict[str, list[float]]:
    """Return the times of each measurement of a page."""
    page.goto(path.resolve().as_uri())
    ready = "document.getElementById('viewer')?.viewer?.timings.first > 0"
    while not page.evaluate(ready):
        page.wait_for_timeout(20)
    times = {
        "first drawing": [page.evaluate("document.getElementById('viewer').viewer.timings.first")]
    }
    for name, gesture in GESTURES.items():
        times[name] = page.evaluate(MEASURE.replace("GESTURE", gesture))
    return times


def main(paths: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for path in [Path(each) for each in paths] or [shipped_page(Path(folder))]:
            print(f"{path.name}, {path.stat().st_size / 1e6:.2f} MB")
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            for name, times in measured(page, path).items():
                print(f"  {name:14} {np.median(times):6.1f} {max(times):6.1f} ms")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
