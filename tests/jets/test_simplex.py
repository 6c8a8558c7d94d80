"""Jet weights against independent solvers: non-negative least squares for the QP, L-BFGS for the KL problem."""

from __future__ import annotations

import os
from functools import cache
from inspect import unwrap
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, nnls
from torch import Tensor

import tl_jets as tj
from tl_jets.jets import simplex
from tl_jets.jets.simplex import gram, simplex_qp
from tl_jets.jets.simplex_kl import simplex_kl
from tl_jets.jets.weights import read_weights, uniform_weights

STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K"
ASKED = 1e-6
AIMED = 1e-8


# --- oracles ----------------------------------------------------------------------------------------------------------


def nnls_objective(differences: np.ndarray) -> float:
    """min ||D'w||^2 over the simplex, D [n, d]: Lawson-Hanson on D v = 0, 1.v = s, unit-norm columns, then normalized.

    The homogeneous problem ||D'v||^2 + s^2 (1.v - 1)^2 has its minimum on the same ray for every s; the
    smallest length of a center keeps both parts of comparable size.
    """
    n = differences.shape[0]
    row = max(float(np.linalg.norm(differences, axis=1).min()), 1e-3)
    system = np.vstack([differences.T, np.full((1, n), row)])
    length = np.linalg.norm(system, axis=0)
    right = np.zeros(system.shape[0])
    right[-1] = row
    v = nnls(system / length, right, maxiter=100 * n)[0] / length
    w = v / v.sum()
    return float(np.sum((differences.T @ w) ** 2))


def independent_gap(differences_gram: Tensor, weights: Tensor) -> Tensor:
    """max over vertices of grad.(w - e_i), written out, in extended precision where the platform has it."""
    h, w = differences_gram.numpy().astype(np.longdouble), weights.numpy().astype(np.longdouble)
    gradient = 2 * np.einsum("pij,pj->pi", h, w)
    return torch.tensor(((gradient * w).sum(-1) - gradient.min(-1)).astype(np.float64))


def assert_optimal(differences: Tensor, scale: Tensor, *, asked: float = AIMED) -> simplex.SimplexSolution:
    """differences [n, problems, d] in units where the metric is the identity."""
    h = gram(differences)
    solution = simplex_qp(h, scale)
    weights = solution.weights
    reference = torch.maximum(scale, solution.objective)
    assert bool(solution.converged.all()), solution
    assert weights.dtype == torch.float64
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(scale), rtol=0, atol=1e-12)
    assert float((independent_gap(h, weights) / reference).max()) <= asked
    torch.testing.assert_close(
        solution.gap * scale, independent_gap(h, weights), rtol=1e-3, atol=1e-11 * float(reference.max())
    )
    own = torch.einsum("npd,pn->pd", differences, weights).square().sum(-1)
    oracle = torch.tensor(
        [nnls_objective(differences[:, p].numpy()) for p in range(scale.shape[0])], dtype=torch.float64
    )
    assert float(((own - oracle) / reference).abs().max()) <= asked
    return solution


# --- synthetic stress -------------------------------------------------------------------------------------------------

KINDS = [
    "random",
    "duplicates",
    "collinear",
    "huge",
    "mostly_huge",
    "exact_fit",
    "single",
    "vertex",
    "zeros",
    "more_than_d",
    "ill_conditioned",
    "tiny",
    "large",
    "nearly_equal",
    "two_scales",
]


def stress(kind: str, problems: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Differences [n, problems, d] and scale, of one kind of difficulty."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    n, d = 9, 24
    terms, target = normal(n, problems, d), normal(problems, d)
    if kind == "duplicates":
        terms[4:] = terms[:1]
    elif kind == "collinear":
        terms = target + normal(problems, d) * torch.linspace(0.5, 3, n, dtype=torch.float64)[:, None, None]
    elif kind == "huge":
        terms = terms * 1e6
    elif kind == "mostly_huge":
        terms[1:] *= 10 ** (1 + 5.6 * torch.rand(n - 1, problems, 1, generator=draw, dtype=torch.float64))
    elif kind == "exact_fit":
        terms[0] = 3 * target - terms[1] - terms[2]
    elif kind == "single":
        terms = terms[:1]
    elif kind == "vertex":
        terms[3] = target
    elif kind == "zeros":
        terms[2:5] = 0
    elif kind == "more_than_d":
        terms, target = normal(30, problems, 5) + 1.5, normal(problems, 5)
    elif kind == "ill_conditioned":
        spectrum = torch.logspace(0, -6, d, dtype=torch.float64)  # condition 1e12 of the Gram matrix
        rotation = torch.linalg.qr(normal(d, d))[0]
        terms, target = terms * spectrum @ rotation, target * spectrum @ rotation
    elif kind == "tiny":
        terms, target = terms * 1e-9, target * 1e-9
    elif kind == "large":
        terms, target = terms * 1e9, target * 1e9
    elif kind == "nearly_equal":
        terms = terms[:1] + 1e-7 * terms
    elif kind == "two_scales":
        terms = torch.where(torch.arange(n)[:, None, None] % 2 == 0, terms * 1e-4, terms * 1e4)
    return terms - target, target.square().sum(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_qp_agrees_with_nnls_under_stress(kind: str, seed: int) -> None:
    assert_optimal(*stress(kind, seed=seed))


def test_large_batches_equal_their_problems_one_by_one() -> None:
    differences, scale = stress("random", problems=60)
    together = simplex_qp(gram(differences), scale)
    for p in (0, 17, 59):
        alone = simplex_qp(gram(differences[:, p]), scale[p])
        assert alone.weights.shape == (9,)
        assert alone.gap.shape == ()
        torch.testing.assert_close(alone.weights, together.weights[p], rtol=0, atol=1e-12)


def test_problem_axes_are_kept() -> None:
    differences, scale = stress("random")
    flat = simplex_qp(gram(differences), scale)
    shaped = simplex_qp(gram(differences.reshape(9, 3, 4, 24)), scale.reshape(3, 4))
    assert shaped.weights.shape == (3, 4, 9)
    assert shaped.support.shape == (3, 4)
    torch.testing.assert_close(shaped.weights.reshape(12, 9), flat.weights, rtol=0, atol=1e-12)
    empty = simplex_qp(torch.zeros(0, 3, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))
    assert empty.weights.shape == (0, 3)
    assert "0 problems" in repr(empty)


def test_solutions_are_saved(tmp_path: Path) -> None:
    differences, scale = stress("random")
    solution = simplex_qp(gram(differences), scale)
    loaded = tj.load(solution.save(tmp_path / "weights.safetensors"))
    for name, value in vars(solution).items():
        assert torch.equal(getattr(loaded, name), value) if isinstance(value, Tensor) else loaded.gap_unit == value


def test_metric_is_the_one_given() -> None:
    differences, _ = stress("random")
    factor = torch.randn(24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    by_logits = torch.einsum("ipv,jpv->pij", differences @ factor, differences @ factor)
    torch.testing.assert_close(gram(differences, factor @ factor.T), by_logits, rtol=1e-12, atol=1e-10)
    h = gram(differences.float(), factor @ factor.T)
    assert h.dtype == torch.float64
    assert torch.equal(h, h.mT)


# --- which optimum ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_duplicates_share_evenly_and_are_told(size: float) -> None:
    differences, scale = stress("random")
    differences = differences * size
    differences[6:] = differences[:3].repeat_interleave(1, 0)
    solution = simplex_qp(gram(differences), scale)
    # how evenly: rounding of H over the tie-break's 1e-9, or over the rounding ridge where H is 1e12 times the
    # scale
    torch.testing.assert_close(
        solution.weights[:, 6:], solution.weights[:, :3], rtol=0, atol=1e-5 if size <= 1 else 1e-2
    )
    used = solution.weights[:, :3] > 0
    assert bool(used.any())
    assert torch.equal(solution.tied - solution.effective_rank, used.sum(-1))
    assert torch.equal(solution.unique, ~used.any(-1))
    assert bool(simplex_qp(gram(differences[:6]), scale).unique.all())


def test_weights_are_the_shortest_of_the_optimal_ones() -> None:
    """Two dimensions, six centers around the target: a whole polytope of exact fits. Oracle: SLSQP on ||w||^2, well scaled here."""
    terms = torch.tensor(
        [[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, -2.0], [1.0, 1.0], [-3.0, 1.0]], dtype=torch.float64
    )
    solution = simplex_qp(gram(terms[:, None]), torch.ones(1, dtype=torch.float64))
    constraints = [
        {"type": "eq", "fun": lambda w: w.sum() - 1},
        {"type": "eq", "fun": lambda w: terms.numpy().T @ w},
    ]
    shortest = minimize(lambda w: w @ w, np.full(6, 1 / 6), bounds=[(0, 1)] * 6, constraints=constraints, tol=1e-14).x
    torch.testing.assert_close(solution.weights[0], torch.tensor(shortest), rtol=0, atol=1e-6)
    assert int(solution.effective_rank) == 3
    assert int(solution.tied) == 6
    assert not bool(solution.unique)


def test_unused_and_exact_vertices() -> None:
    differences, scale = stress("vertex")
    solution = simplex_qp(gram(differences), scale)
    assert torch.equal(solution.weights, torch.nn.functional.one_hot(torch.tensor([3] * 12), 9).double())
    assert solution.support.tolist() == [1] * 12
    assert bool(solution.unique.all())
    all_zero = simplex_qp(torch.zeros(2, 4, 4, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(all_zero.weights, uniform_weights(4, 2), rtol=0, atol=1e-15)
    assert all_zero.effective_rank.tolist() == [1, 1]
    assert bool(all_zero.converged.all())


def test_a_zero_target_is_not_a_division_by_zero() -> None:
    differences, _ = stress("random")
    solution = simplex_qp(gram(differences), torch.zeros(12, dtype=torch.float64))
    assert bool(solution.gap.isfinite().all())
    assert bool(solution.converged.all())


def test_what_float64_cannot_certify_is_reported() -> None:
    """Two centers at +-1e9 |t| and a combination of length |t|: the Gram matrix has lost it, and the mask must say so."""
    h = torch.tensor([[[1e18, -1e18], [-1e18, 1e18 + 3e3]]], dtype=torch.float64)
    solution = simplex_qp(h, torch.ones(1, dtype=torch.float64))
    assert bool((solution.weights >= 0).all())
    assert bool(solution.gap.isfinite().all())
    exceeded = solution.gap > ASKED * solution.objective.clamp_min(1)
    assert torch.equal(solution.converged, ~exceeded)
    strict = simplex_qp(gram(stress("mostly_huge")[0]), stress("mostly_huge")[1], tolerance=0.0)
    assert not bool(strict.converged.all())
    assert "0 converged" in repr(strict)


@pytest.mark.parametrize("n", [5, 20, 60])
def test_a_gram_matrix_with_negative_eigenvalues_by_rounding(n: int) -> None:
    """Differences in a space of three dimensions, and a Gram matrix that is 1e-9 below: it has no Cholesky factor."""
    differences = torch.randn(n, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.7
    h = gram(differences)
    h = h - 1e-9 * torch.diag_embed(h.diagonal(dim1=-2, dim2=-1))
    solution = simplex_qp(h, torch.ones(6, dtype=torch.float64))
    assert float(independent_gap(h, solution.weights).max()) <= AIMED


# --- properties -------------------------------------------------------------------------------------------------------

instances = st.tuples(st.sampled_from(KINDS), st.integers(0, 10_000))
quick = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@quick
@given(instances, st.randoms(use_true_random=False))
def test_permuting_centers_permutes_weights(instance: tuple[str, int], random: Random) -> None:
    differences, scale = stress(instance[0], problems=3, seed=instance[1])
    permutation = list(range(differences.shape[0]))
    random.shuffle(permutation)
    straight, permuted = (simplex_qp(gram(x), scale) for x in (differences, differences[permutation]))
    # H of nearly equal or cancelling centers differs by rounding when its rows are formed in another order
    torch.testing.assert_close(permuted.weights, straight.weights[:, permutation], rtol=0, atol=1e-5)
    assert torch.equal(permuted.support, straight.support)


@quick
@given(instances)
def test_no_vertex_nor_uniform_nor_random_weights_do_better(instance: tuple[str, int]) -> None:
    differences, scale = stress(instance[0], problems=3, seed=instance[1])
    n = differences.shape[0]
    h = gram(differences)
    solution = simplex_qp(h, scale)
    others = torch.cat(
        [uniform_weights(n, 1), torch.eye(n, dtype=torch.float64), torch.rand(20, n, dtype=torch.float64)]
    )
    others = others / others.sum(-1, keepdim=True)
    values = torch.einsum("wi,pij,wj->pw", others, h, others)
    # the certificate must cover the best of them, whatever it says
    assert bool((values.amin(-1) >= solution.objective - (solution.gap + 1e-12) * scale).all())
    assert bool((solution.objective <= values[:, 0] * (1 + 1e-12) + AIMED * scale).all())
    oracle = torch.tensor([nnls_objective(differences[:, p].numpy()) for p in range(3)], dtype=torch.float64)
    slack = 1e-11 * torch.maximum(scale, solution.objective)
    assert bool((solution.objective - oracle <= solution.gap * scale + slack).all())


# --- real instances ---------------------------------------------------------------------------------------------------


@cache
def stories() -> dict[str, Tensor]:
    """One forward pass of stories260K: the writes into the stream at 68 tokens, the final norm and the unembedding."""
    if not STORIES.exists():
        pytest.skip(f"stories260K is not at {STORIES}: real weights are tested in the project's own checkout only")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer, LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(STORIES, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    text = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog. "
        "One day, she saw a big red ball near the tree and wanted to take it home. Her mom said no, it is not yours, "
        "but Lily was very sad and began to cry."
    )
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :68]
    seen: dict[str, Tensor] = {}
    hooks = []
    for index, layer in enumerate(model.model.layers):
        project = layer.self_attn.o_proj
        hooks.append(project.register_forward_pre_hook(lambda _, args, i=index: seen.__setitem__(f"z{i}", args[0][0])))
        hooks.append(layer.mlp.register_forward_hook(lambda _, __, out, i=index: seen.__setitem__(f"mlp{i}", out[0])))
    hooks.append(model.model.embed_tokens.register_forward_hook(lambda _, __, out: seen.__setitem__("embed", out[0])))
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: seen.__setitem__("final", args[0][0])))
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    seen = {name: value.detach().double() for name, value in seen.items()}
    heads, mlps = [], []
    for index, layer in enumerate(model.model.layers):
        projection = layer.self_attn.o_proj.weight.detach().double()
        by_head = seen[f"z{index}"].unflatten(-1, (8, 8))
        heads.append(torch.einsum("phk,dhk->hpd", by_head, projection.unflatten(-1, (8, 8))))
        mlps.append(seen[f"mlp{index}"])
    sets = {
        "block": [seen["embed"], *(head.sum(0) + mlp for head, mlp in zip(heads, mlps, strict=True))],
        "sublayer": [
            seen["embed"],
            *(write for head, mlp in zip(heads, mlps, strict=True) for write in (head.sum(0), mlp)),
        ],
        "head": [seen["embed"], *(write for head, mlp in zip(heads, mlps, strict=True) for write in (*head, mlp))],
    }
    result = {name: torch.stack(centers) for name, centers in sets.items()}
    for centers in result.values():  # the writes add up to the stream that the final norm reads
        torch.testing.assert_close(centers.sum(0), seen["final"], rtol=1e-4, atol=1e-4)
    return result | {
        "final": seen["final"],
        "norm_weight": model.model.norm.weight.detach().double(),
        "unembed": model.lm_head.weight.detach().double(),
        "eps": torch.tensor(model.model.norm.variance_epsilon, dtype=torch.float64),
    }


def rms_norm_jet(center: Tensor, variate: Tensor, weight: Tensor, eps: Tensor, order: int) -> Tensor:
    """J^k of the final norm by the recurrence of DESIGN section 2: s_k w x + (s_0 + ... + s_{k-1}) w y."""
    v = variate - center
    a, b, c = center.square().mean(-1) + eps, (center * v).mean(-1), v.square().mean(-1)
    s = [a.rsqrt()]
    for k in range(1, order + 1):
        before = s[k - 2] if k > 1 else torch.zeros_like(a)
        s.append((-(2 * k - 1) * b * s[k - 1] - (k - 1) * c * before) / (k * a))
    alpha, beta = s[order], sum(s[:order], torch.zeros_like(a))
    return weight * (alpha[..., None] * center + beta[..., None] * variate)


def stories_instance(centers: str, order: int, centered: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Differences [n, 68, 64], scale and metric at the final norm."""
    data = stories()
    y, weight, eps = data["final"], data["norm_weight"], data["eps"]
    terms = rms_norm_jet(data[centers], y.expand_as(data[centers]), weight, eps, order)
    target = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    unembed = data["unembed"] - data["unembed"].mean(0) * centered
    metric = unembed.T @ unembed
    return terms - target, ((target @ metric) * target).sum(-1), metric


@pytest.mark.parametrize("centers", ["block", "sublayer", "head"])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("centered", [False, True])
def test_qp_on_a_trained_model(centers: str, order: int, centered: bool) -> None:
    differences, scale, metric = stories_instance(centers, order, centered)
    h = gram(differences, metric)
    solution = simplex_qp(h, scale)
    assert bool(solution.converged.all()), solution
    assert float(solution.gap.max()) <= ASKED
    assert float((independent_gap(h, solution.weights) / scale).max()) <= ASKED
    # the same distances by explicit logits, so that the oracle shares no Gram matrix
    root = torch.linalg.cholesky(metric + 1e-13 * metric.diagonal().mean() * torch.eye(64, dtype=torch.float64))
    logits = differences @ root
    own = torch.einsum("npd,pn->pd", logits, solution.weights).square().sum(-1)
    some = range(0, 68, 7 if centers == "head" else 3)
    oracle = torch.tensor([nnls_objective(logits[:, p].numpy()) for p in some], dtype=torch.float64)
    assert float(((own[list(some)] - oracle) / scale[list(some)]).abs().max()) <= ASKED


# --- KL ---------------------------------------------------------------------------------------------------------------


def kl(weights: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """logits [n, p, v], weights [p, n]: nats."""
    mixed = torch.einsum("npv,pn->pv", logits.double(), weights).log_softmax(-1)
    return (target.double().exp() * (target.double() - mixed)).sum(-1)


def independent_kl_gap(weights: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """By autograd, not by the formula for the gradient."""
    w = weights.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kl(w, logits, target).sum(), w)
    return (gradient * weights).sum(-1) - gradient.amin(-1)


def lbfgs_kl(logits: Tensor, target: Tensor, start: Tensor) -> float:
    """Softmax-parametrized L-BFGS for one problem, logits [n, v], from a start and from random ones."""
    best = np.inf
    for seed in range(2):
        noise = torch.randn(start.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        first = (0.5 * start + 0.5 / len(start)).log() + (seed > 0) * noise

        def fun(theta: np.ndarray) -> tuple[float, np.ndarray]:
            t = torch.tensor(theta, requires_grad=True)
            value = kl(t.softmax(-1)[None], logits[:, None], target[None]).sum()
            (gradient,) = torch.autograd.grad(value, t)
            return float(value.detach()), gradient.numpy()

        result = minimize(
            fun, first.numpy(), jac=True, method="L-BFGS-B", options={"maxiter": 1500, "ftol": 1e-15, "gtol": 1e-10}
        )
        best = min(best, float(result.fun))
    return best


def kl_instance(kind: str, problems: int = 5, vocab: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    n = {"single": 1, "many": 20}.get(kind, 6)
    logits = 2 * torch.randn(n, problems, vocab, generator=draw, dtype=torch.float64)
    target = (2 * torch.randn(problems, vocab, generator=draw, dtype=torch.float64)).log_softmax(-1)
    if kind == "huge":
        logits[1:] *= 10 ** (1 + 5 * torch.rand(n - 1, problems, 1, generator=draw, dtype=torch.float64))
    elif kind == "far":
        logits *= 30
    elif kind == "exact":
        logits[0] = 3 * target - logits[1] - logits[2]
    elif kind == "vertex":
        logits[2] = target + 5.0
    elif kind == "duplicates":
        logits[3:] = logits[:3]
    elif kind == "zeros":
        logits[1:3] = 0
    elif kind == "peaked":
        target = (30 * target).log_softmax(-1)
    return logits, target


KL_KINDS = ["random", "huge", "far", "exact", "vertex", "duplicates", "zeros", "single", "many", "peaked"]


@pytest.mark.parametrize("kind", KL_KINDS)
def test_kl_agrees_with_lbfgs(kind: str) -> None:
    logits, target = kl_instance(kind)
    solution = simplex_kl(logits, target)
    weights = solution.weights
    assert bool(solution.converged.all()), solution
    assert float(solution.gap.max()) <= ASKED
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(independent_kl_gap(weights, logits, target).max()) <= ASKED + 1e-9
    torch.testing.assert_close(solution.objective, kl(weights, logits, target), rtol=1e-9, atol=1e-12)
    for p in range(2):
        oracle = lbfgs_kl(logits[:, p], target[p], weights[p])
        # the gap covers whatever the oracle finds; and a good oracle finds no worse than 1e-4
        assert -1e-4 - 1e-4 * oracle <= float(solution.objective[p]) - oracle <= ASKED
    uniform = kl(uniform_weights(logits.shape[0], 5), logits, target)
    assert bool((solution.objective <= uniform + ASKED).all())


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("centers", ["block", "sublayer", "head"])
def test_kl_on_a_trained_model(centers: str, order: int) -> None:
    differences, _, _ = stories_instance(centers, order, centered=False)
    data = stories()
    tokens = slice(0, 68, 12 if centers == "head" else 6)
    y = data["final"][tokens]
    target = (y * (y.square().mean(-1, keepdim=True) + data["eps"]).rsqrt() * data["norm_weight"]) @ data["unembed"].T
    logits = differences[:, tokens] @ data["unembed"].T + target
    solution = simplex_kl(logits, target.log_softmax(-1))
    assert bool(solution.converged.all()), solution
    assert float(independent_kl_gap(solution.weights, logits, target.log_softmax(-1)).max()) <= ASKED + 1e-8
    # the start is the l2 optimum: the KL weights are at least as good
    centered = logits - logits.mean(-1, keepdim=True)
    aim = target - target.mean(-1, keepdim=True)
    l2 = simplex_qp(gram(centered - aim), aim.square().sum(-1)).weights
    assert bool((solution.objective <= kl(l2, logits, target.log_softmax(-1)) + ASKED).all())


def test_kl_problems_are_solved_one_by_one() -> None:
    logits, target = kl_instance("random", problems=11)
    whole = simplex_kl(logits, target)
    parts = [simplex_kl(part, aim) for part, aim in zip(logits.split(4, 1), target.split(4), strict=True)]
    torch.testing.assert_close(simplex.SimplexSolution.cat(parts).weights, whole.weights, rtol=0, atol=1e-12)
    assert whole.gap_unit == "nats"
    assert "nats" in repr(whole)
    assert simplex_kl(logits[:, :0], target[:0]).weights.shape == (0, 6)


def test_kl_takes_the_models_precision() -> None:
    logits, target = kl_instance("random")
    single = simplex_kl(logits.float(), target.float())
    assert single.weights.dtype == torch.float64
    assert bool(single.converged.all())
    double = simplex_kl(logits, target)
    torch.testing.assert_close(single.objective, double.objective, rtol=0, atol=1e-4)


def test_kl_is_told_apart_from_l2_and_ranks_are_those_of_the_hessian() -> None:
    logits, target = kl_instance("duplicates")
    solution = simplex_kl(logits, target)
    # The objective is certified to 1e-6 nats; how copies share a weight changes it not at all, and their minimum-norm share
    # is known to the square root of that.
    torch.testing.assert_close(solution.weights[:, 3:], solution.weights[:, :3], rtol=2e-3, atol=2e-4)
    assert not bool(solution.unique.any())
    assert bool(simplex_kl(logits[:3], target).unique.all())


def test_kl_gap_bounds_what_no_digits_are_left_for() -> None:
    """Every center's logits spread over thousands of nats: LP-like, q one-hot. Certified or not, the gap must be the gap."""
    logits, target = kl_instance("random", problems=3)
    solution = simplex_kl(1e3 * logits, target)
    assert bool(solution.gap.isfinite().all())
    assert float(solution.gap.max()) < 1e-3 * float(solution.objective.max())
    gap = independent_kl_gap(solution.weights, 1e3 * logits, target)
    torch.testing.assert_close(solution.gap, gap, rtol=1e-2, atol=1e-5)
    assert torch.equal(solution.converged, solution.gap <= ASKED * solution.objective.clamp_min(1))


def test_kl_reports_what_it_did_not_reach() -> None:
    logits, target = kl_instance("random")
    solution = simplex_kl(logits, target, max_iterations=1)
    assert not bool(solution.converged.any())
    assert bool((independent_kl_gap(solution.weights, logits, target) <= solution.gap + 1e-9).all())


# --- weights that someone gives ---------------------------------------------------------------------------------------


# unwrap() takes off the run-time shape checks of the test session, which users do not have


def test_uniform_weights() -> None:
    weights = uniform_weights(4, 2, 3, dtype=torch.float32)
    assert weights.shape == (2, 3, 4)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, torch.full((2, 3, 4), 0.25))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_good_weights_come_back_as_they_are(dtype: torch.dtype) -> None:
    weights = torch.rand(5, 7).softmax(0).to(dtype)
    assert read_weights(weights, 5) is weights
    assert torch.equal(read_weights([0.5, 0.25, 0.25], 3), torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64))


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.tensor([1, 0, 0]), TypeError, "got torch.int64"),
        (torch.tensor(1.0), ValueError, r"one entry a center on the first axis \(3\); got shape \(\)"),
        ([0.5, 0.5], ValueError, r"first axis \(3\); got shape \(2,\)"),
        (torch.full((4, 3), 1 / 3), ValueError, r"first axis \(3\); got shape \(4, 3\)"),
        ([0.5, float("nan"), 0.5], ValueError, "finite; got 1 that are not"),
        (torch.tensor([0.75, -0.25, 0.5]), ValueError, "non-negative; got a smallest of -0.25"),
        (torch.tensor([0.5, 0.5, 0.5]), ValueError, "sum to 1 over the centers; got a sum of 1.5"),
    ],
)
def test_bad_weights_are_refused(weights: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        unwrap(read_weights)(weights, 3)


@pytest.mark.parametrize("off", [2e-6, -2e-6, 1e-3, 0.05])
def test_weights_sum_to_one_up_to_a_millionth(off: float) -> None:
    """What the weights miss goes straight into the result; only rounding may be off."""
    weights = torch.tensor([0.5, 0.25, 0.25 + off], dtype=torch.float64)
    for refused in (weights, weights[:, None, None].expand(3, 2, 4), weights.tolist()):
        with pytest.raises(ValueError, match="sum to 1 over the centers"):
            read_weights(refused, 3)
    one_of_many = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)[:, None].repeat(1, 4)
    assert read_weights(one_of_many, 3) is one_of_many
    one_of_many[0, 2] += off
    with pytest.raises(ValueError, match=f"got a sum of {1 + off:.6g}"):
        read_weights(one_of_many, 3)
    weights[2] = 0.25 + 5e-7
    assert read_weights(weights, 3) is weights


def test_problems_that_are_not_finite_are_refused() -> None:
    gram_of_nan = torch.eye(3, dtype=torch.float64).expand(2, 3, 3).clone()
    gram_of_nan[1, 2, 1] = torch.nan
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="must be finite"):
            simplex_qp(gram_of_nan.nan_to_num(nan=value), torch.ones(2, dtype=torch.float64))
        logits, target = kl_instance("random")
        logits[1, 2, 3] = value
        with pytest.raises(ValueError, match="must be finite"):
            simplex_kl(logits, target)
