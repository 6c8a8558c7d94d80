"""Jet weights: the best convex combination of an expansion's terms per token, with a certificate.

At the final norm an expansion is linear in its weights, so fitting the model's logits is a convex problem on the
probability simplex (w >= 0, sum w = 1). The l2 and centered l2 objectives per token are

    f(w) = || sum_i w_i e_i - t ||_M^2 = w' H w,   H_ij = <e_i - t, e_j - t>_M,   M = U'U (centered over V or not)

because the weights sum to one; H avoids the cancellation in G = <e_i, e_j>, b = <e_i, t>. `simplex_kl` has the
objective "kl".

| symbol        | variable              | meaning                                                        |
|---------------|-----------------------|----------------------------------------------------------------|
| e_i - t       | `differences`         | term minus target, after the final norm                        |
| H             | `differences_gram`    | Gram matrix of the differences                                 |
| ||t||_M^2     | `scale`               | unit of the relative gap                                       |
| delta         | `RIDGE`               | tie-break: objective + delta * scale * ||w||^2                 |

**Certificate.** For convex f, f(w) - min f <= max_i <grad f(w), w - e_i> = grad.w - min_i grad_i, the Frank-Wolfe gap
(Jaggi 2013, *Revisiting Frank-Wolfe*, eq. 2). It is recomputed in float64 from the returned weights; `converged` says
whether it met the tolerance.

**Ties.** Duplicate or dependent centers leave w free. Minimizing f + delta * scale * ||w||^2 with delta = 1e-9 selects
the shortest weights among all with the same or a smaller objective, within delta of the optimum and at most delta / 2 of
gap. Copies of a center share their weight evenly; rounding leaves other ties even to about 1e-6 (centers of the target's
size) or 1e-3 (1e6 times that). `effective_rank` counts the directions that the data fix more firmly than the tie-break.

**Method.** w = v / sum v, where v >= 0 solves the non-negative least squares problem ||L'v||^2 + s^2 (sum v - 1)^2 with
L L' = H (`scipy.optimize.nnls`; the optimum is on the same ray for every s). One solve on the support of v in units of
H_ii, with a step of refinement, restores the digits: centers of 4e6 |t| and condition numbers of 1e12 are routine.

Source: Chen et al. (arXiv 2410.06024), Lemma 1 and Algorithm 1; Lawson & Hanson 1974, chapter 23. Cost per token, N
centers, d_model d: Gram 2 N d^2 (the metric product, nearly all of it) + 2 N^2 d; QP a few times N^3 / 3, and 15
microseconds.

>>> import torch
>>> target = torch.tensor([[1.0, 1.0]], dtype=torch.float64)                                # one token, d_model = 2
>>> terms = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]], [[5.0, 5.0]]], dtype=torch.float64)    # three terms
>>> solution = simplex_qp(gram(terms - target), target.square().sum(-1))
>>> solution
SimplexSolution(1 problem, 3 centers: 1 converged, largest gap 0.0e+00 relative, mean support 2.0)
>>> [round(weight, 6) for weight in solution.weights[0].tolist()]
[0.5, 0.5, 0.0]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float64, Int
from scipy.optimize import nnls
from torch import Tensor

from tl_jets.core.results import Result

# The tie-break delta, relative to `scale`.
RIDGE = 1e-9
# Keeps the factorization positive definite, relative to H_ii; iterative refinement removes its effect.
ROUNDING_RIDGE = 1e-13
# Largest relative squared distance of copies of a center; rounding of float64.
SAME, EPS = 1e-13, 2e-15

_TENSORS = ("weights", "objective", "gap", "support", "effective_rank", "tied", "converged")


@dataclass(frozen=True, eq=False, repr=False)
class SimplexSolution(Result):
    """Weights on the probability simplex, one set per problem (token), with their certificate.

    Attributes:
        weights: [*problems, n] float64, non-negative, summing to 1 to rounding. Zeros are exact.
        objective: [*problems], f at the weights: squared metric norm (QP) or nats (KL).
        gap: [*problems], Frank-Wolfe gap, a bound on the objective's distance from the minimum: relative to `scale` (QP,
            "relative") or in nats (KL).
        support: [*problems], number of centers with a positive weight.
        effective_rank: [*problems], 1 + the number of independent directions among the tied centers that the data fix
            more firmly than the tie-break; equal to `tied` if the weights are unique.
        tied: [*problems], number of centers that are optimal to use, with or without weight.
        converged: [*problems], whether the gap met the tolerance. If not, weights are still feasible and `gap` holds.
        gap_unit: "relative" or "nats".
    """

    weights: Float64[Tensor, "*problems n"]
    objective: Float64[Tensor, "*problems"]
    gap: Float64[Tensor, "*problems"]
    support: Int[Tensor, "*problems"]
    effective_rank: Int[Tensor, "*problems"]
    tied: Int[Tensor, "*problems"]
    converged: Bool[Tensor, "*problems"]
    gap_unit: Literal["relative", "nats"]

    @property
    def unique(self) -> Bool[Tensor, "*problems"]:
        """[*problems], whether the data identify the weights; if not, these are the shortest optimal ones."""
        return self.effective_rank == self.tied

    @classmethod
    def cat(cls, parts: Sequence[SimplexSolution]) -> SimplexSolution:
        """Concatenate solutions along their first problem axis."""
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}
        return cls(**joined, gap_unit=parts[0].gap_unit)

    def reshape(self, *problems: int) -> SimplexSolution:
        """Reshape the problem axes."""
        shaped = {name: getattr(self, name).reshape(problems) for name in _TENSORS if name != "weights"}
        return replace(self, weights=self.weights.reshape(*problems, -1), **shaped)

    def __repr__(self) -> str:
        problems, n = self.converged.numel(), self.weights.shape[-1]
        text = f"{problems} problem{'' if problems == 1 else 's'}, {n} center{'' if n == 1 else 's'}"
        if problems:
            text += f": {int(self.converged.sum())} converged, largest gap {float(self.gap.max()):.1e} {self.gap_unit}"
            text += f", mean support {float(self.support.double().mean()):.1f}"
        return f"SimplexSolution({text})"


@torch.no_grad()
def gram(
    differences: Float[Tensor, "n *problems d_model"], metric: Float[Tensor, "d_model d_model"] | None = None
) -> Float64[Tensor, "*problems n n"]:
    """Gram matrices H_ij = <D_i, D_j>_M of the differences between terms and target, in float64.

    Args:
        differences: e_i - t, [n, *problems, d_model], subtracted in float64.
        metric: M, [d_model, d_model], symmetric positive semidefinite; U'U measures distances of logits. None is the
            identity.

    Returns:
        [*problems, n, n], exactly symmetric, in squared units of the metric (squared logits for U'U).

    Source: Chen et al. (arXiv 2410.06024), Lemma 1.
    """
    n, *problems, d_model = differences.shape
    rows = differences.double().reshape(-1, d_model)
    measured = rows if metric is None else rows @ metric.double()
    # A view; bmm takes its strides.
    left, right = (rearrange(x, "(n problem) d_model -> problem n d_model", n=n) for x in (measured, rows))
    products = left @ right.mT
    return ((products + products.mT) / 2).reshape(*problems, n, n)


@torch.no_grad()
def simplex_qp(
    differences_gram: Float64[Tensor, "*problems n n"],
    scale: Float64[Tensor, "*problems"],
    *,
    tolerance: float = 1e-6,
) -> SimplexSolution:
    """Minimize w' H w over the probability simplex, exactly within float64, batched over problems.

    Args:
        differences_gram: H, [*problems, n, n], symmetric positive semidefinite; see `gram`.
        scale: ||t||_M^2, [*problems], >= 0, in the unit of H; where it is 0, the largest H_ii is used.
        tolerance: largest gap that counts as converged, relative to scale, or to the objective where that is larger.

    Returns:
        The shortest optimal weights, `gap` relative to scale. No gradients flow through the solve.

    Raises:
        ValueError: values are not finite.

    Source: Chen et al. (arXiv 2410.06024), Lemma 1.
    """
    *problems, n, _ = differences_gram.shape
    hessian = differences_gram.double().reshape(-1, n, n)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    unit = torch.where(scale.double().reshape(-1) > 0, scale.double().reshape(-1), diagonal.amax(-1))
    unit = torch.where(unit > 0, unit, 1.0)
    hessian = hessian / unit[:, None, None]

    weights = _trim(hessian, _share(hessian, nearest_weights(hessian)))

    gap, objective = _quadratic_gap(hessian, weights)
    effective_rank, tied = identified(hessian, 2 * (hessian @ weights[..., None])[..., 0], weights, tie=RIDGE)
    return SimplexSolution(
        weights=weights.reshape(*problems, n),
        objective=(objective * unit).reshape(problems),
        gap=gap.reshape(problems),
        support=(weights > 0).sum(-1).reshape(problems),
        effective_rank=effective_rank.reshape(problems),
        tied=tied.reshape(problems),
        converged=(gap <= tolerance * objective.clamp_min(1)).reshape(problems),
        gap_unit="relative",
    )


def _quadratic_gap(hessian: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    product = (hessian @ weights[..., None])[..., 0]
    return frank_wolfe_gap(2 * product, weights), (product * weights).sum(-1).clamp_min(0)


def nearest_weights(hessian: Float64[Tensor, "problem n n"]) -> Float64[Tensor, "problem n"]:
    """Weights that minimize w' H w + delta ||w||^2, H in units of the scale; uniform where nnls does not end."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).clamp_min(0)
    root = (diagonal * (1 + ROUNDING_RIDGE) + RIDGE).rsqrt()
    scaled = hessian * root[:, :, None] * root[:, None, :]
    scaled.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    sums = root / root.amax(-1, keepdim=True)  # s is the length of the shortest column
    failed = torch.where(hessian.isfinite().all(-1).all(-1), failed.to(root), torch.nan)
    # Copied at once: every copy from a device waits for it.
    rows = torch.cat([factor.mT, sums[:, None], failed[:, None, None].expand(-1, 1, root.shape[1])], 1).cpu()
    if bool(rows[:, -1].isnan().any()):
        raise ValueError(
            "The terms and what they approximate must be finite; got NaN or infinite values. Check the terms, or lower the order."
        )
    systems = rows[:, :-1].numpy()
    for index in rows[:, -1, 0].nonzero()[:, 0].tolist():  # rounding left a negative eigenvalue
        values, vectors = torch.linalg.eigh(scaled[index])
        systems[index, :-1] = (vectors * values.clamp_min(0).sqrt()).mT.cpu().numpy()
    lifted = (
        root * torch.from_numpy(np.stack([unit_nnls(system) for system in systems])).to(root) if len(root) else root
    )
    weights = normalize(lifted)

    inside = (lifted > 0).double()
    block = scaled * inside[:, :, None] * inside[:, None, :]
    block.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    factor, _ = torch.linalg.cholesky_ex(block)
    lifted = torch.zeros_like(root)
    for _ in range(2):  # H v = 1 on the support; the second pass refines
        residual = inside * (1 - (hessian @ lifted[..., None])[..., 0] - RIDGE * lifted)
        lifted = lifted + inside * root * torch.cholesky_solve((root * residual)[..., None], factor)[..., 0]
    refined = normalize(lifted)
    better = _quadratic_gap(hessian, refined)[0] <= _quadratic_gap(hessian, weights)[0]
    return torch.where(better[:, None], refined, weights)


def unit_nnls(system: np.ndarray) -> np.ndarray:
    """Non-negative y with system @ y nearest to (0, ..., 0, 1)."""
    try:
        return nnls(system, np.eye(len(system))[-1], maxiter=30 * len(system))[0]
    except RuntimeError:  # it cycles
        return np.ones(system.shape[1])


def normalize(weights: Tensor) -> Tensor:
    """Clamp negatives to 0 and divide by the sum; uniform where nothing is left."""
    weights = torch.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0)
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), 1 / weights.shape[-1])


def frank_wolfe_gap(gradient: Tensor, weights: Tensor) -> Tensor:
    """grad.(w - e_i), largest over i: an upper bound of f(w) - min f for convex f (Jaggi 2013, eq. 2)."""
    return ((gradient * weights).sum(-1) - gradient.amin(-1)).clamp_min(0)


def shared(hessian: Tensor, weights: Tensor) -> Tensor:
    """Share weights [problem, n] evenly among copies of a center, whose differences from the target are equal."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    distance = diagonal[:, :, None] + diagonal[:, None, :] - 2 * hessian
    share = (distance <= SAME * diagonal[:, :, None]).to(weights)
    return normalize((share @ weights[..., None])[..., 0] / share.sum(-1))


def _share(hessian: Tensor, weights: Tensor) -> Tensor:
    """`shared`, unless the gap grows."""
    even = shared(hessian, weights)
    before, objective = _quadratic_gap(hessian, weights)
    after, _ = _quadratic_gap(hessian, even)
    return torch.where((after <= before.clamp_min(RIDGE) + EPS * objective)[:, None], even, weights)


def _trim(hessian: Tensor, weights: Tensor, negligible: float = 1e-7) -> Tensor:
    """Zero the weights that only the tie-break made positive, unless the gap grows."""
    length = hessian.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt().clamp_min(1)
    trimmed = normalize(torch.where(weights * length < negligible, 0.0, weights))
    before, _ = _quadratic_gap(hessian, weights)
    after, _ = _quadratic_gap(hessian, trimmed)
    return torch.where((after <= before.clamp_min(RIDGE))[:, None], trimmed, weights)


def identified(hessian: Tensor, gradient: Tensor, weights: Tensor, tie: float) -> tuple[Tensor, Tensor]:
    """Effective rank and number of tied centers; see `SimplexSolution`.

    Directions d with sum d = 0 among the tied centers count if d'Hd > d'Rd, R = tie + rounding ridge: eigenvalues above 1
    of R^(-1/2) H R^(-1/2), orthogonal to R^(-1/2) 1. In these units the rounding of H is below 1 at every scale.
    """
    excess = gradient - (gradient * weights).sum(-1, keepdim=True)
    tied = (weights > 0) | (excess <= 2 * tie)
    root = (tie + ROUNDING_RIDGE * hessian.diagonal(dim1=-2, dim2=-1).clamp_min(0)).rsqrt() * tied
    normal = root / root.norm(dim=-1, keepdim=True)
    scaled = hessian * root[:, :, None] * root[:, None, :]
    scaled = scaled - normal[:, :, None] * (normal[:, None, :] @ scaled)
    scaled = scaled - (scaled @ normal[:, :, None]) * normal[:, None, :]
    eigenvalues = torch.linalg.eigvalsh((scaled + scaled.mT) / 2)
    return 1 + (eigenvalues > 1).sum(-1), tied.sum(-1)
