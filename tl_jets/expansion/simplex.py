"""Jet weights: the best convex combination of an expansion's terms, token by token, with a certificate.

At the final norm the weights enter an expansion linearly, so the weights that bring it closest to the model's
own logits solve a convex problem on the probability simplex (w >= 0, sum w = 1). In the l2 and centered l2
objectives, for one token,

    f(w) = || sum_i w_i e_i - t ||_M^2 = w' H w,     H_ij = <e_i - t, e_j - t>_M,     M = U'U (centered over the vocabulary or not)

because the weights sum to one: no difference of large numbers is left, which G = <e_i, e_j>, b = <e_i, t>
would have. In the "kl" objective f(w) = KL(softmax(t) || softmax(sum_i w_i z_i)), in nats.

| symbol        | variable              | meaning                                                        |
|---------------|-----------------------|----------------------------------------------------------------|
| e_i - t       | `differences`         | term minus target, after the final norm                        |
| H             | `differences_gram`    | Gram matrix of the differences                                 |
| ||t||_M^2     | `scale`               | what a gap is relative to                                      |
| z_i           | `logits`              | additive logits of term i                                      |
| delta         | `RIDGE`               | tie-break: objective + delta * scale * ||w||^2                 |
| v             | `lifted`              | solution of H v >= 1, v >= 0, v'(H v - 1) = 0; w = v / sum v   |
| z (dual)      | `multipliers`         | multipliers of w >= 0                                          |

**Certificate.** For convex f, f(w) - min f <= max_i <grad f(w), w - e_i> = grad.w - min_i grad_i, the
Frank-Wolfe gap (Jaggi 2013, *Revisiting Frank-Wolfe*, eq. 2). Every solution carries it, recomputed in float64
from the weights that are returned; `converged` says whether it met the tolerance, so nothing fails silently.

**Ties.** Duplicate or dependent centers leave w free. We minimize f + delta * scale * ||w||^2 with delta = 1e-9,
which has one solution: the shortest weights among all with the same or a smaller objective. It costs at most
delta / 2 of gap and is within delta of the optimum. Rounding leaves ties even to about 1e-6 (centers of the
target's size) or 1e-3 (1e6 times that). `effective_rank` counts the directions that the data fix more firmly
than the tie-break.

**Method.** KKT with the multiplier of sum w = 1 divided out is the linear complementarity problem of v above
(H + ridge is positive definite, so v exists and is unique). Block principal pivoting solves it, batched, in a
handful of Cholesky factorizations of the Jacobi-scaled matrix: centers of 4e6 |t| and condition numbers of
1e12 are routine. What it cannot settle goes to a primal-dual interior point, which is also the solver of the
KL problem, where the Hessian is the N x N covariance of z under q.

Sources: Judice & Pires 1994 (block principal pivoting); Nocedal & Wright 2006, section 14.1 and 19.3 (interior
points); Chen et al. (arXiv 2410.06024), Lemma 1 and Algorithm 1, for the weights themselves.

Cost, N centers, d_model d, vocabulary V, per token: Gram 2 N d^2 (the metric product, nearly all of it) + 2
N^2 d; QP about 5 to 15 times N^3 / 3; KL 5 to 20 times (2 N^2 V + 10 N V).

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

__all__ = ["SimplexSolution", "check_weights", "gram", "simplex_kl", "simplex_qp", "uniform_weights"]

RIDGE = 1e-9
"""The tie-break delta: weights that differ in objective by less than this times `scale` count as equally good."""

ROUNDING_RIDGE = 1e-13
"""Relative to H_ii, keeps the factorization positive definite; iterative refinement takes its effect out again."""

SAFE = 1e10
"""A multiplier may be off the barrier's own estimate, barrier / w, by this factor (Waechter & Biegler 2006, eq. 16)."""

PATIENCE = 20
"""Interior-point steps without a smaller gap after which rounding is taken to be reached."""

COOLING = (1e3, 3e2, 1e2, 3e1, 1e1, 3.0, 1.0)
"""Temperatures, in nats, of the second attempt at a KL problem."""

_TENSORS = ("weights", "objective", "gap", "support", "effective_rank", "tied", "iterations", "converged")

Evaluation = tuple[Tensor, Tensor, Tensor]
"""Objective [rows], gradient [rows n] and Hessian [rows n n]."""


@dataclass(frozen=True, repr=False)
class SimplexSolution:
    """Weights on the probability simplex, one set a problem (token), with what is known about them.

    Attributes:
        weights: [*problems, n] float64, non-negative, summing to 1 to rounding. Zeros are exact.
        objective: [*problems], f at the weights: squared metric norm (QP) or nats (KL).
        gap: [*problems], Frank-Wolfe certificate: the objective is at most this above the minimum. In units of
            `scale` for the QP ("relative"), in nats for the KL.
        support: [*problems], number of centers with a positive weight.
        effective_rank: [*problems], 1 + the number of independent weight-shifting directions, among the
            centers that are optimal to use, that the data fix more firmly than the tie-break. Equal to `tied`
            when the weights are unique.
        tied: [*problems], number of centers that are optimal to use (those with weight, and those as good at
            no weight).
        iterations: [*problems], factorizations that the solver took.
        converged: [*problems], whether the gap met the tolerance. Where False the weights are still feasible,
            and `gap` still bounds how far from optimal they are.
        gap_unit: "relative" or "nats".
    """

    weights: Float64[Tensor, "*problems n"]
    objective: Float64[Tensor, "*problems"]
    gap: Float64[Tensor, "*problems"]
    support: Int[Tensor, "*problems"]
    effective_rank: Int[Tensor, "*problems"]
    tied: Int[Tensor, "*problems"]
    iterations: Int[Tensor, "*problems"]
    converged: Bool[Tensor, "*problems"]
    gap_unit: Literal["relative", "nats"]

    @property
    def unique(self) -> Bool[Tensor, "*problems"]:
        """[*problems], whether the data identify the weights; where False the shortest of the optimal weights were taken."""
        return self.effective_rank == self.tied

    @classmethod
    def cat(cls, parts: Sequence[SimplexSolution]) -> SimplexSolution:
        """Solutions of one kind, one after the other along their first problem axis."""
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}
        return cls(**joined, gap_unit=parts[0].gap_unit)

    def reshape(self, *problems: int) -> SimplexSolution:
        """The same solutions with another shape of problems."""
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
        differences: e_i - t, [n, *problems, d_model], center first, as an expansion stacks its terms. Subtract
            in float64.
        metric: M, [d_model, d_model], symmetric positive semidefinite; U'U makes distances those of logits.
            None is the identity.

    Returns:
        [*problems, n, n], exactly symmetric, in squared units of the metric (squared logits for U'U).

    Raises:
        ValueError: the metric does not fit d_model, or there are no centers.

    Source: DESIGN section 2, "Jet weights"; Chen et al. (arXiv 2410.06024), Lemma 1.
    """
    if differences.ndim < 2 or differences.shape[0] == 0:
        raise ValueError(
            "differences must be [n, *problems, d_model] with at least one center n; "
            f"got shape {tuple(differences.shape)}; stack the terms on a new leading axis"
        )
    n, *problems, d_model = differences.shape
    rows = differences.double().reshape(-1, d_model)
    if metric is not None and metric.shape != (d_model, d_model):
        raise ValueError(
            f"metric must be [d_model, d_model] = [{d_model}, {d_model}]; got shape {tuple(metric.shape)}; "
            "pass U'U of the unembedding, e.g. W_U @ W_U.T for TransformerLens' W_U [d_model, d_vocab]"
        )
    measured = rows if metric is None else rows @ metric.double()
    # [n, problems, d] -> [problems, n, d] stays a view: bmm takes the strides as they are
    left, right = (x.view(n, -1, d_model).transpose(0, 1) for x in (measured, rows))
    products = left @ right.mT
    return ((products + products.mT) / 2).reshape(*problems, n, n)


@torch.no_grad()
def simplex_qp(
    differences_gram: Float64[Tensor, "*problems n n"],
    scale: Float64[Tensor, "*problems"],
    *,
    tolerance: float = 1e-6,
) -> SimplexSolution:
    """Minimize w' H w over the probability simplex, exactly within float64, for many problems at once.

    Args:
        differences_gram: H, [*problems, n, n], symmetric positive semidefinite; see `gram`.
        scale: ||t||_M^2, [*problems], >= 0, in the unit of H. Where it is 0 (a zero target) the largest H_ii
            stands in for it.
        tolerance: largest gap that counts as converged, relative to scale, or to the objective where that is
            larger (an expansion worse than predicting zero; float64 holds no more digits there).

    Returns:
        The shortest optimal weights, `gap` relative to scale. Gradients do not flow through the solve;
        evaluating an expansion at the weights stays differentiable in them.

    Raises:
        ValueError: shapes do not fit, or values are not finite, or a scale or a diagonal entry is negative.

    Source: DESIGN section 2, "Jet weights"; module docstring for the method.
    """
    _check_problem(differences_gram, scale)
    *problems, n, _ = differences_gram.shape
    hessian = differences_gram.double().reshape(-1, n, n)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    unit = torch.where(scale.double().reshape(-1) > 0, scale.double().reshape(-1), diagonal.amax(-1))
    unit = torch.where(unit > 0, unit, 1.0)
    hessian = hessian / unit[:, None, None]

    weights, iterations = _pivot(hessian)
    gap, objective = _quadratic_gap(hessian, weights)
    # the pivoting aims at 1e-9: whatever misses the tenth of what was asked for gets the slower, sturdier
    # method
    failed = (gap > 0.1 * tolerance * objective.clamp_min(1)).nonzero()[:, 0]
    if failed.numel():
        rescued, extra = _rescue(hessian[failed], weights[failed])
        rescued_gap, _ = _quadratic_gap(hessian[failed], rescued)
        weights[failed] = torch.where((rescued_gap < gap[failed])[:, None], rescued, weights[failed])
        iterations[failed] += extra
    weights = _trim(hessian, weights)

    gap, objective = _quadratic_gap(hessian, weights)
    effective_rank, tied = _identified(hessian, 2 * (hessian @ weights[..., None])[..., 0], weights, tie=RIDGE)
    return SimplexSolution(
        weights=weights.reshape(*problems, n),
        objective=(objective * unit).reshape(problems),
        gap=gap.reshape(problems),
        support=(weights > 0).sum(-1).reshape(problems),
        effective_rank=effective_rank.reshape(problems),
        tied=tied.reshape(problems),
        iterations=iterations.reshape(problems),
        converged=(gap <= tolerance * objective.clamp_min(1)).reshape(problems),
        gap_unit="relative",
    )


@torch.no_grad()
def simplex_kl(
    logits: Float[Tensor, "n problems d_vocab"] | Callable[[slice], Float[Tensor, "n chunk d_vocab"]],
    target_log_probs: Float[Tensor, "problems d_vocab"],
    *,
    chunk_size: int = 8,
    tolerance: float = 1e-6,
    max_iterations: int = 60,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> SimplexSolution:
    """Minimize KL(target || softmax(sum_i w_i z_i)) over the probability simplex, token by token, in nats.

    Logits may be given in the model's precision; sums and the certificate are float64, so the gap is that of
    the problem that the given logits state. A positive constant logit scale is linear: multiply the logits by
    it. Among several optimal weights it returns interior ones (exact duplicates share evenly), not the
    shortest.

    Args:
        logits: additive logits z_i of the terms, [n, problems, d_vocab], or a callable that maps a slice of
            problems to [n, chunk, d_vocab], asked once a chunk, so that at most chunk_size tokens' logits
            exist at a time.
        target_log_probs: the model's own log-probabilities (nats), [problems, d_vocab], log-softmaxed over
            d_vocab.
        chunk_size: problems a chunk; memory is n * chunk_size * d_vocab logits as given, and once more in float64.
        tolerance: largest gap that counts as converged, in nats, or relative to an objective above 1 nat.
        max_iterations: Newton steps at most, per problem.
        transform: the model's elementwise map of the combined logits, if it has one. See Raises.

    Raises:
        NotImplementedError: a transform (final softcap) is given: the objective is then no longer convex in
            the weights, and the Frank-Wolfe gap would certify wrongly.
        ValueError: shapes do not fit, values are not finite, or the target is not normalized.

    Source: DESIGN section 2, "Jet weights" (objective "kl"); log-sum-exp is convex: Boyd & Vandenberghe 2004,
    section 3.1.5.
    """
    if transform is not None:
        raise NotImplementedError(
            "KL weights need logits that are linear in the weights, so that the problem is convex and its gap is a bound; "
            f"got transform={transform!r} (a final softcap bends them); use objective='centered_l2', which is taken before it"
        )
    _check_target(target_log_probs, chunk_size)
    logits_of = logits if callable(logits) else (lambda chunk: logits[:, chunk])
    count = target_log_probs.shape[0]
    parts: list[SimplexSolution] = []
    for first in range(0, max(count, 1), chunk_size):
        chunk = slice(first, min(first + chunk_size, count))
        problem = _KLProblem.of(logits_of(chunk), target_log_probs[chunk])
        parts.append(_solve_kl(problem, tolerance, max_iterations))
    return SimplexSolution.cat(parts)


def uniform_weights(
    n: int, *problems: int, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Float[Tensor, "*problems n"]:
    """Equal weights 1/n for every center, [*problems, n]: what every optimized set of weights stands beside.

    Raises:
        ValueError: n is not positive.

    Source: Chen et al. (arXiv 2410.06024), Algorithm 2.
    """
    if n < 1:
        raise ValueError(f"weights need at least one center; got n={n}; pass the number of centers of the expansion")
    return torch.full((*problems, n), 1 / n, dtype=dtype, device=device)


def check_weights(
    weights: Float[Tensor, "*problems n"], n: int, *, problems: tuple[int, ...] | None = None, tolerance: float = 1e-6
) -> Float[Tensor, "*problems n"]:
    """Return weights that someone gave, unchanged, if they are a point of the simplex for each problem.

    Args:
        weights: [n], or [*problems, n], center last.
        n: number of centers.
        problems: leading shape that the weights must broadcast to; None takes any.
        tolerance: how far from 1 a sum may be; raised to what the dtype can hold.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: wrong length or leading shape, not finite, negative, or a sum other than 1.

    Source: Chen et al. (arXiv 2410.06024), Lemma 1: the weights are those of a convex combination.
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
            f"weights must be [n] or [*problems, n] with problems {problems}; got shape {shape}; move the center axis last"
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


# --- the quadratic problem; here H is in units of scale, and problems are one axis ------------------------------------


def _pivot(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Block principal pivoting on H v >= 1, v >= 0, v'(H v - 1) = 0: guess the support, solve on it, swap what is infeasible."""
    count, n, _ = hessian.shape
    face = torch.ones(count, n, dtype=torch.bool, device=hessian.device)
    lifted = torch.ones(count, n, dtype=torch.float64, device=hessian.device)
    iterations = torch.zeros(count, dtype=torch.long, device=hessian.device)
    fewest = torch.full_like(iterations, n + 1)
    patience = torch.full_like(iterations, 3)
    order = torch.arange(n, device=hessian.device)
    rows = torch.arange(count, device=hessian.device)
    system = _Ridged.of(hessian)
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
        # full exchanges while they help; else one at a time (Murty), which ends for every positive definite H
        last = order == torch.where(wrong, order, -1).amax(-1, keepdim=True)
        face[rows] ^= torch.where((patience[rows] >= 0)[:, None], wrong, last)
    return _normalize(lifted), iterations


@dataclass(frozen=True)
class _Ridged:
    """H + ridges, Jacobi-scaled to unit diagonal (v = root * y), and H + tie-break alone, which is what is solved for."""

    hessian: Tensor
    scaled: Tensor
    root: Tensor

    @classmethod
    def of(cls, hessian: Tensor) -> _Ridged:
        diagonal = hessian.diagonal(dim1=-2, dim2=-1).clamp_min(0)
        root = (diagonal * (1 + ROUNDING_RIDGE) + RIDGE).rsqrt()
        scaled = hessian * root[:, :, None] * root[:, None, :]
        scaled.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        broken = hessian.clone()
        broken.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
        return cls(broken, scaled, root)

    def rows(self, index: Tensor) -> _Ridged:
        return _Ridged(self.hessian[index], self.scaled[index], self.root[index])

    def solve(self, face: Tensor) -> tuple[Tensor, Tensor]:
        """Solve H v = 1 on the face, with v = 0 off it; also tell which centers are on the wrong side of it."""
        inside = face.double()
        block = self.scaled * inside[:, :, None] * inside[:, None, :]
        block.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        factor, _ = torch.linalg.cholesky_ex(block)
        lifted = torch.zeros_like(self.root)
        for _ in range(2):  # the second pass refines: it removes the rounding ridge
            residual = inside - inside * (self.hessian @ lifted[..., None])[..., 0]
            step = torch.cholesky_solve((self.root * residual)[..., None], factor)[..., 0]
            lifted = lifted + inside * self.root * step
        slack = (self.hessian @ lifted[..., None])[..., 0] - 1
        # slack below its own rounding is zero: without this a tie flips in and out of the face forever
        noise = 1e-9 + 1e-14 * (self.hessian.abs() @ lifted.abs()[..., None])[..., 0]
        wrong = (face & (lifted < 0)) | (~face & (slack < -noise)) | ~lifted.isfinite()
        return lifted, wrong


def _normalize(weights: Tensor) -> Tensor:
    """Onto the simplex: negatives to 0, divided by the sum; uniform where nothing usable is left."""
    weights = torch.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0)
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), 1 / weights.shape[-1])


def _frank_wolfe_gap(gradient: Tensor, weights: Tensor) -> Tensor:
    """grad.(w - e_i), largest over i: an upper bound of f(w) - min f for convex f."""
    return ((gradient * weights).sum(-1) - gradient.amin(-1)).clamp_min(0)


def _quadratic_gap(hessian: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    product = (hessian @ weights[..., None])[..., 0]
    return _frank_wolfe_gap(2 * product, weights), (product * weights).sum(-1).clamp_min(0)


def _rescue(hessian: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Interior point for what pivoting left; then the exact solve on the face that it found, if that is the better of the two."""
    system = _Ridged.of(hessian)

    def evaluate(w: Tensor, rows: Tensor) -> Evaluation:
        product = (system.hessian[rows] @ w[..., None])[..., 0]
        return (product * w).sum(-1), 2 * product, 2 * system.hessian[rows]

    start = 0.5 * weights + 0.5 * _normalize(system.root)
    found = _interior_point(evaluate, start, tolerance=1e-9, max_iterations=80)
    polished = _normalize(system.solve(~found.negligible)[0])
    better = _quadratic_gap(hessian, polished)[0] < _quadratic_gap(hessian, found.weights)[0]
    return torch.where(better[:, None], polished, found.weights), found.iterations


def _trim(hessian: Tensor, weights: Tensor, negligible: float = 1e-7) -> Tensor:
    """Zero the weights that only the tie-break made positive, where the certificate does not mind."""
    length = hessian.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt().clamp_min(1)
    trimmed = _normalize(torch.where(weights * length < negligible, 0.0, weights))
    before, _ = _quadratic_gap(hessian, weights)
    after, _ = _quadratic_gap(hessian, trimmed)
    return torch.where((after <= before.clamp_min(RIDGE))[:, None], trimmed, weights)


def _identified(hessian: Tensor, gradient: Tensor, weights: Tensor, tie: float) -> tuple[Tensor, Tensor]:
    """Effective rank and number of tied centers; see `SimplexSolution`.

    Directions d with sum d = 0 among the tied centers count if d'Hd > d'Rd, R = tie + rounding ridge:
    eigenvalues above 1 of R^(-1/2) H R^(-1/2), off the direction R^(-1/2) 1. In these units the rounding of H
    is below 1 whatever its scale.
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


# --- interior point, for any convex objective on the simplex ----------------------------------------------------------


@dataclass(frozen=True)
class _Interior:
    """The best point on the way; `negligible` weights go to zero (a Newton step in that weight alone would take it there)."""

    weights: Tensor
    gap: Tensor
    negligible: Tensor
    iterations: Tensor


def _interior_point(
    evaluate: Callable[[Tensor, Tensor], Evaluation], start: Tensor, tolerance: float, max_iterations: int
) -> _Interior:
    """Primal-dual Newton steps with an affine predictor for the barrier and Armijo backtracking on the barrier function.

    `evaluate(weights, rows)` gives objective, gradient and Hessian of the problems `rows`.
    """
    weights, n = start.clone(), start.shape[-1]
    rows = torch.arange(weights.shape[0], device=weights.device)
    value, gradient, hessian = evaluate(weights, rows)
    gap = _frank_wolfe_gap(gradient, weights)
    # a barrier no higher than the objective, which is >= 0: the gap of a good start may be 1e4 times that
    multipliers = (torch.minimum(gap, value).clamp_min(1e-300) / n)[:, None] / weights
    iterations, since = torch.zeros_like(rows), torch.zeros_like(rows)
    best, best_gap, negligible = weights.clone(), gap.clone(), torch.zeros_like(weights, dtype=torch.bool)
    for _ in range(max_iterations):
        active = (gap > tolerance).nonzero()[:, 0]
        if active.numel() == 0:
            break
        rows, gap = rows[active], gap[active]
        value, gradient, hessian = value[active], gradient[active], hessian[active]
        w, z = weights[rows], multipliers[rows]
        dw, dz, barrier = _newton_step(w, z, gradient, hessian, least=1e-3 * tolerance / n)
        length = torch.minimum(_longest(w, dw), _longest(z, dz))
        length, (value, gradient, hessian) = _backtrack(evaluate, rows, w, dw, length, barrier, value, gradient)
        weights[rows] = _normalize(w + length[:, None] * dw)
        target = barrier[:, None] / weights[rows]
        multipliers[rows] = (z + length[:, None] * dz).clamp(target / SAFE, target * SAFE)
        iterations[rows] += 1
        gap = _frank_wolfe_gap(gradient, weights[rows])
        improved = gap < best_gap[rows]
        better = rows[improved]
        best[better], best_gap[better] = weights[better], gap[improved]
        curvature = hessian[improved].diagonal(dim1=-2, dim2=-1)
        negligible[better] = weights[better] * curvature < multipliers[better]
        since[rows] = torch.where(improved, 0, since[rows] + 1)
        gap = torch.where((since[rows] > PATIENCE) & (gap > tolerance), torch.nan, gap)  # NaN leaves the active set
    return _Interior(best, best_gap, negligible, iterations)


def _newton_step(
    w: Tensor, z: Tensor, gradient: Tensor, hessian: Tensor, least: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One factorization, two right-hand sides: the affine step tells how far the barrier may drop, the second is taken."""
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
) -> tuple[Tensor, Evaluation]:
    """Quarter the steps that do not lower objective - barrier * sum log w; evaluate again only those."""
    slope = (gradient * dw).sum(-1) - barrier * (dw / w).sum(-1)
    length = length.clone()
    evaluation = evaluate(_normalize(w + length[:, None] * dw), rows)
    for _ in range(20):
        trial = _normalize(w + length[:, None] * dw)
        change = evaluation[0] - value - barrier * (trial / w).log().sum(-1)
        allowed = 1e-4 * length * slope + 1e-13 * (1 + value.abs())
        long = (~(change <= allowed)).nonzero()[:, 0]
        if long.numel() == 0:
            break
        length[long] /= 4
        again = evaluate(_normalize(w[long] + length[long, None] * dw[long]), rows[long])
        for whole, part in zip(evaluation, again, strict=True):
            whole[long] = part
    return length, evaluation


# --- the KL problem ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _KLProblem:
    """One chunk of tokens, evaluated token by token so that one token is in cache.

    `logits` are float64, [token d_vocab n], shifted by a constant a center so that E_p z = 0: the gradient
    then is E_q z.
    """

    logits: Tensor
    log_probs: Tensor
    probs: Tensor

    @classmethod
    def of(cls, logits: Tensor, target_log_probs: Tensor) -> _KLProblem:
        expected = tuple(target_log_probs.shape)
        if logits.ndim != 3 or tuple(logits.shape[1:]) != expected or logits.shape[0] == 0:
            raise ValueError(
                f"logits of a chunk must be [n, {expected[0]}, {expected[1]}], as the target's chunk and vocabulary; "
                f"got shape {tuple(logits.shape)}; stack the terms' logits on a leading axis, n >= 1"
            )
        log_probs = target_log_probs.double().log_softmax(-1)  # exactly normalized, which the gradient relies on
        probs = log_probs.exp()
        # center last: the products of evaluate() run twice as fast, and several times over the same numbers
        centered = probs.new_empty(*expected, logits.shape[0]).copy_(logits.permute(1, 2, 0))
        centered -= probs[:, None] @ centered
        return cls(centered, log_probs, probs)

    def evaluate(self, weights: Tensor, rows: Tensor, temperature: float = 1.0) -> Evaluation:
        """KL in nats, its gradient E_q z and its Hessian Cov_q(z), q = softmax(w.z).

        With a temperature T, log-sum-exp(u) becomes T log-sum-exp(u / T): convex too, smoother, and never
        smaller.
        """
        n = weights.shape[-1]
        value, mean = weights.new_empty(len(rows)), weights.new_empty(len(rows), n)
        second = weights.new_empty(len(rows), n, n)
        weighted = self.logits.new_empty(self.logits.shape[1:])
        for index, token in enumerate(rows.tolist()):
            z = self.logits[token]
            log_q = (z @ (weights[index] / temperature)).log_softmax(-1)
            q = log_q.exp()
            value[index] = self.probs[token] @ (self.log_probs[token] - temperature * log_q)
            mean[index] = q @ z
            second[index] = torch.mul(z, q[:, None], out=weighted).T @ z
        return value, mean, (second - mean[:, :, None] * mean[:, None, :]) / temperature

    def centered_gram(self) -> tuple[Tensor, Tensor]:
        """H and scale of the centered l2 problem, from the logits themselves."""
        # multiplied out: cheaper than forming the differences, and a start needs no more digits
        target = self.log_probs - self.log_probs.mean(-1, keepdim=True)
        mean = self.logits.mean(1)
        with_target = (target[:, None] @ self.logits)[:, 0]
        scale = target.square().sum(-1)
        products = self.logits.mT @ self.logits - self.logits.shape[1] * mean[:, :, None] * mean[:, None, :]
        products = products - with_target[:, :, None] - with_target[:, None, :] + scale[:, None, None]
        products.diagonal(dim1=-2, dim2=-1).clamp_(min=0)
        return (products + products.mT) / 2, scale


def _kl_interior_point(problem: _KLProblem, start: Tensor, tolerance: float, max_iterations: int) -> _Interior:
    """Newton from the start; where logits of 1e3 and more leave q all but one-hot, again, cooling from a high temperature."""
    found = _interior_point(problem.evaluate, start, tolerance, max_iterations)
    failed = (found.gap > tolerance).nonzero()[:, 0]
    if failed.numel() == 0:
        return found
    weights = start[failed]
    for temperature in COOLING:

        def evaluate(w: Tensor, rows: Tensor, temperature: float = temperature) -> Evaluation:
            return problem.evaluate(w, failed[rows], temperature)

        # a hot stage need only be near its own optimum: the next one moves on anyway
        wanted = tolerance if temperature == 1 else 1e-2 * temperature
        cooled = _interior_point(evaluate, weights, wanted, max_iterations)
        found.iterations[failed] += cooled.iterations
        weights = cooled.weights
    better = cooled.gap < found.gap[failed]
    for whole, part in (
        (found.weights, cooled.weights),
        (found.gap, cooled.gap),
        (found.negligible, cooled.negligible),
    ):
        whole[failed[better]] = part[better]
    return found


def _solve_kl(problem: _KLProblem, tolerance: float, max_iterations: int) -> SimplexSolution:
    """From nine tenths centered l2 optimum and one tenth every center, each in inverse proportion to its length."""
    products, scale = problem.centered_gram()
    if not bool(products.isfinite().all()):
        raise ValueError(
            "logits must be finite; got NaN or infinite values; check the terms, or lower the expansion's order"
        )
    near = simplex_qp(products, scale)
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    shares = _normalize((diagonal + 1e-12 * diagonal.amax(-1, keepdim=True) + 1e-300).rsqrt())
    start = _normalize(0.9 * near.weights + 0.1 * shares)
    # half of what is asked for, since trimming costs a little
    interior = _kl_interior_point(problem, start, tolerance / 2, max_iterations)
    weights = _normalize(torch.where(interior.negligible, 0.0, interior.weights))
    every = torch.arange(weights.shape[0], device=weights.device)
    value, gradient, hessian = problem.evaluate(weights, every)
    kept = (_frank_wolfe_gap(gradient, weights) > interior.gap.clamp_min(tolerance)).nonzero()[:, 0]
    if kept.numel():
        weights[kept] = interior.weights[kept]
        value[kept], gradient[kept], hessian[kept] = problem.evaluate(weights[kept], kept)

    gap = _frank_wolfe_gap(gradient, weights)
    effective_rank, tied = _identified(hessian / 2, gradient, weights, tie=tolerance)
    return SimplexSolution(
        weights=weights,
        objective=value,
        gap=gap,
        support=(weights > 0).sum(-1),
        effective_rank=effective_rank,
        tied=tied,
        iterations=interior.iterations,
        converged=gap <= tolerance * value.clamp_min(1),
        gap_unit="nats",
    )


# --- what must hold of the input --------------------------------------------------------------------------------------


def _check_problem(differences_gram: Tensor, scale: Tensor) -> None:
    shape = tuple(differences_gram.shape)
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] == 0:
        raise ValueError(
            f"differences_gram must be [*problems, n, n] with n >= 1; got shape {shape}; build it with gram()"
        )
    if tuple(scale.shape) != shape[:-2]:
        raise ValueError(
            f"scale must have one entry a problem, shape {shape[:-2]}; got shape {tuple(scale.shape)}; "
            "pass the squared metric norm of each target"
        )
    if not bool(differences_gram.isfinite().all()) or not bool(scale.isfinite().all()):
        raise ValueError(
            "differences_gram and scale must be finite; got NaN or infinite values; "
            "check the terms, or lower the expansion's order"
        )
    diagonal = differences_gram.diagonal(dim1=-2, dim2=-1)
    below = diagonal < -1e-9 * torch.maximum(scale[..., None], diagonal.abs().amax(-1, keepdim=True))  # beyond rounding
    if bool((scale < 0).any()) or bool(below.any()):
        raise ValueError(
            "differences_gram and scale must be squared norms, so that no diagonal entry and no scale is negative; "
            "got a negative one; check that the metric is positive semidefinite"
        )


def _check_target(target_log_probs: Tensor, chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(
            f"chunk_size must be at least 1 problem; got {chunk_size}; pass how many tokens fit in memory at once"
        )
    if target_log_probs.ndim != 2:
        raise ValueError(
            f"target_log_probs must be [problems, d_vocab]; got shape {tuple(target_log_probs.shape)}; "
            "flatten batch and position into one axis"
        )
    total = target_log_probs.double().logsumexp(-1) if target_log_probs.numel() else target_log_probs.new_zeros(0)
    if not bool(target_log_probs.isfinite().all()) or bool((total.abs() > 1e-2).any()):
        raise ValueError(
            "target_log_probs must be finite log-probabilities that sum to 1 after exp; got others; "
            "pass logits.log_softmax(-1) of the model's own logits"
        )


def _broadcasts(shape: tuple[int, ...], problems: tuple[int, ...]) -> bool:
    try:
        return tuple(torch.broadcast_shapes(shape, problems)) == tuple(problems)
    except RuntimeError:
        return False
