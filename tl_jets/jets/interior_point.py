"""A primal-dual interior point for convex objectives on the probability simplex, batched over problems.

Newton steps on the barrier problem min f(w) - mu sum_i log w_i, sum w = 1, with multipliers z of w >= 0, until the
Frank-Wolfe gap is small enough.

| symbol | variable      | meaning                             |
|--------|---------------|-------------------------------------|
| w      | `weights`, `w`| [problem, n], positive              |
| z      | `multipliers` | [problem, n], w_i z_i -> mu          |
| mu     | `barrier`     | [problem]                           |

Sources: Nocedal & Wright 2006, sections 14.2 (predictor) and 19.3; Waechter & Biegler 2006, eq. 16. Cost per step: one
evaluation and one Cholesky factorization.

>>> import torch
>>> H = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
>>> def evaluate(w, rows):
...     return (w @ H * w).sum(-1), 2 * w @ H, (2 * H).expand(len(rows), 2, 2)
>>> found = interior_point(evaluate, torch.full((1, 2), 0.5, dtype=torch.float64), tolerance=1e-9, max_iterations=30)
>>> [round(weight, 6) for weight in found.weights[0].tolist()]
[0.75, 0.25]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_jets.jets.weights import frank_wolfe_gap, normalize

SAFE = 1e10
"""Largest ratio of a multiplier to its estimate barrier / w, or inverse (Waechter & Biegler 2006, eq. 16)."""

PATIENCE = 20
"""Steps without a smaller gap after which a problem stops."""

Evaluation = tuple[Tensor, Tensor, Tensor]
"""Objective [rows], gradient [rows n] and Hessian [rows n n], in float64."""


@dataclass(frozen=True)
class Interior:
    """The iterate with the smallest gap; a Newton step takes its `negligible` weights to zero."""

    weights: Tensor
    gap: Tensor
    negligible: Tensor
    iterations: Tensor

    def at(self, rows: Tensor) -> Interior:
        """Select problems."""
        return Interior(self.weights[rows], self.gap[rows], self.negligible[rows], self.iterations[rows])


def interior_point(
    evaluate: Callable[[Tensor, Tensor], Evaluation],
    start: Tensor,
    tolerance: float | Tensor,
    max_iterations: int,
    *,
    rounding: float = 1e-13,
) -> Interior:
    """Minimize by primal-dual Newton steps, with a predictor for the barrier and Armijo backtracking.

    Args:
        evaluate: `evaluate(weights, rows)` returns objective, gradient and Hessian of the problems `rows`.
        start: positive weights [problem, n].
        tolerance: target gap, one number or one per problem.
        max_iterations: maximum number of steps.
        rounding: rounding error of the objective, relative to 1 + |objective|.

    Returns:
        The weights with the smallest gap among all iterates.
    """
    wanted = torch.as_tensor(tolerance, dtype=start.dtype, device=start.device).expand(len(start))
    weights, n = start.clone(), start.shape[-1]
    rows = torch.arange(weights.shape[0], device=weights.device)
    value, gradient, hessian = evaluate(weights, rows)
    gap = frank_wolfe_gap(gradient, weights)
    # a barrier of at most the objective, which is >= 0: the gap of a good start may be 1e4 times larger
    multipliers = (torch.minimum(gap, value).clamp_min(1e-300) / n)[:, None] / weights
    iterations, since = torch.zeros_like(rows), torch.zeros_like(rows)
    best, best_gap, negligible = weights.clone(), gap.clone(), torch.zeros_like(weights, dtype=torch.bool)
    for _ in range(max_iterations):
        active = (gap > wanted[rows]).nonzero()[:, 0]
        if active.numel() == 0:
            break
        rows, gap = rows[active], gap[active]
        value, gradient, hessian = value[active], gradient[active], hessian[active]
        w, z = weights[rows], multipliers[rows]
        dw, dz, barrier = _newton_step(w, z, gradient, hessian, least=1e-3 * wanted[rows] / n)
        length = torch.minimum(_longest(w, dw), _longest(z, dz))
        length, (value, gradient, hessian) = _backtrack(
            evaluate, rows, w, dw, length, barrier, value, gradient, rounding
        )
        weights[rows] = normalize(w + length[:, None] * dw)
        target = barrier[:, None] / weights[rows]
        multipliers[rows] = (z + length[:, None] * dz).clamp(target / SAFE, target * SAFE)
        iterations[rows] += 1
        gap = frank_wolfe_gap(gradient, weights[rows])
        improved = gap < best_gap[rows]
        better = rows[improved]
        best[better], best_gap[better] = weights[better], gap[improved]
        curvature = hessian[improved].diagonal(dim1=-2, dim2=-1)
        negligible[better] = weights[better] * curvature < multipliers[better]
        since[rows] = torch.where(improved, 0, since[rows] + 1)
        gap = torch.where((since[rows] > PATIENCE) & (gap > wanted[rows]), torch.nan, gap)  # NaN leaves the active set
    return Interior(best, best_gap, negligible, iterations)


def _newton_step(
    w: Tensor, z: Tensor, gradient: Tensor, hessian: Tensor, least: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve twice with one factorization: the affine step sets the barrier of the second, which is returned."""
    matrix = hessian.clone()
    matrix.diagonal(dim1=-2, dim2=-1).add_(z / w)
    root = matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
    scaled = matrix * root[:, :, None] * root[:, None, :]
    scaled.diagonal(dim1=-2, dim2=-1).fill_(1 + 1e-14)
    factor, _ = torch.linalg.cholesky_ex(scaled)

    def solve(right: Tensor) -> Tensor:
        return root * torch.cholesky_solve((root * right)[..., None], factor)[..., 0]

    ones = solve(torch.ones_like(w))

    def step(barrier: Tensor) -> tuple[Tensor, Tensor]:
        free = solve(barrier[:, None] / w - gradient)
        dw = free - ones * (free.sum(-1) / ones.sum(-1))[:, None]
        dz = barrier[:, None] / w - z - z / w * dw
        usable = (dw.isfinite() & dz.isfinite()).all(-1, keepdim=True)
        return torch.where(usable, dw, 0.0), torch.where(usable, dz, 0.0)

    average = (w * z).mean(-1)
    dw, dz = step(torch.zeros_like(average))
    length = torch.minimum(_longest(w, dw), _longest(z, dz))[:, None]
    predicted = ((w + length * dw) * (z + length * dz)).mean(-1)
    barrier = (average * (predicted / average).clamp(0, 1) ** 3).clamp_min(least)
    return *step(barrier), barrier


def _longest(x: Tensor, dx: Tensor) -> Tensor:
    """Longest step, at most 1, that keeps x + step * dx positive with a margin."""
    return (0.995 * torch.where(dx < 0, -x / dx, torch.inf).amin(-1)).clamp_max(1)


def _backtrack(
    evaluate: Callable[[Tensor, Tensor], Evaluation],
    rows: Tensor,
    w: Tensor,
    dw: Tensor,
    length: Tensor,
    barrier: Tensor,
    value: Tensor,
    gradient: Tensor,
    rounding: float,
) -> tuple[Tensor, Evaluation]:
    """Quarter the steps that do not lower objective - barrier * sum log w, re-evaluating only those."""
    slope = (gradient * dw).sum(-1) - barrier * (dw / w).sum(-1)
    length = length.clone()
    evaluation = evaluate(normalize(w + length[:, None] * dw), rows)
    for _ in range(20):
        trial = normalize(w + length[:, None] * dw)
        change = evaluation[0] - value - barrier * (trial / w).log().sum(-1)
        allowed = 1e-4 * length * slope + rounding * (1 + value.abs())
        long = (~(change <= allowed)).nonzero()[:, 0]
        if long.numel() == 0:
            break
        length[long] /= 4
        again = evaluate(normalize(w[long] + length[long, None] * dw[long]), rows[long])
        for whole, part in zip(evaluation, again, strict=True):
            whole[long] = part
    return length, evaluation
