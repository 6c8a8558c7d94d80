"""What a notebook shows: views, pages of several, and results as views.

A `View` is a title and a fragment of HTML that needs nothing else: a notebook shows it where it is the last line of a cell,
`page()` and `save(path)` make one self-contained document that opens offline. `page(title, *parts)` puts several views, results
and tables on one. A result that inherits from `Shown` renders in a notebook as its headline and the head of its table.

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

# Of a table in a notebook.
SHOWN_ROWS, SHOWN_COLUMNS = 12, 20
# Modules that register views of results (`view_of.register`); loaded when a result is first shown.
VIEWS = ["tl_jets.views.lens_tables"]
WHOLE = "to_dataframe()"
FIGURE_DPI = 144
# Columns that hold tokens: their spaces are shown.
_TOKENS = re.compile(r"(^|_)(token|tokens|target)(_|$)|^token_string$")


@dataclass(frozen=True, eq=False, repr=False)
class View:
    """A self-contained fragment of HTML with a title.

    Attributes:
        title: Plain text.
        html: The fragment, without its style sheet.
    """

    title: str
    html: str = field(repr=False)

    def __repr__(self) -> str:
        return f"View({self.title!r}, {len(self.html.encode()) / 1000:.1f} kB)"

    def _repr_html_(self) -> str:
        # A style sheet and a script with every output: a notebook may drop or move any of the others.
        style, script = _template("view.css"), _template("view.js")
        return f'<style>{style}</style><div class="tl-jets">{self._section()}</div><script>{script}</script>'

    def _section(self) -> str:
        return f"<section><h2>{text(self.title)}</h2>{self.html}</section>"

    def page(self) -> str:
        """The view as a whole document that needs no other file and no network."""
        return page(self.title, self)

    def save(self, path: str | Path) -> Path:
        """Write `page()` to a file, and return its path.

        Raises:
            OSError: The file cannot be written.
        """
        path = Path(path)
        path.write_text(self.page(), encoding="utf-8")
        return path

    @classmethod
    def joined(cls, title: str, *parts: Any) -> View:
        """Several views, results or tables as one; `page` says which."""
        return cls(title, "".join(_part(part) for part in parts))


class Shown:
    """A result that a notebook shows as its headline and the head of its table, without running the model."""

    def _repr_html_(self) -> str:
        return shown_as(self)._repr_html_()

    def _headline(self) -> str:
        return repr(self).split("\n")[0]

    def _body(self) -> str:
        """What stands under the headline."""
        return dataframe_html(self.to_dataframe())  # type: ignore[attr-defined]


def shown_as(result: Shown) -> View:
    """The view of a result, by the rooms that draw results."""
    for module in VIEWS:
        import_module(module)
    return view_of(result)


@singledispatch
def view_of(result: Any) -> View:
    """What a notebook shows of a result: its headline and the head of its table, unless a view is registered for its class.

    `tl_jets.views` registers what it draws of lenses: `@view_of.register`.
    """
    return View(result._headline(), result._body())


def page(title: str, *parts: Any) -> str:
    """Several parts as one HTML document that needs no other file and no network.

    Args:
        title: Plain text, above all parts.
        *parts: Views, results, pandas tables, matplotlib figures, or any object with `_repr_html_` (whose HTML is taken as it
            is; the page lets nothing of it load from elsewhere).

    Returns:
        The document; write it with encoding UTF-8.

    Raises:
        TypeError: A part is none of these.

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
    """A template of this package with values in the place of their names, in one pass: no value is read for names."""
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: values[match[1]], _template(template))


def dataframe_html(
    frame: pd.DataFrame,
    *,
    rows: int = SHOWN_ROWS,
    columns: int = SHOWN_COLUMNS,
    total: int | None = None,
    whole: str = WHOLE,
) -> str:
    """The first rows and columns of a table, every cell as text; tokens with their spaces shown.

    Args:
        frame: The table, or the head of one.
        rows: How many rows are shown.
        columns: How many columns.
        total: How many rows there are, if `frame` has not all of them.
        whole: What gives all of it, named in a note if something was cut off.
    """
    head = frame.iloc[:rows, :columns]
    cells = [_column(head.iloc[:, i].tolist(), bool(_TOKENS.search(str(name)))) for i, name in enumerate(head.columns)]
    total = len(frame) if total is None else total
    hidden = [f"{total - len(head):,} more rows"] if total > len(head) else []
    hidden += [f"{frame.shape[1] - columns:,} more columns"] if frame.shape[1] > columns else []
    note = f"<p>{' and '.join(hidden)}: {text(whole)}</p>" if hidden else ""
    return table([text(name) for name in head.columns], zip(*cells, strict=True)) + note


def _column(values: list[Any], tokens: bool) -> list[str]:
    """Cells of a column; numbers to the right, whole ones without decimals if all of them are."""
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    whole = all(isinstance(x, int) or math.isnan(x) or (x.is_integer() and abs(x) < 1e15) for x in numbers)

    def shown(value: Any) -> str:
        missing = value is None or (
            len(numbers) < len(values) and value != value
        )  # among texts pandas writes None as NaN
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
    if callable(getattr(part, "savefig", None)):  # before _repr_html_, which a figure has and which gives nothing
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
