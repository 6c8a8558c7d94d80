"""Percentile bootstrap intervals of means and sums (Efron 1979), seeded.

Example:
    >>> import torch
    >>> low, high = bootstrap_interval(torch.tensor([1.0, 2.0, 3.0, 4.0]), resamples=1000, seed=0)
    >>> 1 <= low < 2.5 < high <= 4
    True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

Reduce = Literal["mean", "sum"]

CONFIDENCE = 95
# Numbers resampled at a time.
RESAMPLED = 2**22


def bootstrap_interval(
    values: Float[Tensor, " value"], *, resamples: int = 1000, seed: int = 0, reduce: Reduce = "mean"
) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of the mean or sum of values that were drawn independently.

    Args:
        values: Shape [value].
        resamples: How often values are drawn again, with replacement.
        seed: Of the draws.
        reduce: `"mean"` or `"sum"`.

    Returns:
        Lower and upper end; NaN for fewer than two values, which say nothing of their spread, and for no resamples.
    """
    data = values.double().numpy()
    if len(data) < 2 or not resamples:
        return math.nan, math.nan
    total: Callable[..., np.ndarray] = np.mean if reduce == "mean" else np.sum
    draw = np.random.default_rng(seed)
    per_batch = max(1, RESAMPLED // len(data))
    found = [
        total(data[draw.integers(0, len(data), (min(per_batch, resamples - start), len(data)))], axis=1)
        for start in range(0, resamples, per_batch)
    ]
    return central(np.concatenate(found))


def central(values: np.ndarray) -> tuple[float, float]:
    """The central 95% of some values; NaN for none."""
    if not len(values):
        return math.nan, math.nan
    low, high = np.percentile(values, [(100 - CONFIDENCE) / 2, (100 + CONFIDENCE) / 2])
    return float(low), float(high)
