"""Percentile bootstrap intervals of means and sums (Efron 1979), optionally clustered by unit.

Example:
    >>> import torch
    >>> low, high = bootstrap_interval(torch.tensor([1.0, 2.0, 3.0, 4.0]), resamples=1000, seed=0)
    >>> 1 <= low < 2.5 < high <= 4
    True
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.measures import check_seed
from tl_jets.core.options import check_choice, check_integers

Reduce = Literal["mean", "sum"]

CONFIDENCE = 95
TAILS = ((100 - CONFIDENCE) / 2, (100 + CONFIDENCE) / 2)
# Size of a batch of resampled values.
RESAMPLED = 2**22


def bootstrap_interval(
    values: Float[Tensor, " value"],
    *,
    units: Int[Tensor, " value"] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    reduce: Reduce = "mean",
) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of a mean or sum; too narrow for few units (with ten it covers about 90%).

    Args:
        values: Shape [value].
        units: Unit of each value; units are resampled whole (cluster bootstrap). None: independent. Shape [value].
        resamples: Number of resamples, with replacement.
        seed: Random seed.
        reduce: `"mean"` or `"sum"`.

    Returns:
        Lower and upper end; NaN for fewer than two units or no resamples.

    Example:
        >>> import torch
        >>> values, words = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> bootstrap_interval(values, units=words)  # two words, not six values
        (0.0, 1.0)
    """
    low, high = bootstrap_intervals(
        values.unsqueeze(0), units=units, resamples=resamples, seed=seed, reduce=reduce
    ).tolist()
    return low[0], high[0]


def bootstrap_intervals(
    values: Float[Tensor, "series value"],
    *,
    units: Int[Tensor, " value"] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    reduce: Reduce = "mean",
) -> Float[Tensor, "2 series"]:
    """`bootstrap_interval` of each row of `values` [series, value], from the same resamples: ends [2, series]."""
    check_integers(0, resamples=resamples)
    check_seed(seed)
    check_choice("reduce", reduce, get_args(Reduce))
    data = values.double().numpy()
    unit = np.arange(data.shape[1]) if units is None else np.unique(units.numpy(), return_inverse=True)[1]
    n = int(unit.max(initial=-1)) + 1
    if n < 2 or not resamples:
        return torch.full((2, len(data)), math.nan, dtype=torch.float64, device="cpu")
    sums = np.stack([np.bincount(unit, series, minlength=n) for series in data], axis=1)
    sizes = np.bincount(unit, minlength=n)
    draw = np.random.default_rng(seed)
    per_batch = max(1, RESAMPLED // n)
    found = []
    for start in range(0, resamples, per_batch):
        drawn = draw.integers(0, n, (min(per_batch, resamples - start), n))
        rows = n * np.arange(len(drawn))[:, None]
        times = np.bincount((rows + drawn).ravel(), minlength=drawn.size).reshape(drawn.shape)
        found.append(times @ sums / ((times @ sizes)[:, None] if reduce == "mean" else 1))
    return torch.from_numpy(np.percentile(np.concatenate(found), TAILS, axis=0))


def central(values: np.ndarray) -> tuple[float, float]:
    """Interval that contains another draw from the same distribution with 95% probability; NaN without draws.

    The k-th smallest of m draws is the k / (m + 1) quantile, as a new draw falls into each of the m + 1 gaps with equal
    probability. A 2.5% tail needs 39 draws; with fewer, the ends are the minimum and maximum, and a new draw lies
    outside with probability 2 / (m + 1).
    """
    m = len(values)
    if not m or np.isnan(values).any():
        return math.nan, math.nan
    places = np.clip(np.round((m + 1) * np.array(TAILS) / 100, 9) - 1, 0, m - 1)  # rounded: a draw is its own quantile
    low, high = np.interp(places, np.arange(m), np.sort(values))
    return float(low), float(high)
