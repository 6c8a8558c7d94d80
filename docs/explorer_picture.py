"""The picture of the explorer in README and guides: `python docs/explorer_picture.py MODEL` (SmolLM2-135M's folder).

Needs Playwright and a Chromium. What `tl-jets explore` writes is photographed at one cell.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from tl_jets.cli import main as command

PICTURE = Path(__file__).parent / "pages" / "pictures" / "explorer.png"
PROMPT = "The Eiffel Tower is in the city of"
# The window, its scale, the cell (layer, position), and the number of colors kept.
SIZE, SCALE, CELL, COLORS = {"width": 1080, "height": 1100}, 1.5, (24, 9), 48


def main() -> None:
    """Write the page of the prompt, choose the cell, and keep the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a local Hugging Face directory, or a model's name")
    model = parser.parse_args().model
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "explore.html")
        command(["explore", "--model", model, "--prompt", PROMPT, "--html", str(file)])
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, device_scale_factor=SCALE)
        page.goto(file.as_uri())
        page.evaluate(
            "document.querySelectorAll('main > section:first-of-type, .about').forEach(each => each.remove())"
        )  # they name the folder
        page.locator(f'.grid td[data-layer="{CELL[0]}"][data-pos="{CELL[1]}"]').click()
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        shot.convert("P", palette=Image.Palette.ADAPTIVE, colors=COLORS).save(PICTURE, optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
