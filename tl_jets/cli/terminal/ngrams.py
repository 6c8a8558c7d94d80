"""Tables of n-grams: one by itself, or several side by side as far as the width allows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from tl_jets.cli.terminal.parts import heading, legend, new_table, titled
from tl_jets.core.numerals import number
from tl_jets.core.tokens import visible
from tl_jets.ngrams.tables import NgramTable, side_by_side

# Maximum rows of a table with `per="row"`, and of any other.
SHOWN, MOST_SHOWN = 20, 1000
RANK_WIDTH, GAP = 6, 2


def tables(
    found: Mapping[str, NgramTable],
    *,
    model: str,
    tokens: Sequence[int] | None,
    top_k: int,
    scores: bool,
    saved: Sequence[str],
    width: int,
) -> list[RenderableType]:
    """Heading, tables, legend."""
    is_trigram = next(iter(found.values())).n == 3
    parts: list[RenderableType] = [heading("ngrams", asked(found, model=model, top_k=top_k, saved=saved))]
    for token in [None] if tokens is None else tokens:
        chosen = dict(found) if token is None else {label: table[token] for label, table in found.items()}
        of = "" if token is None else f" {'of the key' if is_trigram else 'after'} {_name(found, token)}"
        if is_trigram or len(chosen) == 1:
            parts += [_alone(label, table, of) for label, table in chosen.items()]
        else:
            parts += _beside(chosen, of, scores, width)
    return [*parts, legend(explained(found))]


def asked(
    found: Mapping[str, NgramTable], *, model: str, top_k: int, saved: Sequence[str] = ()
) -> dict[str, str | Text]:
    """The request."""
    rows: dict[str, str | Text] = {"model": model, "n-grams": _what(next(iter(found.values())), top_k)}
    return rows | ({"saved": ", ".join(saved)} if saved else {})


def _what(table: NgramTable, top_k: int) -> str:
    kind = "skip-trigrams (key ... query -> output)" if table.n == 3 else "bi-grams"
    settings = table.settings
    if settings.get("per") == "row" or settings["rows"] != "all":
        best = f"the {top_k} best {kind} of each token"
        return best if table.n == 2 else f"the {top_k} best {kind}"
    return f"the {top_k} best {kind} of the whole vocabulary"


def _name(found: Mapping[str, NgramTable], token: int) -> str:
    names = (table.names[token] for table in found.values() if token in table.names)
    return visible(next(names, f"id:{token}"))


def _alone(label: str, table: NgramTable, of: str) -> RenderableType:
    """One table: a row per n-gram, with its score and parts."""
    drawn = new_table()
    drawn.add_column("rank", justify="right")
    for name in ("key", "query", "output") if table.n == 3 else ("first", "then"):
        drawn.add_column(name, overflow="fold")
    parts = ("attention", "log_prob") if table.n == 3 else ()
    is_log = table.settings.get("score", "logprob") == "logprob"
    drawn.add_column("score", justify="right")
    for name in parts:
        drawn.add_column(name.replace("_", " "), justify="right")
    if is_log and table.n == 2:
        drawn.add_column("probability", justify="right")
    names = {token: visible(text) for token, text in table.names.items()}
    shown = table[: _how_many(table, of)]
    for i, ids in enumerate(shown.ids.tolist()):
        score = float(shown.scores[i])
        cells = [number(score), *(number(shown.parts[name][i]) for name in parts)]
        if is_log and table.n == 2:
            cells.append(f"{math.exp(score):.1%}")
        drawn.add_row(str(i + 1), *(Text(names[token]) for token in ids), *cells)
    more = [f"{len(table) - len(shown):,} more: --json, --save"] if len(shown) < len(table) else []
    return titled(f"{label}{of}", drawn, *more, *([table.note] if table.note else []))


def _beside(found: Mapping[str, NgramTable], of: str, scores: bool, width: int) -> Iterator[RenderableType]:
    """Several tables as columns, split to fit the width."""
    n_rows = max(len(table) for table in found.values())
    k = min(n_rows, _how_many(next(iter(found.values())), of))
    frame = side_by_side(found, k, scores=scores)
    columns = {name: [_cell(value) for value in frame[name]] for name in frame.columns}
    widths = {name: max(len(name), *(len(cell) for cell in cells)) + GAP for name, cells in columns.items()}
    for names in _fitting(widths, width - RANK_WIDTH + GAP):
        drawn = new_table()
        drawn.add_column("rank", justify="right")
        for name in names:
            drawn.add_column(Text(name.removesuffix(" score") if name in found else "score"), overflow="fold")
        for i in range(len(frame)):
            drawn.add_row(str(i + 1), *(Text(columns[name][i]) for name in names))
        notes = [f"{n_rows - k:,} more rows: --json, --save"] if k < n_rows else []
        yield titled(f"Bi-grams by path{of}: {', '.join(name for name in names if name in found)}", drawn, *notes)


def _how_many(table: NgramTable, of: str) -> int:
    """Number of rows to show, for one token (`of`) or for all."""
    return SHOWN if table.settings.get("per") == "row" and not of else MOST_SHOWN


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else number(value)


def _fitting(widths: Mapping[str, int], room: int) -> Iterator[list[str]]:
    """Groups of consecutive columns that fit; scores stay beside their table."""
    group: list[str] = []
    used = 0
    for name, width in widths.items():
        if group and used + width > room and not (name.endswith(" score") and group[-1] == name.removesuffix(" score")):
            yield group
            group, used = [], 0
        group.append(name)
        used += width
    if group:
        yield group


def explained(found: Mapping[str, NgramTable]) -> dict[str, str]:
    """The legend of the tables."""
    first = next(iter(found.values()))
    score, normalize = first.settings.get("score"), str(first.settings.get("normalize"))
    if first.n == 3:
        attention = {
            "vocab": "how much the query looks at the key: log softmax over the whole vocabulary as keys",
            "pair": "how much the query looks at the key in a context of these two tokens, as a logarithm",
            "none": "the raw query-key score, which a key bias shifts without changing any output",
        }
        rows = {
            "attention": f"{attention.get(normalize, attention['vocab'])}, nats.",
            "log prob": "Log-probability of the output, decoded from what the head writes of the key alone, nats.",
            "score": "Their sum. These are exactly the best of all V^3 triples.",
        }
    else:
        rows = {
            "score": "Logit of the second token after the first, after the model's own softcap or scale."
            if score == "logit"
            else "Log-probability of the second token after the first, in nats: exact over the whole vocabulary, from the "
            "weights alone.",
            "direct": "The embedding, decoded at once. mlps: all MLPs without attention. 3_mlp: one MLP of the embedding.",
        }
    rows["control"] = (
        "No text was read, and tokens that training rarely met score as high as others. tl_jets.studies compares with counts "
        "of a text, and ablates the component."
    )
    rows["\u00b7"] = "A space that belongs to the token; \ufffd is a part of a character."
    return rows
