"""Notebook display of results, as views and pages of several views.

A `View` is a titled, self-contained HTML fragment; `page()` and `save(path)` make it a document that opens offline, and
`page(title, *parts)` combines views, results and tables. A result that inherits from `Shown` renders as its headline
and the head of its table.

Example:
    >>> import pandas as pd
    >>> view = View("Two rows", dataframe_html(pd.DataFrame({"token": [" the", "</b>"], "logit": [1.0, -2.5]})))
    >>> view
    View('Two rows', 0.3 kB)
    >>> "&lt;/b&gt;" in view.page(), "</b>" in view.html
    (True, False)
"""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import dataclass, field
from functools import cache, singledispatch
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

from tl_jets.core.markup import cell, table, text, token
from tl_jets.core.numerals import number

# Size of a table in a notebook.
SHOWN_ROWS, SHOWN_COLUMNS = 12, 20
# Modules that register views of results; loaded when a result is first shown.
VIEWS = ["tl_jets.views.lens_tables"]
WHOLE = "to_dataframe()"
FIGURE_DPI = 144
# Columns that hold tokens: their spaces are shown.
_TOKENS = re.compile(r"(^|_)(token|tokens|target)(_|$)|^token_string$")


@dataclass(frozen=True, eq=False, repr=False)
class View:
    """A self-contained HTML fragment, stored without its style sheet, with a plain-text title."""

    title: str
    html: str = field(repr=False)

    def __repr__(self) -> str:
        return f"View({self.title!r}, {len(self.html.encode()) / 1000:.1f} kB)"

    def _repr_html_(self) -> str:
        # Style sheet and script go with every output, since a notebook may drop or move the others.
        style, script = _template("view.css"), _template("view.js")
        return f'<style>{style}</style><div class="tl-jets">{self._section()}</div><script>{script}</script>'

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


class Shown:
    """Base of results that notebooks show as a headline and the head of a table, without running the model."""

    def _repr_html_(self) -> str:
        return shown_as(self)._repr_html_()

    def _headline(self) -> str:
        return repr(self).split("\n")[0]

    def _body(self) -> str:
        """The HTML under the headline."""
        return dataframe_html(self.to_dataframe())  # type: ignore[attr-defined]


def shown_as(result: Shown) -> View:
    """The view of a result, after loading the modules that register views."""
    for module in VIEWS:
        import_module(module)
    return view_of(result)


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
        body = "\n".join(_part(part) for part in parts)
    style, script = _template("view.css"), _template("view.js")
    return filled("page.html", title=text(title), style=style, script=script, parts=body)


def filled(template: str, **values: str) -> str:
    """Substitute values for names in a template of `tl_jets.views` in one pass; values are not searched again."""
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: values[match[1]], _template(template))


def dataframe_html(
    frame: pd.DataFrame,
    *,
    rows: int = SHOWN_ROWS,
    columns: int = SHOWN_COLUMNS,
    total: int | None = None,
    whole: str = WHOLE,
) -> str:
    """The first `rows` and `columns` of a table, with escaped cells and visible spaces in tokens.

    If cells are cut off, a note names `whole` as the way to get them. `total` is the number of rows if `frame` is a
    head.
    """
    head = frame.iloc[:rows, :columns]
    cells = [_column(head.iloc[:, i].tolist(), bool(_TOKENS.search(str(name)))) for i, name in enumerate(head.columns)]
    total = len(frame) if total is None else total
    hidden = [f"{total - len(head):,} more rows"] if total > len(head) else []
    hidden += [f"{frame.shape[1] - columns:,} more columns"] if frame.shape[1] > columns else []
    note = f"<p>{' and '.join(hidden)}: {text(whole)}</p>" if hidden else ""
    return table([text(name) for name in head.columns], zip(*cells, strict=True)) + note


def _column(values: list[Any], tokens: bool) -> list[str]:
    """Cells of a column; numbers are right-aligned, without decimals if all are whole."""
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    whole = all(isinstance(x, int) or math.isnan(x) or (x.is_integer() and abs(x) < 1e15) for x in numbers)

    def shown(value: Any) -> str:
        missing = value is None or (
            len(numbers) < len(values) and value != value
        )  # pandas turns None among texts into NaN
        if missing:
            return "<td></td>"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return f'<td class="number">{f"{value:.0f}" if whole and math.isfinite(value) else number(value)}</td>'
        write = token if tokens else text
        return cell(" ".join(map(write, value)) if isinstance(value, (list, tuple)) else write(value))

    return [shown(value) for value in values]


def _part(part: Any) -> str:
    if isinstance(part, Shown):
        part = shown_as(part)
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
def _template(name: str) -> str:
    return files("tl_jets").joinpath(f"views/templates/{name}").read_text(encoding="utf-8")
