"""The page of figures draws every picture that it shows, by its own code, on SmolLM2."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("matplotlib").use("Agg")
pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore::tl_jets.paths.cancellation.CancellationWarning")]
DOCS = Path(__file__).parents[2] / "docs"


def test_the_code_of_the_page_draws_its_pictures(folder, tmp_path):
    from PIL import Image

    drawn = runpy.run_path(str(DOCS / "figure_pictures.py"))["draw"](str(folder), tmp_path)
    page = (DOCS / "pages" / "figures.md").read_text()
    assert drawn == re.findall(r"\(pictures/(\w+)\.png\)", page) and len(drawn) >= 11
    for name in drawn:  # of the size of those that the page shows: as many rows, columns and panels
        own, shown = (Image.open(folder / f"{name}.png").size for folder in (tmp_path, DOCS / "pages" / "pictures"))
        assert own == pytest.approx(shown, rel=0.05), name
