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
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import Tensor

from tl_jets.core.markup import cell, diverging, largest, rising, row_head, table, token
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.numerals import number, precise
from tl_jets.core.options import check_choice, check_integers
from tl_jets.core.tokens import visible
from tl_jets.ngrams import fingerprint
from tl_jets.ngrams.tables import NgramTable
from tl_jets.ngrams.trigrams import trigram_parts
from tl_jets.views.pages import View

Axes = Literal["key_query", "key_output", "query_output"]
PLACES = {"key": 0, "query": 1, "output": 2}
VALUES = {
    "key_query": "A(key | query)",
    "key_output": "log P(output | key)",
    "query_output": "A(key | query) + log P(output | key)",
}


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
    check_choice("axes", axes, tuple(VALUES))
    check_integers(1, size=size)
    network = ResidualNetwork(model)
    layer, head = _head_of(network, trigrams)
    fixed = ""
    if axes == "query_output":
        trigrams = _of_one_key(trigrams, key)
        fixed = f" of key {visible(trigrams.names[int(trigrams.ids[0, 0])])}"
    elif key is not None:
        raise ValueError(f"key is for axes='query_output', where one key is held fixed; got axes={axes!r}.")
    ids = {name: _first(trigrams, PLACES[name], size) for name in axes.split("_")}
    settings: Any = {name: trigrams.settings[name] for name in ("distance", "normalize")}
    (row_name, rows), (column_name, columns) = ids.items()
    triples = trigrams.ids[0].repeat(len(rows), len(columns), 1)
    triples[..., PLACES[row_name]] = torch.tensor(rows, device="cpu")[:, None]
    triples[..., PLACES[column_name]] = torch.tensor(columns, device="cpu")
    attention, log_prob = trigram_parts(network, layer, head, triples.flatten(0, 1), **settings)
    values = {"key_query": attention, "key_output": log_prob, "query_output": attention + log_prob}[axes]
    names = {name: [trigrams.names[token_id] for token_id in of_axis] for name, of_axis in ids.items()}
    is_probability = axes == "key_output" or settings["normalize"] != "none"
    body, color = _cells(values.view(len(rows), len(columns)), names, VALUES[axes], is_probability)
    caption = (
        f"Rows are {row_name} tokens, columns {column_name} tokens; nats, at distance {settings['distance']}, normalize="
        f"{settings['normalize']}; {color}."
    )
    heads = [f"{row_name} \\ {column_name}", *map(token, names[column_name])]
    return View(f"{trigrams.path}: {VALUES[axes]}{fixed}", table(heads, body, caption=caption))


def _of_one_key(trigrams: NgramTable, key: int | str | None) -> NgramTable:
    """The skip-trigrams of one key token."""
    found = trigrams if key is None else trigrams[key]
    if not len(found):
        raise ValueError(f"key must be the first token of a trigram in the table; got {key!r}, which begins none.")
    return found.where(id_1=int(found.ids[0, 0]))


def _cells(grid: Tensor, names: dict[str, list[str]], what: str, is_probability: bool) -> tuple[list[list[str]], str]:
    """Rows of cells with their head, and the meaning of colors in words."""
    shares = grid.exp() if is_probability else grid
    scale = largest(shares.flatten().tolist())
    (row_name, row_texts), (column_name, column_texts) = names.items()
    body = []
    for row, values, row_shares in zip(row_texts, grid.tolist(), shares.tolist(), strict=True):
        cells = [row_head(token(row))]
        for column, value, share in zip(column_texts, values, row_shares, strict=True):
            lines = [f"{row_name} {visible(row)}", f"{column_name} {visible(column)}", f"{what} {precise(value)}"]
            lines += [f"probability {precise(share)}"] if is_probability else []
            color = rising(share / scale) if is_probability else diverging(value, scale)
            cells.append(cell(number(value), color, hover="\n".join(lines)))
        body.append(cells)
    if is_probability:
        return body, f"bluer is a larger probability, full color is {number(scale)}"
    return body, "orange is above zero, blue below"


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
