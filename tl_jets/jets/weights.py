"""Weights on the probability simplex (w >= 0, sum w = 1): uniform and given weights, and the gap to the optimum.

Source: Chen et al. (arXiv 2410.06024), Lemma 1; Jaggi 2013, *Revisiting Frank-Wolfe*, eq. 2, for the gap.

>>> import torch
>>> normalize(torch.tensor([3.0, -1.0, 1.0]))
tensor([0.7500, 0.0000, 0.2500])
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def uniform_weights(
    n: int, *problems: int, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Float[Tensor, "*problems n"]:
    """Equal weights 1/n for every center, [*problems, n].

    Raises:
        ValueError: n is not positive.

    Source: Chen et al. (arXiv 2410.06024), Algorithm 2.
    """
    if n < 1:
        raise ValueError(f"weights need at least one center; got n={n}; pass the number of centers of the expansion")
    return torch.full((*problems, n), 1 / n, dtype=dtype, device=device)


def read_weights(weights: Any, n: int) -> Tensor:
    """Given weights, center first, as a checked tensor; numbers become float64.

    Raises:
        TypeError: Not floating-point numbers.
        ValueError: Not n weights on the simplex.
    """
    if not isinstance(weights, Tensor):
        weights = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if weights.ndim == 0:
        raise ValueError(f"weights must have one entry a center on the first axis ({n}); got a single number.")
    return check_weights(weights.movedim(0, -1), n).movedim(-1, 0)


def check_weights(
    weights: Float[Tensor, "*problems n"], n: int, *, problems: tuple[int, ...] | None = None, tolerance: float = 1e-6
) -> Float[Tensor, "*problems n"]:
    """Return the given weights unchanged if they are a point of the simplex for each problem.

    Args:
        weights: [n], or [*problems, n], center last.
        n: number of centers.
        problems: leading shape that the weights must broadcast to; None takes any.
        tolerance: how far a sum may be from 1; raised to the precision of the dtype.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: wrong length or leading shape, not finite, negative, or a sum other than 1.

    Source: Chen et al. (arXiv 2410.06024), Lemma 1.
    """
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(
            f"weights must be a floating-point tensor; got {kind}; pass torch.tensor([...], dtype=torch.float64)"
        )
    shape = tuple(weights.shape)
    if weights.ndim == 0 or shape[-1] != n:
        raise ValueError(
            f"weights must have one entry a center on the last axis ({n}); got shape {shape}; reorder or re-count them"
        )
    if problems is not None and not _broadcasts(shape[:-1], problems):
        raise ValueError(
            f"weights must be [n] or [*problems, n] with problems {problems}; got shape {shape}; put centers last"
        )
    values = weights.detach().double()
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"weights must be finite; got {int((~values.isfinite()).sum())} that are not; check what made them"
        )
    if bool((values < 0).any()):
        raise ValueError(
            f"weights must be non-negative; got a smallest of {float(values.min()):.3g}; clamp and renormalize them"
        )
    off = (values.sum(-1) - 1).abs()
    if bool((off > max(tolerance, n * torch.finfo(weights.dtype).eps)).any()):
        worst = float(values.sum(-1).flatten()[off.argmax()])
        raise ValueError(
            f"weights must sum to 1 over the centers; got a sum of {worst:.6g}; divide by weights.sum(-1, keepdim=True)"
        )
    return weights


def normalize(weights: Tensor) -> Tensor:
    """Clamp negatives to 0 and divide by the sum; uniform where nothing is left."""
    weights = torch.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0)
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), 1 / weights.shape[-1])


def shared(weights: Tensor, same: Tensor) -> Tensor:
    """Share weights [problem, n] evenly among equal centers, given by `same` [problem, n, n]."""
    share = same.to(weights)
    return normalize((share @ weights[..., None])[..., 0] / share.sum(-1))


def frank_wolfe_gap(gradient: Tensor, weights: Tensor) -> Tensor:
    """grad.(w - e_i), largest over i: an upper bound of f(w) - min f for convex f."""
    return ((gradient * weights).sum(-1) - gradient.amin(-1)).clamp_min(0)


def _broadcasts(shape: tuple[int, ...], problems: tuple[int, ...]) -> bool:
    try:
        return tuple(torch.broadcast_shapes(shape, problems)) == tuple(problems)
    except RuntimeError:
        return False
