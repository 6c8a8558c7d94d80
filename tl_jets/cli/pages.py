"""The page that a command writes: what was asked, its tables whole, and the legend that the terminal shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from tl_jets.core.markup import text
from tl_jets.core.notebook import View, dataframe_html, page

# Of a table with a row for every token of the vocabulary.
MAX_ROWS = 1000


def section(title: str, frame: pd.DataFrame, notes: Sequence[str] = (), *, total: int | None = None) -> View:
    """A table, or the beginning of one of `total` rows, and remarks below it."""
    below = "".join(f"<p>{text(note)}</p>" for note in notes)
    shown = dataframe_html(frame, rows=MAX_ROWS, total=total, columns=frame.shape[1], whole="--json has them")
    return View(title, shown + below)


def records(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> pd.DataFrame:
    """Some entries of records as a table: `columns` gives the heading of each. Tokens (already visible) become texts."""
    return pd.DataFrame([{name: _shown(row.get(key)) for key, name in columns.items()} for row in rows], dtype=object)


def _shown(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value["token"]
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return value


def command_page(command: str, asked: Mapping[str, Any], explained: Mapping[str, str], *parts: View) -> str:
    """A whole document: offline, and every token text."""
    about = "".join(f"<p>{text(name)}: {text(value)}</p>" for name, value in asked.items())
    entries = "".join(f"<p><b>{text(name)}</b>: {text(entry)}</p>" for name, entry in explained.items())
    return page(f"tl-jets {command}", View("What was asked", about), *parts, View("How to read this", entries))
