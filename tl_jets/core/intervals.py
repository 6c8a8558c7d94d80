"""Percentile bootstrap intervals of means and sums (Efron 1979), optionally clustered by unit; of medians; of draws.

Example:
    >>> import torch
    >>> low, high = bootstrap_interval(torch.tensor([1.0, 2.0, 3.0, 4.0]), resamples=1000, seed=0)
    >>> 1 <= low < 2.5 < high <= 4
    True
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.measures import check_seed
from tl_jets.core.options import check_choice, check_integers

Reduce = Literal["mean", "sum"]
# Fewer prompts give no 95% interval worth showing: order statistics have none, and the bootstrap's is too narrow.
FEWEST = 6

CONFIDENCE = 0.95
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
    """The 95% percentile bootstrap interval of a mean or sum; with ten units it covers about 90%.

    Args:
        values: Shape [value].
        units: Unit of each value; units are resampled whole (cluster bootstrap). None: independent. Shape [value].
        resamples: Number of resamples, with replacement.
        seed: Random seed.
        reduce: `"mean"` or `"sum"`.

    Returns:
        Lower and upper end; NaN for fewer than two units or resamples.

    Example:
        >>> import torch
        >>> values, words = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> bootstrap_interval(values, units=words)  # two words, not six values
        (0.0, 1.0)
    """
    options: dict[str, Any] = {"units": units, "resamples": resamples, "seed": seed, "reduce": reduce}
    low, high = bootstrap_intervals(values.unsqueeze(0), **options)[:, 0].tolist()
    return low, high


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
    if n < 2 or resamples < 2:
        return torch.full((2, len(data)), math.nan, dtype=torch.float64, device="cpu")
    import scipy.stats  # a second, which most calls do not need

    sums = np.stack([np.bincount(unit, series, minlength=n) for series in data])
    sizes = np.broadcast_to(np.bincount(unit, minlength=n), sums.shape)

    def statistic(sums: np.ndarray, sizes: np.ndarray, axis: int) -> np.ndarray:
        return sums.sum(axis) / (sizes.sum(axis) if reduce == "mean" else 1)

    interval = scipy.stats.bootstrap(
        (sums, sizes),
        statistic,
        axis=-1,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, RESAMPLED // sums.size),
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(seed),  # type: ignore[call-arg]
    ).confidence_interval
    return torch.from_numpy(np.stack([interval.low, interval.high]))


def median_intervals(values: Float[Tensor, "series value"]) -> Float[Tensor, "2 series"]:
    """95% intervals of the medians of independent values, by order statistics: ends [2, series]; NaN below six values.

    Between the k-th smallest and the k-th largest value lies the median, unless fewer than k values are on one side of it:
    with probability 1 - 2 P(B < k), B binomial of n draws at 1/2. Source: David and Nagaraja, *Order Statistics*, 7.1.

    Example:
        >>> median_intervals(torch.arange(10.0)[None]).tolist()
        [[1.0], [8.0]]
    """
    import scipy.stats  # as above

    n = values.shape[-1]
    k = int(scipy.stats.binom.ppf((1 - CONFIDENCE) / 2, n, 0.5))
    if k < 1:
        return torch.full((2, len(values)), math.nan, dtype=torch.float64, device="cpu")
    ordered = values.double().sort(-1).values
    return torch.stack([ordered[:, k - 1], ordered[:, n - k]])


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
