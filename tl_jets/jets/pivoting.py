"""Block principal pivoting: min w'Hw over the simplex as a linear complementarity problem, batched over problems.

With the multiplier of sum w = 1 divided out, KKT reads H v >= 1, v >= 0, v'(H v - 1) = 0, and w = v / sum v. H plus a
ridge is positive definite, so v exists and is unique. The support of v is guessed, solved on and corrected until no
center is on the wrong side, which takes a few Cholesky factorizations of the Jacobi-scaled matrix.

| symbol | variable | meaning                                                          |
|--------|----------|------------------------------------------------------------------|
| H      | `hessian`| [problem, n, n], in units of the target's squared length          |
| v      | `lifted` | [problem, n]                                                     |
| delta  | `RIDGE`  | tie-break: objective + delta * ||w||^2                            |

Source: Judice & Pires 1994.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tl_jets.jets.weights import normalize

RIDGE = 1e-9
"""The tie-break delta, relative to `scale`."""

ROUNDING_RIDGE = 1e-13
"""Keeps the factorization positive definite, relative to H_ii; iterative refinement removes its effect."""


def pivot(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Weights, and numbers of factorizations: guess the support of v, solve on it, exchange infeasible centers."""
    count, n, _ = hessian.shape
    face = torch.ones(count, n, dtype=torch.bool, device=hessian.device)
    lifted = torch.ones(count, n, dtype=torch.float64, device=hessian.device)
    iterations = torch.zeros(count, dtype=torch.long, device=hessian.device)
    fewest = torch.full_like(iterations, n + 1)
    patience = torch.full_like(iterations, 3)
    order = torch.arange(n, device=hessian.device)
    rows = torch.arange(count, device=hessian.device)
    system = Ridged.of(hessian)
    for _ in range(15 + 2 * n):
        solved, wrong = system.solve(face[rows])
        lifted[rows] = solved
        iterations[rows] += 1
        number = wrong.sum(-1)
        unsettled = (number > 0).nonzero()[:, 0]
        if unsettled.numel() == 0:
            break
        rows, wrong, number = rows[unsettled], wrong[unsettled], number[unsettled]
        system = system.rows(unsettled)
        fewer = number < fewest[rows]
        fewest[rows] = torch.minimum(number, fewest[rows])
        patience[rows] = torch.where(fewer, 3, patience[rows] - 1)
        # full exchanges while they help; then one at a time (Murty), which terminates for positive definite H
        last = order == torch.where(wrong, order, -1).amax(-1, keepdim=True)
        face[rows] ^= torch.where((patience[rows] >= 0)[:, None], wrong, last)
    return normalize(lifted), iterations


@dataclass(frozen=True)
class Ridged:
    """H with the tie-break ridge, and H with both ridges, Jacobi-scaled to unit diagonal (v = root * y)."""

    hessian: Tensor
    scaled: Tensor
    root: Tensor

    @classmethod
    def of(cls, hessian: Tensor) -> Ridged:
        """Add the ridges and scale."""
        diagonal = hessian.diagonal(dim1=-2, dim2=-1).clamp_min(0)
        root = (diagonal * (1 + ROUNDING_RIDGE) + RIDGE).rsqrt()
        scaled = hessian * root[:, :, None] * root[:, None, :]
        scaled.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        broken = hessian.clone()
        broken.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
        return cls(broken, scaled, root)

    def rows(self, index: Tensor) -> Ridged:
        """Select problems."""
        return Ridged(self.hessian[index], self.scaled[index], self.root[index])

    def solve(self, face: Tensor) -> tuple[Tensor, Tensor]:
        """Solve H v = 1 on the face with v = 0 off it; also return which centers are on its wrong side."""
        inside = face.double()
        block = self.scaled * inside[:, :, None] * inside[:, None, :]
        block.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        factor, _ = torch.linalg.cholesky_ex(block)
        lifted = torch.zeros_like(self.root)
        for _ in range(2):  # the second pass refines
            residual = inside - inside * (self.hessian @ lifted[..., None])[..., 0]
            step = torch.cholesky_solve((self.root * residual)[..., None], factor)[..., 0]
            lifted = lifted + inside * self.root * step
        slack = (self.hessian @ lifted[..., None])[..., 0] - 1
        # treat slack below rounding as zero: otherwise ties enter and leave the face forever
        noise = 1e-9 + 1e-14 * (self.hessian.abs() @ lifted.abs()[..., None])[..., 0]
        wrong = (face & (lifted < 0)) | (~face & (slack < -noise)) | ~lifted.isfinite()
        return lifted, wrong
