"""Pictures of circuitsvis' views for docs/pages/guides/circuitsvis.md: `python docs/circuitsvis_pictures.py`.

Needs Playwright and a Chromium. The code of the guide runs first, so that a picture is of what the page shows.
"""

from __future__ import annotations

import io
import re
import shutil
import tempfile
from pathlib import Path

from PIL import Image, ImageChops
from playwright.sync_api import sync_playwright

PAGES = Path(__file__).parent / "pages"
GUIDE = PAGES / "guides" / "circuitsvis.md"
PICTURES = PAGES / "pictures"
# Width and height of a window, and the number of colors kept: a picture has a few kB.
SIZE, COLORS = {"width": 700, "height": 640}, 32


def draw() -> None:
    """One picture per row of the guide's table, named by its view and its object."""
    text = GUIDE.read_text()
    names: dict[str, object] = {}
    exec(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0], names)
    calls = re.findall(r"^\| `(\w+)` \|.*`(tj\.to_circuitsvis\((\w+).*\))` \|", text, flags=re.MULTILINE)
    PICTURES.mkdir(exist_ok=True)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for view, call, of in calls:
            page = browser.new_page(viewport=SIZE)
            page.goto(eval(call, names).save(f"{folder}/view.html").as_uri())
            page.frames[1].wait_for_selector("canvas, select, span", timeout=60_000)
            page.wait_for_timeout(1500)  # canvases are painted after they are there
            shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            _, _, right, bottom = ImageChops.invert(shot).point(lambda level: 255 * (level > 40)).getbbox()
            shot = shot.crop((0, 0, right + 16, bottom + 16))
            shot.convert("P", palette=Image.Palette.ADAPTIVE, colors=COLORS).save(
                PICTURES / f"{view}_{of}.png", optimize=True
            )
            page.close()
        browser.close()


if __name__ == "__main__":
    draw()
