"""Samples to view, and a browser to view them in."""

import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import xmodal_interp as xi
from xmodal_interp.sample import Sample
from xmodal_interp.shapes.scenes import ask_all, sample_scene


@functools.cache
def scene_sample(seed: int = 3, question: str = "where", model: str = "llava") -> Sample:
    """Return a sample of a shipped model about a scene, with its whole answer."""
    scene = sample_scene(np.random.default_rng(seed))
    questions = ask_all(scene, np.random.default_rng(seed))
    text = next(each.text for each in questions if each.text.startswith(question))
    captured = xi.capture(xi.load(model), scene.image(), text, max_new_tokens=16)
    return captured.changed(name=f"scene-{seed}")


def chromium() -> str | None:
    """Return the path of Chromium, or None if it is not installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def need_browser() -> None:
    """Skip the test if no browser is installed; fail instead if ``XMODAL_BROWSER=required``."""
    missing = "" if chromium() else "Chromium is not installed (apt-get install chromium)"
    if not missing:
        try:
            import playwright.sync_api  # noqa: F401
        except ImportError:
            missing = "Playwright is not installed (pip install playwright)"
    if missing and os.environ.get("XMODAL_BROWSER") == "required":
        pytest.fail(f"{missing}, but XMODAL_BROWSER=required.")
    if missing:
        pytest.skip(missing)


@contextmanager
def browser() -> Iterator[Any]:
    """Yield a running browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]  # it also runs in small containers
        opened = playwright.chromium.launch(executable_path=chromium(), args=options)
        yield opened
        opened.close()


def wait_for_viewer(page: Any) -> None:
    """Wait until a page has drawn all its views.

    Playwright's ``wait_for_function`` evaluates strings in the page, which its policy forbids.
    """
    ready = "document.getElementById('viewer')?.viewer?.timings.first > 0"
    for _ in range(600):
        if page.evaluate(ready):
            return
        page.wait_for_timeout(50)
    raise TimeoutError("The viewer has not drawn within 30 seconds.")
