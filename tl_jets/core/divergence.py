"""One warning, with numbers, where jets leave more of the truth than there is: at the caller's own line.

The jet at a center x converges at y where rho = |y - x| / |x| < 1, lengths as the norm sees them. Early components are short beside
the streams that they are expanded at: on a model of 30 layers rho is 10 to 250, and a term of degree k some rho^k times too
large. Rescaled centers (`center_scale="match"`, `"orthogonal"`) have a rho of about 1 or less.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class DivergenceWarning(UserWarning):
    """The terms of jets leave more of the truth than there is: they are no approximation of it.

    Given once a line by `jet_expand` and `interactions` when they are evaluated, and by `exponential_expansion` without filters,
    at orders above 0; the message has the remainder relative to the truth, and the largest rho where it is known.
    """


def warn_of(where: str, order: int, remainder: float, center_scale: str, rho: float | None = None) -> None:
    """Warn if a remainder, relative to the truth, is above 1 at an order above 0; the caller outside of tl_jets is named.

    Args:
        where: What the jets are of.
        order: Theirs. At order 0 nothing converges or diverges.
        remainder: Length of what they leave of the truth over the length of the truth.
        center_scale: How centers were rescaled.
        rho: The largest radius ratio of a center, if it is known.
    """
    if order < 1 or not remainder > 1:
        return
    radius = "" if rho is None else f" (the largest rho of a center is {rho:.3g}; a series converges below 1)"
    remedy = "other centers, or order=0" if center_scale != "none" else 'center_scale="orthogonal" or "match"'
    text = (
        f"Order-{order} jets of {where} leave {remainder:,.3g} times the length of the truth{radius}, so that their terms say "
        f'little of it. Try {remedy}; linearize="detached" leaves nothing.'
    )
    frame, depth = sys._getframe(), 1
    while frame.f_back is not None and _is_inside(frame):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(text, DivergenceWarning, stacklevel=depth)


def _is_inside(frame: FrameType) -> bool:
    """Whether a frame is the library's, or a decorator's around it."""
    name = str(frame.f_globals.get("__name__", ""))
    inside = ("tl_jets", "torch.", "jaxtyping", "beartype", "contextlib")
    return name.startswith(inside) or frame.f_code.co_filename.startswith("<@beartype")
