"""What a command found, and its four forms: tables in the terminal, JSON, a page, a picture.

A command returns a `Report` of plain data (JSON) and of tables, which the terminal and the page share. Tokens are
escaped everywhere, and nothing depends on color.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text
from torch import Tensor

from tl_jets.core.markup import text
from tl_jets.core.notebook import dataframe_html
from tl_jets.core.numerals import number

if TYPE_CHECKING:
    from tl_jets.views import View

# Minimum width of tables, the width if COLUMNS=0 (unknown), and that of pictures.
LEAST_WIDTH, USUAL_WIDTH, PICTURE_WIDTH = 40, 80, 84
# Maximum number of rows of a table on a page.
MAX_ROWS = 1000
_NUMERIC = re.compile(r"[-+]?[\d.,]+(e-?\d+)?%?( \(.+\))?|[-+]?\u221e|n/a|-|")


@dataclass(frozen=True)
class Table:
    """A titled table of the terminal and the page.

    Attributes:
        title: Plain text.
        rows: One mapping a row, from headings to texts, numbers, or lists of tokens; or a frame.
        sums: Rows that stand below a rule.
        notes: Lines below the table.
        top: Number of rows that the terminal shows; None for all.
        total: Number of rows of which `rows` are the first; None if they are all.
        more: What the terminal says after the number of rows that it leaves out.
    """

    title: str
    rows: Sequence[Mapping[str, Any]] | pd.DataFrame
    sums: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    top: int | None = None
    total: int | None = None
    more: str = "more: --json"

    def frame(self, rows: int | None = None) -> pd.DataFrame:
        """The first rows, and the sums."""
        body = pd.DataFrame(self.rows, dtype=object).iloc[:rows]
        return pd.concat([body, pd.DataFrame(self.sums, dtype=object)]) if self.sums else body

    def hidden(self, rows: int | None) -> int:
        """Number of rows after the first ones."""
        total = len(self.rows) if self.total is None else self.total
        return 0 if rows is None else max(total - rows, 0)


@dataclass(frozen=True)
class Report:
    """What a command found.

    Attributes:
        data: Plain values for JSON.
        asked: The request and the model's answer, by name.
        tables: Tables of the terminal and the page.
        legend: Explanations by name.
        on_page: Tables of the page, if they are others.
        views: Makes the views of the page, which stand before its tables.
        picture: Tables in the picture.
        verdict: What the terminal says first.
        further: What to run next, a line each, which the terminal says last.
    """

    data: Mapping[str, Any]
    asked: Mapping[str, str]
    tables: Sequence[Table]
    legend: Mapping[str, str]
    on_page: Sequence[Table] | None = None
    views: Callable[[], Sequence[View]] = tuple
    picture: Sequence[Table] = ()
    verdict: Sequence[str] = ()
    further: Sequence[str] = ()

    @property
    def command(self) -> str:
        """The name of the command."""
        return self.data["command"]

    def html(self) -> str:
        """A complete page that opens offline."""
        from tl_jets.views import View, page  # views take longer to load than a table to print

        asked = "<br>".join(f"{text(name)}: {text(value)}" for name, value in self.asked.items())
        asked = f"<p>{asked}</p><p>{'<br>'.join(f'<b>{text(line)}</b>' for line in self.verdict)}</p>"
        legend = "".join(f"<p><b>{text(name)}</b>: {text(entry)}</p>" for name, entry in self.legend.items())
        tables = self.tables if self.on_page is None else self.on_page
        parts = [View("What was asked", asked), *self.views(), *map(_view, tables)]
        title = ": ".join([f"tl-jets {self.command}", *([self.data["prompt"]] if "prompt" in self.data else [])])
        return page(title, *parts, *([View("How to read this", legend)] if legend else []))

    def json(self) -> Iterator[str]:
        """The data as JSON, in parts."""
        encoder = json.JSONEncoder(allow_nan=False, ensure_ascii=False, indent=1)
        return encoder.iterencode(plain(self.data))

    def svg(self) -> str:
        """The heading and the first tables as a picture, without external fonts."""
        console = Terminal(record=True, file=io.StringIO(), width=PICTURE_WIDTH)
        console.print(_heading(self), *map(_drawn, self.picture))
        picture = console.export_svg(title=f"tl-jets {self.command}")
        return re.sub(r"@font-face\s*\{[^}]*\}\s*", "", picture)

    def show(self, *, explain: bool = True) -> None:
        """Print verdict, heading, tables and what to run next; on request the legend."""
        console = Terminal()
        said = [Text(_cell(line), style="bold") for line in self.verdict]
        further = [Text(_cell(line), style="dim") for line in self.further]
        legend = [_entries("How to read this", self.legend)] if self.legend and explain else []
        for part in (*said, _heading(self), *map(_drawn, self.tables), *legend, *further):
            console.print(part)


class Terminal(Console):
    """A console without markup or emoji codes that raises BrokenPipeError."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)
        self.width = max(self.width or USUAL_WIDTH, LEAST_WIDTH)

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, where newer versions of rich exit."""
        raise BrokenPipeError


class Records(list[Any]):
    """`count` records from the iterator `make()`, a list to the JSON encoder, but never all in memory."""

    def __init__(self, count: int, make: Callable[[], Iterator[Any]]):
        super().__init__()
        self.size, self.make = count, make

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Any]:
        return map(plain, self.make())


def header(command: str, **asked: Any) -> dict[str, Any]:
    """The first entries of every JSON file: version, command, and request."""
    return {"tl_jets": version("tl-jets"), "command": command, **asked}


def plain(value: Any) -> Any:
    """Plain lists, numbers and texts; NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Records):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def _view(table: Table) -> View:
    """A table on a page."""
    from tl_jets.views import View

    frame = table.frame(MAX_ROWS)
    total = len(frame) + table.hidden(MAX_ROWS)
    shown = dataframe_html(frame, rows=len(frame), columns=frame.shape[1], total=total, whole="--json has them")
    return View(table.title, shown + "".join(f"<p>{text(note)}</p>" for note in table.notes))


def _cell(value: Any) -> str:
    """A value on one line, without control or bidirectional characters."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (list, tuple)):
        value = " ".join(value)
    shown = f"{value:,}" if isinstance(value, int) else number(value) if isinstance(value, float) else str(value)
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in shown)


def _drawn(table: Table) -> Group:
    """A table of the terminal below its title, columns of numbers to the right."""
    frame = table.frame(table.top)
    drawn = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    columns = [[_cell(value) for value in frame.iloc[:, i]] for i in range(frame.shape[1])]
    for name, cells in zip(frame.columns, columns, strict=True):
        justify = "right" if all(_NUMERIC.fullmatch(cell) for cell in cells) else "left"
        drawn.add_column(Text(_cell(name)), justify=justify, overflow="fold")
    first_sum = len(frame) - len(table.sums)
    for i, row in enumerate(zip(*columns, strict=True)):
        if table.sums and i == first_sum:
            drawn.add_section()
        drawn.add_row(*map(Text, row))
    more = [f"{table.hidden(table.top):,} {table.more}"] if table.hidden(table.top) else []
    notes = [Text(_cell(note), style="dim") for note in (*more, *table.notes)]
    return Group(Text(_cell(table.title), style="bold"), drawn, *notes, "")


def _heading(report: Report) -> RenderableType:
    """The command and its request."""
    return _entries(f"tl-jets {report.command}", report.asked)


def _entries(title: str, entries: Mapping[str, str]) -> Group:
    """Names with texts under a title."""
    grid = RichTable.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, entry in entries.items():
        grid.add_row(Text(_cell(name)), Text(_cell(entry)))
    return Group(Text(title, style="bold"), grid, "")
