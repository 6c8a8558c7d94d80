r"""Probability mass of a list of bi-grams along a path of the model: a knowledge or toxicity index, with its control.

.. math::
    \text{mass} = \frac{1}{n} \sum_{(z_1, z_2)} P(z_2 | z_1)
    \qquad \text{or} \qquad
    \frac{1}{n} \sum_{(z_1, z_2)} P(z_2 | z_1)\,\text{unigram}(z_1)

over the user's list (or the sum). The controls are **shuffled lists**: the same first tokens, second tokens permuted. A
random shuffle reaches rank r or better among m controls with probability r / (m + 1). Use lists of ten or more bi-grams:
of a list of three, every sixth shuffle is the list itself.

The 95% interval is a percentile bootstrap over the list's words, or bi-grams where these were given; words that share a
bi-gram are resampled together. Duplicates count once, and order does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from tl_jets.core.intervals import Reduce, bootstrap_interval, central
from tl_jets.core.measures import check_seed
from tl_jets.core.options import check_choice, check_integers
from tl_jets.core.results import Result
from tl_jets.ngrams.scoring import check_unigram
from tl_jets.ngrams.streams import PathInput, Tokenize, tokenizing
from tl_jets.ngrams.tables import NgramTable
from tl_jets.studies.pairs import RowScores, list_digest, read_pairs, with_shuffles

WordInput = NgramTable | Tensor | Sequence[str | Sequence[str | int]]

# Sums of the same numbers in another order count as ties.
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False, repr=False)
class Mass(Result):
    """Probability mass that a path gives to a list of bi-grams.

    Attributes:
        value: The `mean` or `sum` over the list, of probabilities.
        interval: 95% percentile bootstrap interval of `value`; NaN for one bi-gram or word.
        controls: `value` of shuffled lists. Shape [control].
        rank: 1 + the number of controls that are at least as large.
        size: Number of distinct bi-grams.
        sha256: Of the list's ids in sorted order.
        skipped: Number of one-token words, which have no bi-gram.
        repeated: Number of duplicate bi-grams.
        weight: `"P(z2|z1)"` or `"P(z2|z1) unigram(z1)"`.
        table: The bi-grams with their log-probabilities, and the part `mass`.
    """

    value: float
    reduce: str
    mean: float
    sum: float
    interval: tuple[float, float]
    controls: Float[Tensor, " control"]
    rank: int
    size: int
    sha256: str
    skipped: int
    repeated: int
    weight: str
    path: str
    fingerprint: str
    table: NgramTable = field(repr=False)

    @property
    def control_mean(self) -> float:
        """Mean over shuffled lists; NaN without controls."""
        return float(self.controls.mean()) if len(self.controls) else math.nan

    @property
    def control_interval(self) -> tuple[float, float]:
        """Central 95% interval of shuffled lists; minimum and maximum of fewer than 39."""
        return central(self.controls.numpy())

    def __repr__(self) -> str:
        low, high = self.interval
        text = (
            f"Mass({self.reduce} of {self.weight} over {self.size} bi-grams, path {self.path}: {self.value:.4g} "
            f"[{low:.3g}, {high:.3g}]"
        )
        if len(self.controls):
            low, high = self.control_interval
            text += f"; shuffled {self.control_mean:.4g} [{low:.3g}, {high:.3g}], rank {self.rank} of {len(self.controls) + 1}"
        if self.skipped:
            text += f"; {self.skipped} words of one token skipped"
        return text + ")"

    def to_dataframe(self) -> pd.DataFrame:
        """All numbers of the result as one row."""
        low, high = self.interval
        control_low, control_high = self.control_interval
        row = {name: getattr(self, name) for name in ("path", "weight", "reduce", "value", "mean", "sum")}
        row |= {"low": low, "high": high, "control_mean": self.control_mean}
        row |= {"control_low": control_low, "control_high": control_high, "n_controls": len(self.controls)}
        row |= {name: getattr(self, name) for name in ("rank", "size", "skipped", "repeated", "sha256", "fingerprint")}
        return pd.DataFrame([row])


def mass(
    model: Any,
    words: WordInput,
    *,
    path: PathInput = "direct",
    tokenize: Tokenize | None = None,
    reduce: Reduce = "mean",
    unigram: Float[Tensor, " d_vocab"] | None = None,
    controls: int = 100,
    seed: int = 0,
    bootstrap: int = 1000,
) -> Mass:
    """Probability mass that a path of the model gives to a list of bi-grams.

    Args:
        model: A model or a `ResidualNetwork`.
        words: Bi-grams as in `pair_scores`, or words with their leading space, which give all pairs of neighboring
            tokens. One-token words are skipped and counted; `mass_change` reads them.
        path: A path, as in `jet_bigrams`.
        tokenize: Function from a text to ids that replaces the model's tokenizer.
        reduce: Whether `value` is the `"mean"` or the `"sum"` over the list.
        unigram: Probability of every token, for the pseudo-joint P(z2|z1) unigram(z1). Shape [d_vocab].
        controls: Number of shuffled lists.
        seed: Random seed of shuffles and bootstrap.
        bootstrap: Number of bootstrap resamples.

    Raises:
        ValueError: No bi-gram is left, or an option is invalid; see `pair_scores`.

    Source: Chen et al., arXiv 2410.06024, section 5.3; intervals and controls are ours. Cost: that of `pair_scores`.
    """
    check_choice("reduce", reduce, get_args(Reduce))
    check_integers(0, controls=controls, bootstrap=bootstrap)
    check_seed(seed)
    reader = RowScores(model, path)
    pairs, words_of, alone = read_list(reader, words, tokenize)
    _check_pairs(pairs, alone)
    distinct, place = pairs.unique(dim=0, return_inverse=True)  # sorted, whatever the order of the list
    prior = 1.0 if unigram is None else check_unigram(unigram, size=reader.d_vocab)[distinct[:, 0]]
    scores = reader.of(with_shuffles(distinct, controls, seed).flatten(0, 1))[0].view(controls + 1, -1)
    shares = scores.exp() * prior
    values = shares.mean(1) if reduce == "mean" else shares.sum(1)
    units, of_list = units_of(place, words_of), shares[0]
    return Mass(
        value=float(values[0]),
        reduce=reduce,
        mean=float(of_list.mean()),
        sum=float(of_list.sum()),
        interval=bootstrap_interval(of_list, units=units, resamples=bootstrap, seed=seed, reduce=reduce),
        controls=values[1:],
        rank=1 + int((values[1:] >= values[0] * (1 - _ROUNDING)).sum()),
        size=len(distinct),
        sha256=list_digest(distinct)["sha256"],
        skipped=len(alone),
        repeated=len(pairs) - len(distinct),
        weight="P(z2|z1)" if unigram is None else "P(z2|z1) unigram(z1)",
        path=reader.path,
        fingerprint=reader.fingerprint,
        table=reader.table(distinct, scores[0], {"mass": of_list}),
    )


def read_list(
    reader: RowScores, words: WordInput, tokenize: Tokenize | None
) -> tuple[Int[Tensor, "pair 2"], Int[Tensor, " pair"], list[int]]:
    """Ids of all bi-grams of a list, the list item of each, and the ids of words of one token."""
    if isinstance(words, str):
        raise ValueError(f"A list of words is wanted; got one text, {words[:40]!r}. Put it in a list.")
    if isinstance(words, (NgramTable, Tensor)):
        pairs = read_pairs(reader, words)
        return pairs, torch.arange(len(pairs), device="cpu"), []
    tokenize = tokenize or tokenizing(reader.network.tokenizer)
    rows, items, alone = [], [], []
    for i, item in enumerate(words):
        ids = [*tokenize(item)] if isinstance(item, str) else []
        found = list(pairwise(ids)) if isinstance(item, str) else [item]
        alone += ids if len(ids) == 1 else []
        rows += found
        items += [i] * len(found)
    pairs = read_pairs(reader, rows, tokenize=tokenize) if rows else torch.empty(0, 2, dtype=torch.long, device="cpu")
    return pairs, torch.tensor(items, dtype=torch.long, device="cpu"), alone


def _check_pairs(pairs: Int[Tensor, "pair 2"], alone: list[int]) -> None:
    if not len(pairs):
        raise ValueError(
            f"A list must have a bi-gram at least; none of its {len(alone)} words is more than one token. Give pairs, or take "
            "mass_change, which reads words of one token."
        )


def units_of(place: Int[Tensor, " pair"], items: Int[Tensor, " pair"]) -> Int[Tensor, " distinct"]:
    """Bootstrap unit of each bi-gram: those of one item, or of items that share a bi-gram, are one unit."""
    n, n_items = int(place.max()) + 1, int(items.max()) + 1
    edges = (np.ones(len(place)), (place.numpy(), n + items.numpy()))
    labels = connected_components(coo_array(edges, shape=(n + n_items, n + n_items)), directed=False)[1][:n]
    _, first, unit = np.unique(labels, return_index=True, return_inverse=True)
    return torch.from_numpy(first[unit])
