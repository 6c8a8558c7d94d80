r"""Interpolated Kneser-Ney n-gram model of a text, a reference for what a model's own n-grams predict.

.. math::
    P_k(z | c) = \frac{\max(N(c z) - D_k, 0)}{\sum_{z'} N(c z')} + \lambda(c) \, P_{k-1}(z | c')

N counts n-grams at the highest order, and distinct left neighbours below it. D_k = n_1 / (n_1 + 2 n_2) of the numbers of
n-grams counted once and twice, lambda(c) is the mass that the discounts free, c' is c without its first token, and P_0 is
uniform over the vocabulary. Source: Chen and Goodman, *An Empirical Study of Smoothing Techniques* (1999).

Example:
    >>> model = KneserNey([[1, 2, 1, 2, 1, 3]], d_vocab=5, n=2)
    >>> round(float(model.row([1]).sum()), 12), int(model.row([1]).argmax())
    (1.0, 2)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.options import check_integers
from tl_jets.studies.counts import TokenInput, ngram_counts


class _Order(NamedTuple):
    """Tokens after each context with their counts, and the discount."""

    after: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]]
    discount: float


class KneserNey:
    """Interpolated Kneser-Ney model of order n.

    Args:
        tokens: Token ids of one or several texts; one must have n tokens at least.
        d_vocab: Size of the vocabulary.
        n: Order, 2 for bi-grams.
    """

    def __init__(self, tokens: TokenInput, d_vocab: int, n: int):
        check_integers(1, d_vocab=d_vocab, n=n)
        grams = ngram_counts(tokens, n=n)
        if int(grams.ids.max()) >= d_vocab:
            raise ValueError(f"Tokens must be ids in 0..{d_vocab - 1}; got {int(grams.ids.max())}.")
        ids, counts = grams.ids.numpy(), grams.parts["count"].numpy()
        self.d_vocab, self.n = d_vocab, n
        self._orders: list[_Order] = []
        for _ in range(n):
            self._orders.insert(0, _order(ids, counts))
            ids, counts = np.unique(ids[:, 1:], axis=0, return_counts=True)

    def row(self, context: Sequence[int]) -> Float[Tensor, " d_vocab"]:
        """Probabilities of every token after a context, whose last n - 1 tokens are read, in float64. Shape [d_vocab]."""
        found = np.full(self.d_vocab, 1 / self.d_vocab)
        known = tuple(context)
        for length, order in enumerate(self._orders[: len(known) + 1]):
            entry = order.after.get(known[len(known) - length :])
            if entry is not None:
                ids, counts = entry
                kept = np.maximum(counts - order.discount, 0) / counts.sum()
                found *= 1 - kept.sum()
                found[ids] += kept
        return torch.from_numpy(found)


def _order(ids: np.ndarray, counts: np.ndarray) -> _Order:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    frame = pd.DataFrame(ids[:, :-1])
    groups: dict[Any, np.ndarray] = (
        {(): np.arange(len(ids))} if ids.shape[1] == 1 else frame.groupby(list(frame.columns)).indices
    )
    after = {
        tuple(np.atleast_1d(context).tolist()): (ids[rows, -1], counts[rows].astype(float))
        for context, rows in groups.items()
    }
    return _Order(after, once / max(once + 2 * twice, 1))
