"""Pages in headless Chromium, and everything that they say and ask for. tests/conftest.py makes the fixtures known.

Without a Chromium such tests are skipped, unless TL_JETS_BROWSER is "required".
"""

from __future__ import annotations

import os
import shutil

import pytest

REQUIRED = os.environ.get("TL_JETS_BROWSER") == "required"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# The sandbox needs what containers lack; the rest keeps the browser itself from calling home.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None

missing = "playwright" if sync_playwright is None else None if CHROMIUM else "chromium"
skipped = pytest.mark.skipif(not REQUIRED and missing is not None, reason=f"there is no {missing} here")


@pytest.fixture(scope="module")
def browser():
    if sync_playwright is None or CHROMIUM is None:
        pytest.fail("TL_JETS_BROWSER=required, but playwright or a Chromium is missing: apt-get install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


class Opened:
    """A document in a browser, and everything that it said and asked for."""

    def __init__(self, browser, file, scheme):
        self.context = browser.new_context(color_scheme=scheme, viewport={"width": 1200, "height": 900})
        self.messages, self.requests, self.url = [], [], file.as_uri()
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.context.on("console", self._heard)
        self.context.on("weberror", lambda error: self.messages.append(("error", str(error.error))))
        self.page = self.context.new_page()
        self.page.goto(self.url)

    def _heard(self, message):
        if "GL Driver Message (OpenGL, Performance" not in message.text:  # of the machine's graphics, not of the page
            self.messages.append((message.type, message.text))

    def __enter__(self):
        return self.page

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                assert self.messages == [] and self.requests == [self.url], self.messages
                assert self.page.evaluate("window.brokenOut === undefined && !document.querySelector('img[src=x]')")
        finally:
            self.context.close()


@pytest.fixture
def show(browser, tmp_path):
    """Write a document and open it in a color scheme."""

    def opened(document, scheme="light"):
        file = tmp_path / "page.html"
        file.write_text(document, encoding="utf-8")
        return Opened(browser, file, scheme)

    return opened
