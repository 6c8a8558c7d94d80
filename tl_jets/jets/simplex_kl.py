"""Jet weights that minimize KL(model || expansion) per token, with a certificate in nats.

For a token with the model's distribution p and the terms' additive logits z_i, over the probability simplex,

    f(w) = KL(p || softmax(sum_i w_i z_i)) = log-sum-exp(u) - <p, u> - H(p),     u = sum_i w_i z_i,
    grad f = E_q z - E_p z,     Hessian = Cov_q(z),     q = softmax(u).

| symbol        | variable              | meaning                                                        |
|---------------|-----------------------|----------------------------------------------------------------|
| z             | `logits`, `coarse`    | logits of the terms: as given, and in float32                  |
| p             | `probs`               | the model's distribution                                       |
| T             | `temperature`         | log-sum-exp(u) -> T log-sum-exp(u / T) >= log-sum-exp(u)       |

**Method.** A primal-dual interior point (`interior_point`) starts from nine tenths of the centered l2 optimum and one
tenth of every center, in float32 as far as rounding allows, then in float64. If q is nearly one-hot (logits of 1e3 and
more) it cools from a high temperature. The returned gap is always float64.

Source: log-sum-exp is convex: Boyd & Vandenberghe 2004, section 3.1.5. Cost per token, N centers, vocabulary V: 5 to 20
times (2 N^2 V + 6 N V).

>>> import torch
>>> logits = torch.tensor([[[2.0, 0.0, 0.0]], [[0.0, 2.0, 0.0]]])    # two terms, one token, three vocabulary entries
>>> simplex_kl(logits, torch.tensor([[1.0, 1.0, 0.0]]).log_softmax(-1)).weights.round(decimals=3)
tensor([[0.5000, 0.5000]], dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.jets.interior_point import Evaluation, Interior, interior_point
from tl_jets.jets.simplex import SimplexSolution, identified, simplex_qp
from tl_jets.jets.weights import frank_wolfe_gap, normalize, shared

COOLING = (1e3, 3e2, 1e2, 3e1, 1e1, 3.0, 1.0)
"""Temperatures, in nats, of the last attempt at a problem."""

COARSE_ROUNDING = 1e-6
"""Relative rounding of an objective that was computed in float32."""

COARSE_GAP = 2.0**-23
"""Smallest gap that float32 resolves, relative to the largest logit."""

COARSE_ITERATIONS = 12
"""Maximum number of Newton steps in float32."""


@torch.no_grad()
def simplex_kl(
    logits: Float[Tensor, "n problems d_vocab"] | Callable[[slice], Float[Tensor, "n chunk d_vocab"]],
    target_log_probs: Float[Tensor, "problems d_vocab"],
    *,
    chunk_size: int = 8,
    tolerance: float = 1e-6,
    max_iterations: int = 60,
) -> SimplexSolution:
    """Minimize KL(target || softmax(sum_i w_i z_i)) over the probability simplex per token, in nats.

    A positive logit scale is linear: multiply the logits by it. With a final softcap the objective is not convex and the
    gap is no bound. If several weights are optimal the result is interior, with copies sharing evenly, not the shortest.

    Args:
        logits: additive logits z_i, [n, problems, d_vocab], in any precision, or a callable from a slice of problems to
            [n, chunk, d_vocab], called once per chunk.
        target_log_probs: the model's log-probabilities (nats), [problems, d_vocab], normalized over d_vocab.
        chunk_size: problems per chunk; memory is n * chunk_size * d_vocab logits as given, and twice more in float32.
        tolerance: largest gap that counts as converged, in nats, or relative to an objective above 1 nat.
        max_iterations: maximum number of Newton steps per problem and attempt.

    Returns:
        A `SimplexSolution` with weights [problems, n]; its gap, in float64, is that of the given logits.

    Raises:
        ValueError: shapes do not fit, values are not finite, or the target is not normalized.
    """
    _check_target(target_log_probs, chunk_size)
    logits_of = logits if callable(logits) else (lambda chunk: logits[:, chunk])
    count = target_log_probs.shape[0]
    parts: list[SimplexSolution] = []
    for first in range(0, max(count, 1), chunk_size):
        chunk = slice(first, min(first + chunk_size, count))
        problem = _KLProblem.of(logits_of(chunk), target_log_probs[chunk])
        parts.append(_solve(problem, tolerance, max_iterations))
    return SimplexSolution.cat(parts)


@dataclass(frozen=True)
class _KLProblem:
    """One chunk of tokens.

    Attributes:
        logits: As given, [token, n, d_vocab].
        shift: About E_p z [token, n, 1]; subtracting it keeps digits and does not change the objective.
        log_probs: log p [token, d_vocab], float64.
        probs: p [token, d_vocab], float64.
        coarse: `logits - shift` in float32, [token, d_vocab, n], a layout with twice as fast products.
    """

    logits: Tensor
    shift: Tensor
    log_probs: Tensor
    probs: Tensor
    coarse: Tensor

    @classmethod
    def of(cls, logits: Tensor, target_log_probs: Tensor) -> _KLProblem:
        expected = tuple(target_log_probs.shape)
        if logits.ndim != 3 or tuple(logits.shape[1:]) != expected or logits.shape[0] == 0:
            raise ValueError(
                f"logits of a chunk must be [n, {expected[0]}, {expected[1]}], as the target's chunk and vocabulary; "
                f"got shape {tuple(logits.shape)}; stack the terms' logits on a leading axis, n >= 1"
            )
        logits = logits.transpose(0, 1)
        log_probs = target_log_probs.double().log_softmax(-1)  # exactly normalized, which the gradient relies on
        probs = log_probs.exp()
        shift = logits @ probs.to(logits.dtype)[..., None]
        coarse = torch.empty(*expected, logits.shape[1], dtype=torch.float32, device=logits.device)
        torch.sub(logits.mT, shift.mT, out=coarse)
        return cls(logits, shift.double(), log_probs, probs, coarse)

    def evaluate(self, weights: Tensor, rows: Tensor, temperature: float = 1.0) -> Evaluation:
        """KL in nats, gradient E_q z - E_p z and Hessian Cov_q(z), one token at a time in float64.

        A temperature T replaces log-sum-exp(u) by T log-sum-exp(u / T), which is convex, smoother, and never smaller.
        """
        parts = []
        for index, token in enumerate(rows.tolist()):
            z, one = (self.logits[token] - self.shift[token])[None], slice(token, token + 1)
            parts.append(_evaluate(z, weights[index : index + 1], self.log_probs[one], self.probs[one], temperature))
        value, gradient, hessian = (torch.cat(part) for part in zip(*parts, strict=True))
        return value, gradient, hessian

    def evaluate_coarsely(self, weights: Tensor, rows: Tensor) -> Evaluation:
        """`evaluate` in float32, all tokens at once."""
        z, log_probs, probs = self.coarse, self.log_probs, self.probs
        if len(rows) < len(z):
            z, log_probs, probs = z[rows], log_probs[rows], probs[rows]
        return _evaluate(z.mT, weights, log_probs, probs)

    def copies(self) -> Tensor:
        """Which centers have equal logits up to a constant [token, n, n], by their products with random signs."""
        generator = torch.Generator(device="cpu").manual_seed(0)
        signs = torch.randint(0, 2, (self.coarse.shape[1], 4), generator=generator, device="cpu") * 2.0 - 1
        seen = torch.einsum("tvn,vk->tnk", self.coarse, signs.to(self.coarse))
        distance = (seen[:, :, None] - seen[:, None]).abs().amax(-1)
        return distance <= 4 * torch.finfo(self.coarse.dtype).eps * self.coarse.abs().sum(1)[:, :, None]

    def start(self) -> Tensor:
        """Nine tenths of the centered l2 optimum plus one tenth shared in inverse proportion to the centers' lengths."""
        target = (self.log_probs - self.log_probs.mean(-1, keepdim=True)).float()
        differences = self.coarse - target[..., None]
        differences -= differences.mean(1, keepdim=True)
        products = torch.bmm(differences.mT, differences).double()
        if not bool(products.isfinite().all()):
            raise ValueError(
                "logits must be finite; got NaN, infinite values, or too large to square in float32; check the terms, "
                "or lower the expansion's order"
            )
        diagonal = products.diagonal(dim1=-2, dim2=-1)
        shares = normalize((diagonal + 1e-12 * diagonal.amax(-1, keepdim=True) + 1e-300).rsqrt())
        diagonal *= 1 + 1e-3  # far above the rounding of float32: positive definite, and duplicates share
        near = simplex_qp((products + products.mT) / 2, target.square().sum(-1).double())
        return normalize(0.9 * near.weights + 0.1 * shares)


def _evaluate(z: Tensor, weights: Tensor, log_probs: Tensor, probs: Tensor, temperature: float = 1.0) -> Evaluation:
    """Objective, gradient and Hessian in the precision of z [token, n, d_vocab]."""
    log_q = torch.bmm((weights / temperature)[:, None].to(z), z).log_softmax(-1)
    value = (probs * (log_probs - temperature * log_q[:, 0])).sum(-1)
    q = log_q.exp_()
    means = torch.bmm(z, torch.cat([q, probs[:, None].to(z)], 1).mT).double()
    weighted = z * q
    mean = means[..., :1]
    covariance = torch.bmm(weighted, z.mT).double() - mean * mean.mT
    return value, means[..., 0] - means[..., 1], covariance / temperature


def _solve(problem: _KLProblem, tolerance: float, max_iterations: int) -> SimplexSolution:
    """Solve in float32, the remaining problems in float64, and those left by cooling."""
    start, (count, n) = problem.start(), problem.shift.shape[:2]
    gap, iterations = start.new_full((count,), torch.inf), torch.zeros(count, dtype=torch.long, device=start.device)
    weights, value = start.clone(), gap.clone()
    gradient, hessian = start.new_zeros(count, n), start.new_zeros(count, n, n)

    def offer(rows: Tensor, candidates: Tensor, enough: float = 0.0) -> None:
        """Take the candidates whose float64 gap is smaller, or small enough."""
        if rows.numel():
            found = problem.evaluate(candidates, rows)
            found_gap = frank_wolfe_gap(found[1], candidates)
            better = found_gap < gap[rows].clamp_min(enough)
            for whole, part in zip(
                (weights, gap, value, gradient, hessian), (candidates, found_gap, *found), strict=True
            ):
                whole[rows[better]] = part[better]

    def settle(rows: Tensor, found: Interior) -> None:
        """Offer the weights with the negligible ones at zero; if that is not good enough, as they are."""
        offer(rows, normalize(torch.where(found.negligible, 0.0, found.weights)))
        rest = gap[rows] > found.gap.clamp_min(tolerance)
        offer(rows[rest], found.weights[rest])

    # half the tolerance, since trimming costs a little, but at least the float32 precision of the logits
    wanted = (COARSE_GAP * problem.coarse.flatten(1).abs().amax(-1).double()).clamp_min(tolerance / 2)
    limit = min(max_iterations, COARSE_ITERATIONS)
    coarse = interior_point(problem.evaluate_coarsely, start, wanted, limit, rounding=COARSE_ROUNDING)
    iterations += coarse.iterations
    settled = (coarse.gap <= tolerance).nonzero()[:, 0]
    settle(settled, coarse.at(settled))
    for attempt, first in ((_fine, coarse.weights), (_cooling, start)):
        rows = (gap > tolerance).nonzero()[:, 0]
        if rows.numel():
            found = attempt(problem, rows, first[rows], tolerance / 2, max_iterations)
            iterations[rows] += found.iterations
            settle(rows, found)

    even = shared(weights, problem.copies())
    rows = (even != weights).any(-1).nonzero()[:, 0]
    offer(rows, even[rows], enough=tolerance)

    effective_rank, tied = identified(hessian / 2, gradient, weights, tie=tolerance)
    return SimplexSolution(
        weights=weights,
        objective=value,
        gap=gap,
        support=(weights > 0).sum(-1),
        effective_rank=effective_rank,
        tied=tied,
        iterations=iterations,
        converged=gap <= tolerance * value.clamp_min(1),
        gap_unit="nats",
    )


def _fine(problem: _KLProblem, rows: Tensor, first: Tensor, tolerance: float, max_iterations: int) -> Interior:
    return interior_point(lambda w, part: problem.evaluate(w, rows[part]), first, tolerance, max_iterations)


def _cooling(problem: _KLProblem, rows: Tensor, first: Tensor, tolerance: float, max_iterations: int) -> Interior:
    """Solve from a high temperature down to 1, for logits of 1e3 and more."""
    iterations, found = torch.zeros_like(rows), None
    for temperature in COOLING:

        def evaluate(w: Tensor, part: Tensor, temperature: float = temperature) -> Evaluation:
            return problem.evaluate(w, rows[part], temperature)

        # a hot stage is only the start of the next one
        wanted = tolerance if temperature == 1 else 1e-2 * temperature
        found = interior_point(evaluate, first if found is None else found.weights, wanted, max_iterations)
        iterations += found.iterations
    assert found is not None  # there are temperatures
    return replace(found, iterations=iterations)


# --- input checks -----------------------------------------------------------------------------------------------------


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
