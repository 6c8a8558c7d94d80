"""How notebooks show results: a headline and the head of a table, as safe HTML, without running the model.

A result that inherits from `Shown` renders so, unless `tl_jets.views` registers a view of its class.

Example:
    >>> import pandas as pd
    >>> html = dataframe_html(pd.DataFrame({"token": [" the", "</b>"], "logit": [1.0, -2.5]}))
    >>> "&lt;/b&gt;" in html, "</b>" in html, "·the" in html
    (True, False, True)
"""

from __future__ import annotations

import math
import re
from importlib import import_module
from typing import Any

import pandas as pd

from tl_jets.core.markup import cell, table, text, token
from tl_jets.core.numerals import number

# Size of a table in a notebook.
SHOWN_ROWS, SHOWN_COLUMNS = 12, 20
# Columns that hold tokens: their spaces are shown.
_TOKENS = re.compile(r"(^|_)(token|tokens|target)(_|$)|^token_string$")


class Shown:
    """Base of results that notebooks show as a headline and the head of a table, without running the model."""

    def _repr_html_(self) -> str:
        return import_module("tl_jets.views.pages").view_of(self)._repr_html_()  # views know results, not the reverse

    def _headline(self) -> str:
        return repr(self).split("\n")[0]

    def _body(self) -> str:
        """The HTML under the headline."""
        return dataframe_html(self.to_dataframe())  # type: ignore[attr-defined]


def dataframe_html(
    frame: pd.DataFrame,
    *,
    rows: int = SHOWN_ROWS,
    columns: int = SHOWN_COLUMNS,
    total: int | None = None,
    whole: str = "to_dataframe()",
) -> str:
    """The first `rows` and `columns` of a table, with escaped cells and visible spaces in tokens.

    If cells are left out, a note names `whole` as the way to get them. `total` is the number of rows if `frame` is a
    head.
    """
    head = frame.iloc[:rows, :columns]
    cells = [_column(head.iloc[:, i].tolist(), bool(_TOKENS.search(str(name)))) for i, name in enumerate(head.columns)]
    left = {"rows": (total or len(frame)) - len(head), "columns": frame.shape[1] - head.shape[1]}
    hidden = [f"{count:,} more {kind}" for kind, count in left.items() if count]
    note = f"<p>{' and '.join(hidden)}: {text(whole)}</p>" if hidden else ""
    return table([text(name) for name in head.columns], zip(*cells, strict=True)) + note


def _column(values: list[Any], tokens: bool) -> list[str]:
    """Cells of a column; numbers are right-aligned, without decimals if all are whole."""
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    whole = all(isinstance(x, int) or math.isnan(x) or (x.is_integer() and abs(x) < 1e15) for x in numbers)

    def shown(value: Any) -> str:
        if value is None or (len(numbers) < len(values) and value != value):
            return "<td></td>"  # pandas turns None among texts into NaN
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return f'<td class="number">{f"{value:.0f}" if whole and math.isfinite(value) else number(value)}</td>'
        write = token if tokens else text
        return cell(" ".join(map(write, value)) if isinstance(value, (list, tuple)) else write(value))

    return [shown(value) for value in values]
