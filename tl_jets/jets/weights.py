"""Weights that are given: uniform, or numbers on the probability simplex (w >= 0, sum w = 1).

Source: Chen et al. (arXiv 2410.06024), Lemma 1.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Largest distance of a sum of weights from 1, where the dtype allows it.
TOLERANCE = 1e-6


def uniform_weights(
    n: int, *problems: int, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Float[Tensor, "*problems n"]:
    """Equal weights 1/n for every center, [*problems, n]."""
    return torch.full((*problems, n), 1 / n, dtype=dtype, device=device)


def read_weights(weights: Any, n: int) -> Tensor:
    """Given weights [n, *problems] as a checked tensor; a tensor is returned unchanged, numbers become float64.

    Raises:
        TypeError: Not floating-point numbers.
        ValueError: Not n weights on the first axis, not finite, negative, or a sum other than 1.
    """
    if not isinstance(weights, Tensor):
        weights = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if not weights.is_floating_point():
        raise TypeError(f"weights must be floating-point numbers; got {weights.dtype}; pass weights.double().")
    if weights.ndim == 0 or len(weights) != n:
        raise ValueError(
            f"weights must have one entry a center on the first axis ({n}); got shape {tuple(weights.shape)}; reorder or "
            "re-count them."
        )
    values = weights.detach().double()
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"weights must be finite; got {int((~values.isfinite()).sum())} that are not; check what made them."
        )
    if bool((values < 0).any()):
        raise ValueError(
            f"weights must be non-negative; got a smallest of {float(values.min()):.3g}; clamp and renormalize them."
        )
    off = (values.sum(0) - 1).abs()
    if bool((off > max(TOLERANCE, n * torch.finfo(weights.dtype).eps)).any()):
        worst = float(values.sum(0).flatten()[off.argmax()])
        raise ValueError(
            f"weights must sum to 1 over the centers; got a sum of {worst:.6g}; divide by weights.sum(0, keepdim=True)."
        )
    return weights
