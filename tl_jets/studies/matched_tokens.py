"""Random tokens that are matched to those of a list: the controls of mass changes and of searches.

Example:
    >>> import numpy as np
    >>> import torch
    >>> frequency = torch.arange(1000.0)
    >>> found = matched(torch.tensor([500, 20]), frequency, 4, np.random.default_rng(0))
    >>> found.shape, bool((found[:, 0] - 500).abs().max() <= NEAR)
    (torch.Size([4, 2]), True)
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.logit_reader import slices
from tl_jets.ngrams.scoring import check_unigram
from tl_jets.ngrams.streams import VocabularyStreams

# Tokens on each side of a token, in the order of what is matched, among which a control is drawn; and the part of a small
# vocabulary that both sides are at most.
NEAR, PART = 50, 10
# Embeddings read at a time.
ROWS = 4096


def matched(
    tokens: Int[Tensor, " token"], key: Float[Tensor, " id"], count: int, draw: np.random.Generator
) -> Int[Tensor, "count token"]:
    """`count` random tokens for each of a list, nearly equal in `key`, none of them in the list."""
    free = torch.ones(len(key), dtype=torch.bool, device="cpu")
    free[tokens[tokens < len(key)]] = False
    ids = free.nonzero()[:, 0]
    if not len(ids):
        raise ValueError(
            f"Controls must be tokens outside of the list, which holds all {len(key)}. Take a shorter list."
        )
    values, order = key[ids].sort(stable=True)
    width = min(2 * NEAR, max(1, len(ids) // PART))
    # Ids without a key, of outputs that are not embedded, are as the last one.
    place = torch.searchsorted(values, key[tokens.clamp_max(len(key) - 1)])
    start = (place - width // 2).clamp(0, len(ids) - width)
    return ids[order[start + torch.from_numpy(draw.integers(0, width, (count, len(tokens))))]]


@torch.no_grad()
def frequency_key(streams: VocabularyStreams, unigram: Float[Tensor, " d_vocab"] | None) -> Float[Tensor, " id"]:
    """What tokens are matched by: their unigram probability, or the length of their embedding, which goes with frequency."""
    if unigram is not None:
        return check_unigram(unigram, size=streams.network.decoder.d_vocab)
    every = torch.arange(min(streams.n_tokens, streams.network.decoder.d_vocab), device=streams.device)
    return torch.cat([streams.embed(every[part]).double().norm(dim=-1).cpu() for part in slices(len(every), ROWS)])
