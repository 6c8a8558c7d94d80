"""Checks unigrams: the probability of every token of a vocabulary."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

# Tolerance for the sum of float32 probabilities.
NORMALIZED = 1e-4


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
