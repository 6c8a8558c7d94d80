r"""Scores of bi-grams, and which pairs are scored.

=============  =====================================================================  =======================
score          of the logit l(z1, z2) after the model's softcap or scale              unit
=============  =====================================================================  =======================
`"logprob"`    log P(z2|z1) = l(z1, z2) - log sum exp over the vocabulary              nats
`"logit"`      l(z1, z2)                                                               logits
`"centered"`   l(z1, z2) minus its mean over the vocabulary                            logits
`"lift"`       log P(z2|z1) - log Q(z2)                                                nats
=============  =====================================================================  =======================

The baseline Q is a unigram that the user gives, or what the path says after no token in particular: the softmax of its
mean logits over all first tokens, the normalized geometric mean of P(.|z1). So log-probability and lift differ by a
number of each second token, which `Scoring` holds. A constant added to a row of logits changes `"logit"` only.

Example:
    >>> import torch
    >>> scoring = Scoring("lift", offsets=torch.tensor([0.5, 1.5]).log().neg())
    >>> scoring.normalizes, bool(scoring.restricts)
    (True, True)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Score = Literal["logprob", "logit", "centered", "lift"]
SCORES: tuple[Score, ...] = ("logprob", "logit", "centered", "lift")
# Tolerance for the sum of a unigram's float32 probabilities.
NORMALIZED = 1e-4


@dataclass(frozen=True, eq=False)
class Scoring:
    """How pairs (row, token) are scored.

    Attributes:
        score: One of `SCORES`.
        tokens: Sorted ids of the tokens to choose from; None for all.
        offsets: Added to the log-probabilities (or logits) of each token, in nats, float64 [d_vocab]; -inf leaves out.
        exclude_self: Leave out the token that a row is named by.
    """

    score: Score = "logprob"
    tokens: Int[Tensor, " token"] | None = None
    offsets: Float[Tensor, " d_vocab"] | None = None
    exclude_self: bool = False

    @property
    def normalizes(self) -> bool:
        """Whether scores are minus a log-normalizer."""
        return self.score in ("logprob", "lift")

    @property
    def restricts(self) -> bool:
        """Whether the best score of a row may be another token's than the largest logit's."""
        return self.tokens is not None or self.offsets is not None or self.exclude_self

    @property
    def largest_offset(self) -> float:
        """The largest finite size of an offset."""
        return 0.0 if self.offsets is None else float(self.offsets[self.offsets.isfinite()].abs().max())

    def allowed(self, d_vocab: int, device: torch.device) -> Bool[Tensor, " d_vocab"]:
        """Which tokens may be chosen."""
        allowed = torch.ones(d_vocab, dtype=torch.bool, device=device)
        if self.tokens is not None:
            allowed.zero_()[self.tokens] = True
        return allowed if self.offsets is None else allowed & (self.offsets > -math.inf)

    def penalties(self, d_vocab: int, width: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " width"]:
        """What is added to the logits of each token, -inf for those that may not be chosen and for padding."""
        found = torch.full((width,), -math.inf, dtype=torch.float64, device=device)
        allowed = self.allowed(d_vocab, device)
        found[:d_vocab][allowed] = 0.0 if self.offsets is None else self.offsets[allowed]
        return found.to(dtype)

    def kept(self, ids: Int[Tensor, " *cell"], tokens: Int[Tensor, " *cell"]) -> Bool[Tensor, " *cell"]:
        """Which pairs of a row's id and a token are not left out as the token itself."""
        return ids != tokens if self.exclude_self else torch.ones_like(tokens, dtype=torch.bool)

    def scores(
        self, logits: Float[Tensor, "row d_vocab"], top: Float[Tensor, " row"], rest: Float[Tensor, " row"]
    ) -> Float[Tensor, "row d_vocab"]:
        """Scores from float64 logits and their `log_parts`."""
        if self.normalizes:
            logits = (logits - top.unsqueeze(1)) - rest.unsqueeze(1)
        elif self.score == "centered":
            logits = logits - logits.mean(1, keepdim=True)
        return logits if self.offsets is None else logits + self.offsets


def check_unigram(
    unigram: Float[Tensor, " token"], *, size: int | None = None, at_least: int = 1
) -> Float[Tensor, " token"]:
    """The unigram in float64 on the CPU; ValueError unless it is a distribution over `size` (or `at_least`) tokens."""
    found = unigram.detach().cpu().double()
    total = float(found.sum())
    fits = found.ndim == 1 and (len(found) == size if size is not None else len(found) >= at_least)
    if not fits or not bool((found >= 0).all()) or not abs(total - 1) <= NORMALIZED:
        wanted = f"{size}" if size is not None else f"at least {at_least}"
        raise ValueError(
            f"A unigram must be a probability for every token of the vocabulary ({wanted}), none negative, that sum to 1; got "
            f"shape {tuple(unigram.shape)} with sum {total:.6g}. `unigram_probabilities` counts tokens."
        )
    return found
