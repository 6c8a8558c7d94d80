"""Intervals of draws; those of means and sums are in `tl_jets.core.intervals`."""

from __future__ import annotations

import math

import numpy as np

from tl_jets.core.intervals import CONFIDENCE, Reduce, bootstrap_interval, bootstrap_intervals

__all__ = ["Reduce", "bootstrap_interval", "bootstrap_intervals", "central"]


def central(values: np.ndarray) -> tuple[float, float]:
    """Interval that contains another draw from the same distribution with 95% probability; NaN without draws.

    The k-th smallest of m draws is the k / (m + 1) quantile, as a new draw falls into each of the m + 1 gaps with equal
    probability. A 2.5% tail needs 39 draws; with fewer, the ends are the minimum and maximum, and a new draw lies
    outside with probability 2 / (m + 1).
    """
    m = len(values)
    if not m or np.isnan(values).any():
        return math.nan, math.nan
    # Rounded: a draw is its own quantile.
    ranks = np.round((m + 1) * np.array([1 - CONFIDENCE, 1 + CONFIDENCE]) / 2, 9)
    places = np.clip(ranks - 1, 0, m - 1)
    low, high = np.interp(places, np.arange(m), np.sort(values))
    return float(low), float(high)
