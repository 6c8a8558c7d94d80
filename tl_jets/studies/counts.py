r"""N-gram counts of a text, and its Kneser-Ney model: what the n-grams of a model's paths are compared with.

**Interpolated Kneser-Ney.** With c' the context c without its first token, and P_0 uniform over the vocabulary,

.. math::
    P_k(z | c) = \frac{\max(N(c z) - D_k, 0)}{\sum_{z'} N(c z')} + \lambda(c) \, P_{k-1}(z | c')

N counts n-grams at the highest order, and distinct left neighbours below it. D_k = n_1 / (n_1 + 2 n_2) of the numbers of
n-grams counted once and twice; lambda(c) is the mass that the discounts free.

Source: Chen and Goodman, *An Empirical Study of Smoothing Techniques* (1999). Cost: sorting the n-grams.

Example:
    >>> import torch
    >>> counts = ngram_counts([[1, 2, 1, 2], [1, 3]], score="logprob")
    >>> counts.to_dataframe()[["id_1", "id_2", "count", "context_count"]].values.tolist()
    [[2.0, 1.0, 1.0, 1.0], [1.0, 2.0, 2.0, 3.0], [1.0, 3.0, 1.0, 3.0]]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.options import check_choice, check_integers
from tl_jets.core.tokens import token_names
from tl_jets.ngrams.tables import NgramTable

CountScore = Literal["logcount", "logprob"]
TokenInput = Tensor | Sequence[int] | Sequence[Sequence[int] | Tensor]

TEXT = "text"


def ngram_counts(
    tokens: TokenInput,
    *,
    n: int = 2,
    score: CountScore = "logcount",
    min_count: int = 1,
    tokenizer: Any = None,
) -> NgramTable:
    """The n-grams of a text, a table with the parts `count` and `context_count` (of the first n - 1 tokens).

    Args:
        tokens: Token ids of one or several texts; no n-gram spans two texts.
        n: Length of the n-grams.
        score: `"logcount"`, or `"logprob"`: log P(z_n | z_1 .. z_{n-1}) = log(count / context_count), in nats.
        min_count: Minimum count; `"logprob"` is unreliable for n-grams that occur once.
        tokenizer: The model's tokenizer, to name tokens; None names them by id.

    Raises:
        ValueError: There is no n-gram, or an option is invalid.
    """
    check_choice("score", score, ("logcount", "logprob"))
    check_integers(1, n=n, min_count=min_count)
    texts = _texts(tokens)
    grams = np.concatenate(
        [np.lib.stride_tricks.sliding_window_view(x, n) for x in texts if len(x) >= n] or [np.empty((0, n))]
    )
    if not len(grams):
        raise ValueError(
            f"A text must have {n} tokens at least; the longest of {len(texts)} has {max(map(len, texts), default=0)}."
        )
    counted = pd.DataFrame(grams).groupby(list(range(n))).size()
    ids, counts = counted.index.to_frame().to_numpy(), counted.to_numpy()
    contexts = np.full(len(ids), len(grams))
    if n > 1:
        contexts = counted.groupby(level=list(range(n - 1))).transform("sum").to_numpy()
    keep = counts >= min_count
    if not keep.any():
        raise ValueError(
            f"No n-gram occurs {min_count} times; the most frequent {counts.max()} times. Take a smaller min_count."
        )
    total = hashlib.sha256()
    for x in texts:
        total.update(f"{len(x)} ".encode() + x.tobytes())
    found, count, context = (torch.from_numpy(np.ascontiguousarray(x[keep])) for x in (ids, counts, contexts))
    return NgramTable.ranked(
        found.long(),
        (count.double() / (context.double() if score == "logprob" else 1)).log(),
        names=token_names(tokenizer, [found]),
        path=TEXT,
        settings={"ngram": "counts", "score": score, "min_count": min_count}
        | {"total": len(grams), "texts": len(texts), "sha256": total.hexdigest()},
        parts={"count": count.double(), "context_count": context.double()},
    )


def unigram_probabilities(tokens: TokenInput, d_vocab: int, *, add: float | int = 0) -> Float[Tensor, " d_vocab"]:
    """Relative frequency of each token of the vocabulary in a text, in float64. Shape [d_vocab].

    Args:
        tokens: Token ids of one or several texts.
        d_vocab: Size of the vocabulary.
        add: Added to every count (Laplace smoothing).

    Raises:
        ValueError: There is no token, a token is not in the vocabulary, or `add` is negative.

    Example:
        >>> unigram_probabilities([0, 2, 2, 2], 4).tolist()
        [0.25, 0.0, 0.75, 0.0]
    """
    check_integers(1, d_vocab=d_vocab)
    ids = np.concatenate([np.empty(0, dtype=np.int64), *_texts(tokens)])
    if not len(ids) or ids.max() >= d_vocab or add < 0:
        raise ValueError(
            f"Tokens must be ids in 0..{d_vocab - 1}, one at least, and add 0 or more; got {len(ids)} ids up to "
            f"{ids.max(initial=-1)}, and {add}."
        )
    counts = torch.from_numpy(np.bincount(ids, minlength=d_vocab)).double() + add
    return counts / counts.sum()


def _texts(tokens: TokenInput) -> list[np.ndarray]:
    """Token ids of each text as int64 arrays."""
    if isinstance(tokens, Tensor):
        nested = [tokens] if tokens.ndim == 1 else list(tokens)
    else:
        nested = [tokens] if len(tokens) and not isinstance(tokens[0], (Sequence, Tensor)) else tokens
    arrays = [np.asarray(text.detach().cpu() if isinstance(text, Tensor) else text) for text in nested]
    for array in arrays:
        if array.ndim != 1 or (len(array) and (not np.issubdtype(array.dtype, np.integer) or array.min() < 0)):
            raise ValueError(f"A text must be a list of token ids, none negative; got {array.dtype} {array.shape}.")
    return [array.astype(np.int64) for array in arrays]


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

    Example:
        >>> model = KneserNey([[1, 2, 1, 2, 1, 3]], d_vocab=5, n=2)
        >>> round(float(model.row([1]).sum()), 12), int(model.row([1]).argmax())
        (1.0, 2)
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
