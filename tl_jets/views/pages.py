"""Views: titled, self-contained HTML fragments, and pages of several of them that open offline.

Example:
    >>> view = View("A", "<p>1</p>")
    >>> view, "<h1>A</h1>" in view.page()
    (View('A', 0.0 kB), True)
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import dataclass, field
from functools import cache, singledispatch
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from tl_jets.core.markup import text
from tl_jets.core.notebook import Shown, dataframe_html

FIGURE_DPI = 144
# Significant digits of numbers in pages and files.
DIGITS = 6


@dataclass(frozen=True, eq=False, repr=False)
class View:
    """A self-contained HTML fragment, stored without its style sheet, with a plain-text title."""

    title: str
    html: str = field(repr=False)
    scripts: ClassVar[tuple[str, ...]] = ()  # what a page that contains it runs, beside its tips

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.title!r}, {len(self.html.encode()) / 1000:.1f} kB)"

    def _repr_html_(self) -> str:
        # Style sheet and script go with every output, since a notebook may drop or move the others.
        style, script = _file("templates/view.css"), _file("templates/view.js")
        return f'<style>{style}</style><div class="tl-jets">{self._section()}</div><script>{script}</script>'

    def _in_page(self) -> str:
        return self._section()

    def _section(self) -> str:
        return f"<section><h2>{text(self.title)}</h2>{self.html}</section>"

    def page(self) -> str:
        """The view as a complete HTML document that loads no other file."""
        return page(self.title, self)

    def save(self, path: str | Path) -> Path:
        """Write `page()` to a file and return its path; raises OSError if it cannot be written."""
        path = Path(path)
        path.write_text(self.page(), encoding="utf-8")
        return path

    @classmethod
    def joined(cls, title: str, *parts: Any) -> View:
        """Combine several parts (as in `page`) into one view."""
        return cls(title, "".join(_part(part) for part in parts))


@singledispatch
def view_of(result: Any) -> View:
    """The view of a result: headline and head of its table, unless its class has one (`@view_of.register`)."""
    return View(result._headline(), result._body())


def page(title: str, *parts: Any) -> str:
    """Several parts as one HTML document that loads nothing; write it in UTF-8.

    Parts are views, results, pandas tables, matplotlib figures, or objects with `_repr_html_` (whose HTML is not
    escaped, but cannot load anything from elsewhere). Raises TypeError for other objects.

    Example:
        >>> document = page("<Tokens>", View("a", "<p>1</p>"), pd.DataFrame({"token": ["</script>"]}))
        >>> document.count("<script>"), document.count("http:"), "&lt;Tokens&gt;" in document
        (1, 0, True)
    """
    if len(parts) == 1 and isinstance(parts[0], View) and parts[0].title == title:
        body = f"<section>{parts[0].html}</section>"
    else:
        body = "\n".join(part._in_page() if isinstance(part, View) else _part(part) for part in parts)
    own = [name for part in parts if isinstance(part, View) for name in part.scripts]
    script = "\n".join(map(_file, dict.fromkeys(["templates/view.js", *own])))
    filling = {"title": text(title), "style": _file("templates/view.css"), "script": script, "parts": body}
    # In one pass: what is filled in is not searched again.
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: filling[match[1]], _file("templates/page.html"))


def json_in_page(data: Any) -> str:
    """Data as JSON that cannot end the script element in which it stands."""
    # Only "<" can end a script element; "&" and the line separators are escaped for older browsers.
    safe = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}
    return json.dumps(data, allow_nan=False, ensure_ascii=True).translate(safe)


def rounded(value: Any) -> Any:
    """A number with the digits that pages show; None if it is not finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _part(part: Any) -> str:
    if isinstance(part, Shown):
        part = view_of(part)
    if isinstance(part, View):
        return part._section()
    if isinstance(part, pd.DataFrame):
        return f"<section>{dataframe_html(part, rows=len(part), columns=part.shape[1])}</section>"
    if callable(getattr(part, "savefig", None)):  # before _repr_html_, which returns nothing for figures
        image = io.BytesIO()
        part.savefig(image, format="png", dpi=FIGURE_DPI)
        data = base64.b64encode(image.getvalue()).decode()
        return f'<section><img alt="figure" style="max-width:100%" src="data:image/png;base64,{data}"></section>'
    found = part._repr_html_() if callable(getattr(part, "_repr_html_", None)) else None
    if isinstance(found, str):
        return f"<section>{found}</section>"
    raise TypeError(
        "A part of a page is a View, a result, a pandas table, a matplotlib figure, or an object with _repr_html_; got "
        f"{type(part).__name__}. Put text into a view of its own: View(title, html)."
    )


@cache
def _file(name: str) -> str:
    return files("tl_jets").joinpath(f"views/{name}").read_text(encoding="utf-8")
