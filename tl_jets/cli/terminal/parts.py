"""Headings, cells and legends shared by the tables of all commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

OWN_STYLE = "bold"
# Minimum width of tables, and the width if COLUMNS=0 (unknown).
LEAST_WIDTH, USUAL_WIDTH = 40, 80


class Terminal(Console):
    """A console without markup or emoji codes that raises BrokenPipeError."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)
        self.width = max(self.width or USUAL_WIDTH, LEAST_WIDTH)

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, where newer versions of rich exit."""
        raise BrokenPipeError


def heading(command: str, rows: Mapping[str, str | Text]) -> Text:
    """The command and its request."""
    width = max(8, *(len(name) + 1 for name in rows))
    found = Text.assemble((f"tl-jets {command}", "bold"))
    for name, value in rows.items():
        found.append(f"\n{name:{width}}", "dim")
        found.append(printable(value) if isinstance(value, str) else value)
    return found.append("\n")


def answer_line(answer: str, read: str, position: int) -> Text:
    """The model's answer, and the token it follows."""
    return Text.assemble((answer, "bold"), f", what the model says after {read} (position {position})")


def new_table() -> Table:
    """An empty table, with a rule only below its head."""
    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="dim",
    )


def titled(title: str, table: Table, *notes: str) -> Group:
    """A table below its title, with notes."""
    return Group(Text(title, style="bold"), table, *(Text(note, style="dim") for note in notes), "")


def legend(rows: Mapping[str, str]) -> Group:
    """Names and explanations under the title `How to read this`."""
    found = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    found.add_column(style="bold", no_wrap=True)
    found.add_column()
    for name, text in rows.items():
        found.add_row(Text(name), Text(text, style="dim"))
    return Group(Text("How to read this", style="bold"), Padding(found, (0, 0, 1, 0)))


def words(tokens: Sequence[str]) -> Text:
    """Tokens, best first; the first in bold."""
    return Text(" ").join(Text(token, style="dim" if i else OWN_STYLE) for i, token in enumerate(tokens))


def printable(text: str) -> str:
    """A text on one line, without control or bidirectional characters."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
