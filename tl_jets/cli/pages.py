"""The HTML page of a command: the request, its complete tables, and the terminal's legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from tl_jets.core.markup import text
from tl_jets.core.notebook import View, dataframe_html, page

# Maximum number of rows of a table on a page.
MAX_ROWS = 1000


def section(title: str, frame: pd.DataFrame, notes: Sequence[str] = (), *, total: int | None = None) -> View:
    """A table, or the first rows of one of `total` rows, with notes below."""
    below = "".join(f"<p>{text(note)}</p>" for note in notes)
    shown = dataframe_html(frame, rows=MAX_ROWS, total=total, columns=frame.shape[1], whole="--json has them")
    return View(title, shown + below)


def records(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> pd.DataFrame:
    """Entries of records as a table with the headings of `columns`; visible tokens become texts."""
    return pd.DataFrame([{name: _shown(row.get(key)) for key, name in columns.items()} for row in rows], dtype=object)


def _shown(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value["token"]
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return value


def command_page(command: str, asked: Mapping[str, Any], explained: Mapping[str, str], *parts: View) -> str:
    """A complete offline HTML document, with tokens escaped."""
    about = "".join(f"<p>{text(name)}: {text(value)}</p>" for name, value in asked.items())
    entries = "".join(f"<p><b>{text(name)}</b>: {text(entry)}</p>" for name, entry in explained.items())
    return page(f"tl-jets {command}", View("What was asked", about), *parts, View("How to read this", entries))
