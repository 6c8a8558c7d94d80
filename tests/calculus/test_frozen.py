"""The mode that freezes scales, patterns and gates, against frozen maps written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracles import relative_error
from torch import Tensor, nn

from tl_jets.calculus import full_precision, jet
from tl_jets.calculus.frozen import frozen

TOLERANCE = 1e-12
Function = Callable[[Tensor], Tensor]


def randn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = randn(3, 4, seed=1)
A, B = randn(4, 5, seed=2), randn(4, 5, seed=4)
W, b = randn(4, seed=5), randn(4, seed=6)


def reverse(f: Function, x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(f, x)


def batched(f: Function, x: Tensor) -> Tensor:
    """Reverse differentiation in one batched backward pass."""
    x = x.detach().requires_grad_()
    y = f(x)
    units = torch.eye(y.numel(), dtype=x.dtype).view(-1, *y.shape)
    (rows,) = torch.autograd.grad(y, x, units, is_grads_batched=True)
    return rows.view(*y.shape, *x.shape)


TRANSFORMS = [reverse, batched, torch.func.jacrev, torch.func.jacfwd]


def jacobian(transform: Callable, f: Function, x: Tensor) -> Tensor:
    with frozen():
        if transform in (torch.func.jacrev, torch.func.jacfwd):
            return transform(f)(x)
        return transform(f, x)


def diagonal(values: Tensor) -> Tensor:
    """The Jacobian of an elementwise multiplication."""
    return torch.diag(values.flatten()).view(*values.shape, *values.shape)


# Every way to write an activation: its code, and its value by a formula.
def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


SILU = lambda x: x / (1 + torch.exp(-x))  # noqa: E731
GELU = lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2  # noqa: E731
ACTIVATIONS: dict[str, tuple[Function, Function]] = {
    "silu": (F.silu, SILU),
    "silu, nn": (nn.SiLU(), SILU),
    "silu, in place": (lambda x: F.silu(x.clone(), inplace=True), SILU),
    "x sigmoid(x)": (lambda x: x * torch.sigmoid(x), SILU),
    "sigmoid(x) x": (lambda x: x.sigmoid().mul(x), SILU),
    "x / (1 + exp(-x))": (SILU, SILU),
    "x (1 / (1 + exp(-x)))": (lambda x: x * (1 / (1 + (-x).exp())), SILU),
    "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), lambda x: x / (1 + torch.exp(-1.702 * x))),
    "gelu": (F.gelu, GELU),
    "gelu, erf": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2))), GELU),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), gelu_tanh),
    "gelu, written": (gelu_tanh, gelu_tanh),
    "gelu, other order": (
        lambda x: (torch.tanh(x * 0.7978845608028654 * (1 + 0.044715 * x * x)) + 1.0) * (0.5 * x),
        gelu_tanh,
    ),
    "gelu, in float32 and back": (lambda x: F.gelu(x.to(torch.float64)).type_as(x), GELU),
    "relu": (F.relu, lambda x: x * (x > 0)),
    "relu, in place": (lambda x: x.clone().relu_(), lambda x: x * (x > 0)),
    "relu, clamp": (lambda x: x.clamp(min=0), lambda x: x * (x > 0)),
    "relu squared": (lambda x: F.relu(x) ** 2, lambda x: x * x * (x > 0)),
    "relu times itself": (lambda x: (lambda r: r * r)(F.relu(x)), lambda x: x * x * (x > 0)),
    "relu, torch.square": (lambda x: torch.square(F.relu(x)), lambda x: x * x * (x > 0)),
    "leaky relu": (lambda x: F.leaky_relu(x, 0.1), lambda x: x * (0.1 + 0.9 * (x > 0).double())),
    "mish": (lambda x: x * torch.tanh(F.softplus(x)), lambda x: x * torch.tanh(torch.log(1 + torch.exp(x)))),
    "tanh": (torch.tanh, lambda x: 1 - 2 / (1 + torch.exp(2 * x))),
    "softcap": (lambda x: 3.0 * torch.tanh(x / 3.0), lambda x: 3 - 6 / (1 + torch.exp(2 * x / 3))),
    "solu": (lambda x: x * x.softmax(-1), lambda x: x * torch.exp(x) / torch.exp(x).sum(-1, keepdim=True)),
    "hardtanh": (
        lambda x: torch.clamp(x, -0.7, 0.7),
        lambda x: x.sign() * torch.minimum(x.abs(), torch.full_like(x, 0.7)),
    ),
}
GATED = [name for name in ACTIVATIONS if name not in ("tanh", "softcap", "hardtanh")]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_its_slope(name, transform):
    act, formula = ACTIVATIONS[name]
    assert relative_error(jacobian(transform, act, X), diagonal(formula(X) / X)) < TOLERANCE
    with frozen():
        assert torch.equal(act(X), act(X.clone().requires_grad_()))
        inside = act(X)
    assert torch.equal(inside, act(X))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("order", ["act first", "act second"])
def test_a_gate_is_frozen_as_a_whole(name, transform, order):
    act, formula = ACTIVATIONS[name]

    def mlp(x: Tensor) -> Tensor:
        gate, up = act(x @ A), x @ B
        return gate * up if order == "act first" else up * gate

    expected = torch.einsum("tm,tu,dm->tmud", formula(X @ A), torch.eye(3, dtype=X.dtype), B)
    assert relative_error(jacobian(transform, mlp, X), expected) < TOLERANCE
    with frozen():
        assert torch.equal(mlp(X.clone().requires_grad_()).detach(), mlp(X))


@pytest.mark.parametrize("name", ["gelu", "gelu, written", "silu", "x sigmoid(x)", "relu", "leaky relu", "tanh"])
def test_the_slope_at_zero_is_the_derivative_there(name):
    act = ACTIVATIONS[name][0]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.tensor([0.0, -0.0, 1.0, torch.finfo(dtype).tiny], dtype=dtype)
        expected = torch.autograd.functional.jacobian(act, x).diagonal()[:2]
        found = jacobian(reverse, act, x).diagonal()
        assert relative_error(found[:2].double(), expected.double()) < 1e-6
        assert found.isfinite().all()


# Norms --------------------------------------------------------------------------------------------------------------

LAYER_NORMS: dict[str, Function] = {
    "fused": lambda x: F.layer_norm(x, (4,), W, b, 1e-3),
    "keywords": lambda x: torch.layer_norm(input=x, normalized_shape=(4,), weight=W, bias=b, eps=1e-3),
    "rsqrt": lambda x: (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 1e-3) * W + b,
    "sqrt": lambda x: (c := x - x.mean(-1, keepdim=True)) / (c.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * W + b,
    "pow": lambda x: (c := x - x.mean(-1, True)) * (c.square().mean(-1, True) + 1e-3).pow(-0.5) * W + b,
    "in place": lambda x: (x - x.mean(-1, True)).div_((x.var(-1, correction=0, keepdim=True) + 1e-3) ** 0.5) * W + b,
}
RMS_NORMS: dict[str, Function] = {
    "fused": lambda x: F.rms_norm(x, (4,), W, 1e-3),
    "rsqrt": lambda x: W * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)),
    "one plus weight": lambda x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-3) * (1.0 + (W - 1)),
    "reciprocal": lambda x: x * (1 / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-3)) * W,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("precise", [False, True], ids=["plain", "full precision"])
@pytest.mark.parametrize("name", [f"LN {name}" for name in LAYER_NORMS] + [f"RMS {name}" for name in RMS_NORMS])
def test_a_norm_is_linear_at_its_scale(name, transform, precise):
    kind, way = name.split(" ", 1)
    norm = (LAYER_NORMS if kind == "LN" else RMS_NORMS)[way]
    center = torch.eye(4, dtype=X.dtype) - (0.25 if kind == "LN" else 0)
    scale = ((X @ center).square().mean(-1) + 1e-3) ** -0.5
    expected = torch.einsum("t,tu,i,ij->tiuj", scale, torch.eye(3, dtype=X.dtype), W, center)

    def precisely(x: Tensor) -> Tensor:
        with full_precision():
            return norm(x)

    f = precisely if precise else norm
    assert relative_error(jacobian(transform, f, X), expected) < TOLERANCE
    with full_precision():
        assert relative_error(jacobian(transform, norm, X), expected) < TOLERANCE
    with frozen():
        assert torch.equal(norm(X.clone().requires_grad_()).detach(), norm(X))


def test_a_parameter_is_no_gate():
    """The weight of a norm after SoLU, or of a gate per neuron, is a constant even where it is trained."""
    weight = nn.Parameter(randn(3, 4, seed=9))
    expected = diagonal(GELU(X) / X * weight.detach())
    assert relative_error(jacobian(reverse, lambda x: F.gelu(x) * weight, X), expected) < TOLERANCE
    assert relative_error(jacobian(reverse, lambda x: torch.mul(weight, other=F.gelu(x)), X), expected) < TOLERANCE


def test_a_mask_is_no_gate():
    mask = (randn(3, 4, seed=8) > 0).double()
    for transform in TRANSFORMS:
        found = jacobian(transform, lambda x: F.gelu(x) * mask, X)
        assert relative_error(found, diagonal(GELU(X) / X * mask)) < TOLERANCE


def test_an_activation_that_a_hook_edits_stays_a_gate():
    def mlp(x: Tensor) -> Tensor:
        gate = F.silu(x @ A).clone()
        gate[:, 2] = 0
        gate = 2 * gate.view(3, 5).contiguous() + 1
        return gate * (x @ B)

    gate = 2 * SILU(X @ A)
    gate[:, 2] = 0
    expected = torch.einsum("tm,tu,dm->tmud", gate + 1, torch.eye(3, dtype=X.dtype), B)
    for transform in TRANSFORMS[:3]:
        assert relative_error(jacobian(transform, mlp, X), expected) < TOLERANCE


# Attention ----------------------------------------------------------------------------------------------------------

Q, K, V = randn(4, 4, seed=11), randn(4, 4, seed=12), randn(4, 4, seed=13)
MASK = torch.ones(3, 3, dtype=torch.bool).tril()


def scores(x: Tensor) -> Tensor:
    return ((x @ Q) @ (x @ K).T / 2).masked_fill(~MASK, -torch.inf)


ATTENTIONS: dict[str, Function] = {
    "softmax": lambda x: scores(x).softmax(-1) @ (x @ V),
    "written": lambda x: (lambda e: e / e.sum(-1, keepdim=True))(torch.exp(scores(x))) @ (x @ V),
    "fused": lambda x: F.scaled_dot_product_attention((x @ Q)[None], (x @ K)[None], (x @ V)[None], MASK)[0],
    "fused, keywords": lambda x: F.scaled_dot_product_attention(
        query=(x @ Q)[None], key=(x @ K)[None], value=(x @ V)[None], is_causal=True
    )[0],
}


@pytest.mark.parametrize("transform", [reverse, batched, torch.func.jacrev, torch.func.jacfwd])
@pytest.mark.parametrize("way", ATTENTIONS)
def test_attention_is_linear_at_its_pattern(way, transform):
    exponentials = torch.exp(((X @ Q) @ (X @ K).T) / 2) * MASK
    pattern = exponentials / exponentials.sum(-1, keepdim=True)
    expected = torch.einsum("qk,de->qekd", pattern, V)

    def attention(x: Tensor) -> Tensor:
        with full_precision():
            return ATTENTIONS[way](x)

    assert relative_error(jacobian(transform, attention, X), expected) < TOLERANCE
    with frozen():
        assert torch.equal(attention(X.clone().requires_grad_()).detach(), attention(X))


def test_the_score_softcap_is_inside_the_pattern():
    f = lambda x: (2 * torch.tanh(x @ Q @ (x @ K).T / 2)).softmax(-1) @ (x @ V)  # noqa: E731
    exponentials = torch.exp(2 * torch.tanh(X @ Q @ (X @ K).T / 2))
    expected = torch.einsum("qk,de->qekd", exponentials / exponentials.sum(-1, keepdim=True), V)
    assert relative_error(jacobian(reverse, f, X), expected) < TOLERANCE


# A block ------------------------------------------------------------------------------------------------------------


def block(x: Tensor) -> Tensor:
    x = x + ATTENTIONS["softmax"](LAYER_NORMS["fused"](x))
    y = RMS_NORMS["rsqrt"](x)
    return x + (F.silu(y @ A) * (y @ B)) @ B.T + GELU(y @ A + 0.3) @ A.T


def test_the_replay_is_an_affine_map_with_that_derivative():
    tape: list = []
    x = X.clone().requires_grad_()
    with frozen(record=tape):
        y = block(x)
    assert torch.equal(y, block(X))

    def replay(z: Tensor) -> Tensor:
        with torch.no_grad(), frozen(replay=tape):
            return block(z)

    other, bias = randn(3, 4, seed=21), replay(torch.zeros_like(X))
    assert relative_error(replay(X), y.detach()) < TOLERANCE
    assert relative_error(replay(other + 2 * X), replay(other) + 2 * replay(X) - 2 * bias) < TOLERANCE
    matrix = jacobian(reverse, block, X)
    assert relative_error(torch.einsum("tiuj,uj->ti", matrix, other) + bias, replay(other)) < TOLERANCE
    assert relative_error(torch.einsum("tiuj,uj->ti", matrix, X) + bias, y.detach()) < TOLERANCE
    ordinary = torch.autograd.functional.jacobian(block, X)
    assert relative_error(torch.einsum("tiuj,uj->ti", ordinary, X) + bias, y.detach()) > 0.1


def test_a_replay_of_other_calls_is_refused():
    tape: list = []
    with frozen(record=tape):
        block(X.clone().requires_grad_())
    with frozen(replay=tape), pytest.raises(RuntimeError, match="recorded calls in their order"):
        torch.tanh(X)
    with frozen(replay=tape), pytest.raises(RuntimeError, match="'the end' was recorded"):
        block(block(X))
    with pytest.raises(ValueError, match="recorded or replayed"):
        frozen(record=[], replay=tape)


def test_series_are_left_alone():
    y = randn(3, 4, seed=30)
    expected = jet(block, X, y, order=2).coefficients
    with frozen():
        found = jet(block, X, y, order=2).coefficients
    assert torch.equal(found, expected)


def test_it_ends_with_its_block_and_on_errors():
    expected = torch.autograd.functional.jacobian(block, X)
    with pytest.raises(KeyError), frozen():
        raise KeyError
    assert torch.equal(torch.autograd.functional.jacobian(block, X), expected)
    with frozen():
        assert relative_error(torch.autograd.functional.jacobian(block, X), expected) > 0.1


def ends(low: float | None, high: float | None) -> tuple[float, float]:
    return -math.inf if low is None else low, math.inf if high is None else high


@pytest.mark.parametrize("bounds", [(0, None), (None, 0), (-0.7, 0.4), (None, 0.4), (-0.4, None), (0, 0.4), (0.0, 3)])
def test_a_clamp_around_zero_is_its_slope(bounds):
    (low, high), x = ends(*bounds), X
    expected = diagonal(torch.where(x < low, low / x, torch.where(x > high, high / x, 1.0)))
    for act in (lambda x: torch.clamp(x, *bounds), lambda x: x.clip(min=bounds[0], max=bounds[1])):
        assert relative_error(jacobian(reverse, act, X), expected) < TOLERANCE


@pytest.mark.parametrize("bounds", [(None, -0.3), (0.3, None), (0.2, 0.5), (-0.5, -0.2), (1e-3, 3), (-3, -1e-3)])
def test_a_clamp_away_from_zero_is_left_alone(bounds):
    """Zero is no fixed point of it: as a slope it would be no map through zero. It is differentiated as it is."""
    (low, high), x = ends(*bounds), X
    inside = (x > low) & (x < high)
    for act in (lambda x: torch.clamp(x, *bounds), lambda x: x.clip(min=bounds[0], max=bounds[1])):
        assert relative_error(jacobian(reverse, act, X), diagonal(inside.double())) < TOLERANCE


ROOTS: dict[str, Function] = {
    "pow 0.5": lambda v: v.pow(0.5),
    "pow -0.5": lambda v: v ** (-0.5),
    "pow -1": lambda v: torch.pow(v, -1),
    "pow by a tensor": lambda v: v ** torch.tensor(0.5, dtype=torch.float64),
    "pow by name": lambda v: torch.pow(v, exponent=-0.5),
    "float_power": lambda v: torch.float_power(v, 0.5),
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
}


@pytest.mark.parametrize("name", ROOTS)
def test_every_way_to_write_a_scale_is_frozen(name):
    """A norm's scale, by which a stream is multiplied: a constant, whatever the root is called."""
    root = ROOTS[name]
    scale = root(X.square().mean(-1, keepdim=True) + 0.1)
    found = jacobian(reverse, lambda x: x * root(x.square().mean(-1, keepdim=True) + 0.1), X)
    assert relative_error(found, diagonal(scale.expand_as(X))) < TOLERANCE


def test_thresholds_and_the_largest_entries_are_those_of_the_running_point():
    """A replay at another point, where other entries pass, is the linear map of the recorded ones."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 9, generator=draw, dtype=torch.float64)
    for f, kept in (
        (lambda x: x * (x > 0.5), x > 0.5),
        (lambda x: x.masked_fill(x <= 0.5, 0), x > 0.5),
        (
            lambda x: torch.zeros_like(x).scatter(-1, x.topk(4).indices, 1.0) * x,
            torch.zeros(3, 9).scatter(-1, x.topk(4).indices, 1) > 0,
        ),
        (
            lambda x: torch.zeros_like(x).scatter(1, *reversed(x.topk(k=4, dim=1))),
            torch.zeros(3, 9).scatter(-1, x.topk(4).indices, 1) > 0,
        ),
    ):
        tape: list = []
        with frozen(record=tape):
            assert torch.equal(f(x), x * kept)
        with frozen(replay=tape):
            assert torch.equal(f(y), y * kept)
        assert not torch.equal(f(y), y * kept)
