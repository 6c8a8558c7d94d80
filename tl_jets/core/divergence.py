"""Warns, at the caller's line, when a jet expansion leaves a remainder larger than the quantity it expands.

The jet at a center x converges at y if rho = |y - x| / |x| < 1, with lengths as the norm sees them. For early
components of a model of 30 layers rho is 10 to 250, and a term of degree k is about rho^k times too large. Rescaled
centers (`center_scale="match"`, `"orthogonal"`) have a rho of about 1 or less.
"""

from __future__ import annotations

from tl_jets.core.caller import warn_caller


class CancellationWarning(UserWarning):
    """Effects that are listed add up to much less than their sizes, so that single ones say little of the sum."""


class DivergenceWarning(UserWarning):
    """The remainder of a jet expansion is larger than the expanded quantity: its terms do not approximate it.

    Given once per line by `jet_expand`, `interactions` and unfiltered `exponential_expansion`, at orders above 0. The
    message states the relative remainder and, if known, the largest rho.
    """


def warn_of(where: str, order: int, remainder: float, center_scale: str, rho: float | None = None) -> None:
    """Warn, at the caller outside tl_jets, if `remainder`, relative to the truth, is above 1 at an order above 0."""
    if order < 1 or not remainder > 1:
        return
    radius = "" if rho is None else f" (the largest rho of a center is {rho:.3g}; a series converges below 1)"
    remedy = "other centers, or order=0" if center_scale != "none" else 'center_scale="orthogonal" or "match"'
    text = (
        f"Order-{order} jets of {where} leave {remainder:,.3g} times the length of the truth{radius}, so that their terms say "
        f'little of it. Try {remedy}; linearize="detached" leaves nothing.'
    )
    warn_caller(text, DivergenceWarning)
