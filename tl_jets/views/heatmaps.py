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
    attention, log_prob = (
        part.reshape(len(rows), len(columns)).tolist()
        for part in trigram_parts(network, layer, head, triples.flatten(0, 1), **settings)
    )
    what = {"key_query": "A(key | query)", "key_output": "log P(output | key)"}.get(
        axes, "A(key | query) + log P(output | key)"
    )
    probability = axes == "key_output" or settings["normalize"] != "none"

    def value(i: int, j: int) -> float:
        return {"key_query": attention[i][j], "key_output": log_prob[i][j]}.get(axes, attention[i][j] + log_prob[i][j])

    grid = [[value(i, j) for j in range(len(columns))] for i in range(len(rows))]
    scale = largest(math.exp(x) if probability else x for row in grid for x in row)
    names, body = trigrams.names, []
    for i, first in enumerate(rows):
        cells = [row_head(token(names[first]))]
        for j, second in enumerate(columns):
            found = grid[i][j]
            color = rising(math.exp(found) / scale) if probability else diverging(found, scale)
            lines = [f"{row_name} {visible(names[first])}", f"{column_name} {visible(names[second])}"]
            lines += [f"{what} {precise(found)}"] + ([f"probability {precise(math.exp(found))}"] if probability else [])
            cells.append(cell(number(found), color, hover="\n".join(lines)))
        body.append(cells)
    fixed = f" of key {visible(names[int(trigrams.ids[0, 0])])}" if axes == "query_output" else ""
    title = f"{trigrams.path}: {what}{fixed}"
    color = (
        f"bluer is a larger probability, full color is {number(scale)}"
        if probability
        else "orange is above zero, blue below"
    )
    caption = (
        f"Rows are {row_name} tokens, columns {column_name} tokens; nats, at distance {settings['distance']}, normalize="
        f"{settings['normalize']}; {color}."
    )
    heads = [f"{row_name} \\ {column_name}", *(token(names[second]) for second in columns)]
    return View(title, table(heads, body, caption=caption))


def _head_of(network: ResidualNetwork, trigrams: NgramTable) -> tuple[int, int]:
    """Layer and head of a table of skip-trigrams; ValueError unless it is of this model."""
    found = re.fullmatch(r"L(\d+)H(\d+)", trigrams.path)
    if trigrams.settings.get("ngram") != "skip-trigram" or found is None or not len(trigrams):
        raise ValueError(
            f"A heatmap is of a table of skip-trigrams of one head, with a row at least; got {trigrams._title()}. Make it with "
            "jet_trigrams(model, layer, head)."
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
