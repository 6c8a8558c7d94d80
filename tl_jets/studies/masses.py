r"""How much of a list of bi-grams a path of the model holds: a knowledge or toxicity index, beside its control.

.. math::
    \text{mass} = \frac{1}{n} \sum_{(z_1, z_2)} P(z_2 | z_1)
    \qquad \text{or} \qquad
    \frac{1}{n} \sum_{(z_1, z_2)} P(z_2 | z_1)\,\text{unigram}(z_1)

over the user's own list (or its sum). A number without a scale: it stands beside **shuffled lists**, the same first tokens with
the second tokens permuted. What a path gives to these, it gives to common tokens, not to the list.

The 95% interval is a percentile bootstrap over the list's words, or bi-grams where these were given: how much the index depends on
which of them are in the list. The bi-grams of a word (and words that share one) are drawn again together. Lists are sets: a bi-gram
that occurs twice counts once, and the order does not matter. Of a list of three, every sixth shuffle is the list itself: the rank
among controls says something for lists of ten and more. If the list were a shuffle like the others, its rank r among m of them
would be that or better with a probability of r / (m + 1).

Source: Chen et al., arXiv 2410.06024, section 5.3 (toxicity index; jet n-gram mass). Intervals and controls are ours.

Cost: distinct first tokens * d_vocab * d_model multiply-adds; controls cost nothing more.

Example:
    >>> import tl_jets as tj
    >>> found = mass(tj.load_tinydocs(), [(" more", " than"), (" such", " as"), (" has", " been")], path="mlps", controls=20)
    >>> found.size, found.mean > found.control_mean
    (3, True)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from tl_jets.core.measures import check_seed
from tl_jets.core.notebook import Shown
from tl_jets.core.options import check_integers
from tl_jets.core.tokens import token_names
from tl_jets.ngrams.streams import PathInput
from tl_jets.ngrams.tables import NgramTable
from tl_jets.studies.intervals import Reduce, bootstrap_interval, central
from tl_jets.studies.overlap import check_unigram
from tl_jets.studies.pairs import RowScores, Tokenize, list_digest, read_pairs, tokenizer_of

WordInput = NgramTable | Tensor | Sequence[str | Sequence[str | int]]

# Sums of the same numbers in another order are ties.
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False, repr=False)
class Mass(Shown):
    """How much of a list of bi-grams a path holds.

    Attributes:
        value: The mean or sum over the list: a probability.
        reduce: Which of the two.
        mean: The mean over the list.
        sum: The sum over the list.
        interval: 95% percentile bootstrap interval of `value`; NaN for one bi-gram or word.
        controls: The same number for shuffled lists. Shape [control].
        rank: 1 if no control is as large, 1 + how many are otherwise.
        size: How many different bi-grams the list has.
        sha256: Of the list's ids in sorted order.
        skipped: Words of the list that are one token, hence no bi-gram.
        repeated: Bi-grams that came again, and count once.
        weight: `"P(z2|z1)"` or `"P(z2|z1) unigram(z1)"`.
        path: The path.
        fingerprint: Of the model's weights.
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
        """The mean over shuffled lists; NaN without controls."""
        return float(self.controls.mean()) if len(self.controls) else math.nan

    @property
    def control_interval(self) -> tuple[float, float]:
        """Where 95% of shuffled lists are; of fewer than 39, the smallest and the largest."""
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
        """One row: every number of the result, to be put under others."""
        row = {name: getattr(self, name) for name in ("path", "weight", "reduce", "value", "mean", "sum")}
        row |= {"low": self.interval[0], "high": self.interval[1], "control_mean": self.control_mean}
        row |= dict(zip(("control_low", "control_high"), self.control_interval, strict=True))
        row |= {"n_controls": len(self.controls)}
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
    """How much of a list of bi-grams a path of the model holds.

    Args:
        model: A model or a `ResidualNetwork`.
        words: Bi-grams as `pair_scores` takes them; or words (texts as they stand in a sentence, with their leading space), of
            which all pairs of neighboring tokens are taken; or some of each. Words of one token are skipped, and counted.
        path: As `jet_bigrams` takes it.
        tokenize: From a text to ids, in place of the model's tokenizer.
        reduce: Whether `value` is the `"mean"` or the `"sum"` over the list.
        unigram: A probability for every token, for the pseudo-joint P(z2|z1) unigram(z1). Shape [d_vocab].
        controls: How many shuffled lists.
        seed: Of shuffling and bootstrap.
        bootstrap: How many resamples the interval is of.

    Returns:
        A `Mass`.

    Raises:
        ValueError: No bi-gram is left, or an option is not one of its values; see `pair_scores`.

    Source:
        Chen et al., arXiv 2410.06024, section 5.3.

    Example:
        >>> import tl_jets as tj
        >>> found = mass(tj.load_tinydocs(), [" postmaster", " the"], controls=5)
        >>> found.skipped, found.size
        (1, 2)
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f'reduce must be "mean" or "sum"; got {reduce!r}.')
    check_integers(0, controls=controls, bootstrap=bootstrap)
    check_seed(seed)
    reader = RowScores(model, path)
    pairs, words_of, skipped = _read_list(reader, words, tokenize)
    # Sorted, so that nothing depends on the order of the list.
    distinct, place = pairs.unique(dim=0, return_inverse=True)
    prior = torch.ones(len(distinct), dtype=torch.float64, device="cpu")
    if unigram is not None:
        prior = check_unigram(unigram, size=reader.d_vocab)[distinct[:, 0]]
    draw = np.random.default_rng(seed)
    second = [
        distinct[:, 1],
        *(distinct[torch.from_numpy(draw.permutation(len(distinct))), 1] for _ in range(controls)),
    ]
    every = torch.stack([distinct[:, 0].repeat(len(second)), torch.cat(second)], dim=1)
    scores, _ = reader.of(every)
    shares = scores.exp().view(len(second), -1) * prior
    values = shares.mean(1) if reduce == "mean" else shares.sum(1)
    table = NgramTable.ranked(
        distinct,
        scores[: len(distinct)],
        names=token_names(reader.network.tokenizer, [distinct]),
        path=reader.path,
        settings={"ngram": "given bi-grams", "score": "logprob"},
        fingerprint=reader.fingerprint,
        parts={"mass": shares[0]},
    )
    return Mass(
        value=float(values[0]),
        reduce=reduce,
        mean=float(shares[0].mean()),
        sum=float(shares[0].sum()),
        interval=bootstrap_interval(
            shares[0], units=_units(place, words_of), resamples=bootstrap, seed=seed, reduce=reduce
        ),
        controls=values[1:],
        rank=1 + int((values[1:] >= values[0] * (1 - _ROUNDING)).sum()),
        size=len(distinct),
        sha256=list_digest(distinct)["sha256"],
        skipped=skipped,
        repeated=len(pairs) - len(distinct),
        weight="P(z2|z1)" if unigram is None else "P(z2|z1) unigram(z1)",
        path=reader.path,
        fingerprint=reader.fingerprint,
        table=table,
    )


def _read_list(
    reader: RowScores, words: WordInput, tokenize: Tokenize | None
) -> tuple[Int[Tensor, "pair 2"], Int[Tensor, " pair"], int]:
    """Ids of all bi-grams of a list, which item of the list each is of, and how many of its words have none."""
    if isinstance(words, str):
        raise ValueError(f"A list of words is wanted; got one text, {words[:40]!r}. Put it in a list.")
    if isinstance(words, (NgramTable, Tensor)):
        pairs = read_pairs(reader, words)
        return pairs, torch.arange(len(pairs), device="cpu"), 0
    tokenize = tokenize or tokenizer_of(reader.network)
    rows, items, skipped = [], [], 0
    for i, item in enumerate(words):
        found = list(pairwise(tokenize(item))) if isinstance(item, str) else [item]
        skipped += not found
        rows += found
        items += [i] * len(found)
    if not rows:
        raise ValueError(
            f"A list must have a bi-gram at least; none of its {len(words)} words is more than one token. Give pairs."
        )
    return read_pairs(reader, rows, tokenize=tokenize), torch.tensor(items, device="cpu"), skipped


def _units(place: Int[Tensor, " pair"], items: Int[Tensor, " pair"]) -> Int[Tensor, " distinct"]:
    """The first bi-gram of each one's unit: those are a unit that are of one item of the list, or of items that share a bi-gram."""
    n, n_items = int(place.max()) + 1, int(items.max()) + 1
    edges = (np.ones(len(place)), (place.numpy(), n + items.numpy()))
    labels = connected_components(coo_array(edges, shape=(n + n_items, n + n_items)), directed=False)[1][:n]
    _, first, unit = np.unique(labels, return_index=True, return_inverse=True)
    return torch.from_numpy(first[unit])
