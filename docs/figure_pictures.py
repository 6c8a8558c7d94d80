"""Draw the pictures of docs/pages/figures.md: `python docs/figure_pictures.py FOLDER_OR_NAME [WHERE]`.

The page's own blocks of code are run with this model, each picture by the block above it. A picture is small: 80 dots an
inch, 32 colors.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

from PIL import Image

PAGE = Path(__file__).parent / "pages" / "figures.md"
PIECE = re.compile(r"^```py\n(?P<code>.*?)^```$|^!\[[^\]]*\]\(pictures/(?P<name>\w+)\.png\)$", re.DOTALL | re.MULTILINE)


def draw(model: str, where: Path) -> list[str]:
    """Write every picture of the page into a folder, and return their names."""
    names: dict[str, Any] = {}
    drawn = []
    for piece in PIECE.finditer(PAGE.read_text()):
        if piece["code"]:
            exec(compile(piece["code"].replace("FOLDER", model), str(PAGE), "exec"), names)
            continue
        image = io.BytesIO()
        names.pop("figure").savefig(image, dpi=80, format="png", bbox_inches="tight")
        small = Image.open(image).convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=32)
        small.save(where / f"{piece['name']}.png", optimize=True)
        drawn.append(piece["name"])
    return drawn


if __name__ == "__main__":
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else PAGE.parent / "pictures"
    print(*draw(sys.argv[1], folder))
