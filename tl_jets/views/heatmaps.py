"""A head's skip-trigrams as a heatmap over two of key, query and output token.

======================  ==========================================================================
`axes`                  a cell is
======================  ==========================================================================
`"key_query"`           A(key | query): how much the query (a column) attends to the key (a row)
`"key_output"`          log P(output | key): what the head writes for the key
`"query_output"`        A(key | query) + log P(output | key) at one key: the score of the trigram
======================  ==========================================================================

All cells are computed exactly as in `jet_trigrams`, also those whose trigrams are not in the table. The table's tokens
are the axes, so a selection of it chooses them: `table.where(token_1=" not")`.

Example:
    >>> import tl_jets as tj
    >>> model = tj.load_tinydocs()
    >>> table = tj.jet_trigrams(model, 1, 0, top_k=100)
    >>> trigram_heatmap(model, table).title.split(":")[0]
    'L1H0'
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal, get_args

import torch

from tl_jets.core.markup import cell, diverging, largest, rising, row_head, table, token
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.numerals import number, precise
from tl_jets.core.tokens import visible
from tl_jets.ngrams import fingerprint
from tl_jets.ngrams.tables import NgramTable
from tl_jets.ngrams.trigrams import trigram_parts
from tl_jets.views.pages import View

Axes = Literal["key_query", "key_output", "query_output"]
PLACES = {"key": 0, "query": 1, "output": 2}


def trigram_heatmap(
    model: Any, trigrams: NgramTable, *, axes: Axes = "key_query", key: int | str | None = None, size: int = 12
) -> View:
    """A head's skip-trigrams, two of their tokens against each other.

    Args:
        model: The model (or `ResidualNetwork`) that the table is of.
        trigrams: A table of one head from `jet_trigrams`, or a selection of it; its first tokens are the axes.
        axes: Rows and columns, see the module.
        key: The fixed key token of `"query_output"`, as text or id, from the table; None for the best one.
        size: Maximum number of tokens per axis.

    Returns:
        A `View` in nats. Log-probabilities are colored by probability (bluer is larger), raw scores around zero.

    Raises:
        ValueError: The table is not of one head of this model, is empty, or has no such key.

    Source: Chen et al., arXiv 2410.06024, skip-trigrams. Cost: the layer's attention on V tokens, V d_head multiply-adds
    per token of the axes, and a fingerprint of the weights.

    Example:
        >>> import tl_jets as tj
        >>> model = tj.load_tinydocs()
        >>> table = tj.jet_trigrams(model, 1, 0, top_k=20)
        >>> "log P" in trigram_heatmap(model, table, axes="key_output", size=3).html
        True
    """
    if axes not in get_args(Axes):
        raise ValueError(f"axes must be one of {get_args(Axes)}; got {axes!r}.")
    if size < 1:
        raise ValueError(f"size must be 1 or more; got {size}.")
    network = ResidualNetwork(model)
    layer, head = _head_of(network, trigrams)
    if key is not None and axes != "query_output":
        raise ValueError(f"key is for axes='query_output', where one key is held fixed; got axes={axes!r}.")
    if axes == "query_output":
        trigrams = trigrams[:] if key is None else trigrams[key]
        if not len(trigrams):
            raise ValueError(f"key must be the first token of a trigram in the table; got {key!r}, which begins none.")
        trigrams = trigrams.where(id_1=int(trigrams.ids[0, 0]))
    row_name, column_name = axes.split("_")
    rows, columns = (_first(trigrams, PLACES[name], size) for name in (row_name, column_name))
    triples = trigrams.ids[0].repeat(len(rows), len(columns), 1)
    triples[..., PLACES[row_name]] = torch.tensor(rows, device="cpu")[:, None]
    triples[..., PLACES[column_name]] = torch.tensor(columns, device="cpu")
    settings: Any = {name: trigrams.settings[name] for name in ("distance", "normalize")}
    attention, log_prob = trigram_parts(network, layer, head, triples.flatten(0, 1), **settings)
    what, values = {
        "key_query": ("A(key | query)", attention),
        "key_output": ("log P(output | key)", log_prob),
        "query_output": ("A(key | query) + log P(output | key)", attention + log_prob),
    }[axes]
    is_probability = axes == "key_output" or settings["normalize"] != "none"
    fixed = f" of key {visible(trigrams.names[int(trigrams.ids[0, 0])])}" if axes == "query_output" else ""
    names = [[trigrams.names[token_id] for token_id in ids] for ids in (rows, columns)]
    grid = values.reshape(len(rows), len(columns)).tolist()
    cells, scale = _cells(grid, names, (row_name, column_name, what), is_probability)
    color = "orange is above zero, blue below"
    if is_probability:
        color = f"bluer is a larger probability, full color is {number(scale)}"
    caption = (
        f"Rows are {row_name} tokens, columns {column_name} tokens; nats, at distance {settings['distance']}, normalize="
        f"{settings['normalize']}; {color}."
    )
    heads = [f"{row_name} \\ {column_name}", *map(token, names[1])]
    return View(f"{trigrams.path}: {what}{fixed}", table(heads, cells, caption=caption))


def _cells(
    grid: list[list[float]], names: list[list[str]], what: tuple[str, str, str], is_probability: bool
) -> tuple[list[list[str]], float]:
    """Rows of cells with their head, and the value of full color."""
    colored = [[math.exp(value) if is_probability else value for value in row] for row in grid]
    scale = largest(value for row in colored for value in row)
    body = []
    for first, values, shares in zip(names[0], grid, colored, strict=True):
        cells = [row_head(token(first))]
        for second, value, share in zip(names[1], values, shares, strict=True):
            lines = [f"{what[0]} {visible(first)}", f"{what[1]} {visible(second)}", f"{what[2]} {precise(value)}"]
            lines += [f"probability {precise(share)}"] if is_probability else []
            color = rising(share / scale) if is_probability else diverging(value, scale)
            cells.append(cell(number(value), color, hover="\n".join(lines)))
        body.append(cells)
    return body, scale


def _head_of(network: ResidualNetwork, trigrams: NgramTable) -> tuple[int, int]:
    """Layer and head of a table of skip-trigrams; ValueError unless it is of this model."""
    found = re.fullmatch(r"L(\d+)H(\d+)", trigrams.path)
    if trigrams.settings.get("ngram") != "skip-trigram" or found is None or not len(trigrams):
        raise ValueError(
            f"A heatmap is of a table of skip-trigrams of one head, with a row at least; got "
            f"{repr(trigrams).splitlines()[0]}. Make it with jet_trigrams(model, layer, head)."
        )
    own = fingerprint(network)
    if trigrams.fingerprint != own:
        raise ValueError(
            f"The table must be of the same model; it is of {trigrams.fingerprint[:12] or 'an unknown one'}, the model is "
            f"{own[:12]}. Make the table again with jet_trigrams."
        )
    return int(found[1]), int(found[2])


def _first(trigrams: NgramTable, place: int, size: int) -> list[int]:
    """The first distinct tokens at a place of the n-grams, best first."""
    return list(dict.fromkeys(trigrams.ids[:, place].tolist()))[:size]
