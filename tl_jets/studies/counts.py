"""N-gram counts of a text, to compare with the n-grams of a model's paths. Cost: sorting the n-grams.

Example:
    >>> import torch
    >>> counts = ngram_counts([[1, 2, 1, 2], [1, 3]], score="logprob")
    >>> counts.to_dataframe()[["id_1", "id_2", "count", "context_count"]].values.tolist()
    [[2.0, 1.0, 1.0, 1.0], [1.0, 2.0, 2.0, 3.0], [1.0, 3.0, 1.0, 3.0]]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

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
