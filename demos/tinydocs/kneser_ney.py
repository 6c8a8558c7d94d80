r"""An interpolated Kneser-Ney bigram model: what counting pairs of tokens achieves, as a baseline for tinydocs.

With `c(v w)` the number of times `w` follows `v` (modified Kneser-Ney: Chen & Goodman 1998, equations 26 and 27),

    p(w | v) = (c(v w) - D(c(v w))) / c(v) + g(v) q(w)        g(v): what the discounts took from the row of v
    q(w)     = (t(w) - E) / T + h / d_vocab                    t(w): how many different tokens w follows, T: their sum
                                                               h: what the discount E took

where tokens that follow nothing, or pairs that do not occur, have no first term, and a `v` that was never followed by
anything leaves `p(w | v) = q(w)`. The discounts are estimated from `n_k`, the number of pairs that occur `k` times:

    Y = n_1 / (n_1 + 2 n_2)    D(k) = k - (k + 1) Y n_(k+1) / n_k  for k = 1, 2;  D(k) = 3 - 4 Y n_4 / n_3  for k >= 3

and `E = Y` of the counts `t`. Where a sample is too small for that (an `n_k` is zero, or a discount is not between 0 and
`k`), a discount is 1/2.

| symbol | here |
|---|---|
| `c(v w)` | `counts`, `[d_vocab, d_vocab]`, sparse |
| `D(1), D(2), D(3 and more)` | `discounts` |
| `q` | `continuation`, `[d_vocab]` |
| `g` | `backoff`, `[d_vocab]` |

Cost: sorting the pairs once; a look-up for every token scored. Seconds for some million tokens.

Example:
    >>> import numpy as np
    >>> model = KneserNey.fit(np.array([0, 1, 0, 1, 0, 2]), np.array([1, 0, 1, 0, 2, 0]), d_vocab=4)
    >>> bool(model.probabilities(np.array([0]))[0].argmax() == 1)
    True
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse


@dataclass(frozen=True)
class KneserNey:
    """A fitted bigram model; see the module for the formulas."""

    counts: sparse.csr_array
    discounts: np.ndarray
    continuation: np.ndarray
    backoff: np.ndarray

    @classmethod
    def fit(cls, previous: np.ndarray, following: np.ndarray, d_vocab: int) -> KneserNey:
        """Count the pairs `(previous[i], following[i])`, integer arrays `[pair]`, and estimate the discounts.

        Raises:
            ValueError: There are no pairs, or the arrays differ in shape.
        """
        if previous.shape != following.shape or previous.ndim != 1 or len(previous) == 0:
            raise ValueError(
                f"a bigram model is fitted to pairs: two integer arrays [pair] of one length; got {previous.shape} and "
                f"{following.shape}; pass tokens[:-1] and tokens[1:]"
            )
        ones = np.ones(len(previous), dtype=np.int64)
        counts = sparse.coo_array((ones, (previous, following)), shape=(d_vocab, d_vocab)).tocsr()
        counts.sum_duplicates()
        discounts = _discounts(counts.data)
        contexts = np.bincount(counts.indices, minlength=d_vocab)  # t
        discount = _ratio(contexts)  # E
        freed = discount * np.count_nonzero(contexts)
        continuation = (np.maximum(contexts - discount, 0.0) + freed / d_vocab) / contexts.sum()
        taken = sparse.csr_array((_discount(counts.data, discounts), counts.indices, counts.indptr), shape=counts.shape)
        totals = counts.sum(axis=1)
        backoff = np.where(totals > 0, taken.sum(axis=1) / np.maximum(totals, 1), 1.0)
        return cls(counts, discounts, continuation, backoff)

    def log_probability(self, previous: np.ndarray, following: np.ndarray) -> np.ndarray:
        """`log p(following[i] | previous[i])` in nats, `[pair]`."""
        counts = np.asarray(self.counts[previous, following]).ravel()
        totals = self.counts.sum(axis=1)[previous]
        kept = np.maximum(counts - _discount(counts, self.discounts), 0.0) / np.maximum(totals, 1)
        return np.log(kept + self.backoff[previous] * self.continuation[following])

    def probabilities(self, previous: np.ndarray) -> np.ndarray:
        """`p(. | previous[i])`, dense `[len(previous), d_vocab]`: for looking at, and for checks."""
        d_vocab = len(self.continuation)
        pairs = np.repeat(previous, d_vocab), np.tile(np.arange(d_vocab), len(previous))
        return np.exp(self.log_probability(*pairs)).reshape(len(previous), d_vocab)


def _discount(counts: np.ndarray, discounts: np.ndarray) -> np.ndarray:
    """`D(c)`, zero where the count is."""
    return np.concatenate([[0.0], discounts])[np.minimum(counts, 3)]


def _discounts(counts: np.ndarray) -> np.ndarray:
    """`D(1), D(2), D(3 and more)` from the counts of all pairs that occur."""
    n = np.bincount(np.minimum(counts, 5), minlength=6)
    ratio = _ratio(counts)
    found = []
    for k in (1, 2, 3):
        estimate = k - (k + 1) * ratio * n[k + 1] / n[k] if n[k] and n[k + 1] else 0.5
        found.append(estimate if 0.0 < estimate < k else 0.5)
    return np.array(found)


def _ratio(counts: np.ndarray) -> float:
    """`n_1 / (n_1 + 2 n_2)`, or 1/2 where that is not between 0 and 1."""
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    return once / (once + 2 * twice) if once and twice else 0.5
