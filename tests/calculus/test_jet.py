"""Jets of functions: exactness on polynomials, the algebra of jets, convergence, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    attention,
    compose,
    contour_coefficients,
    convergence_slope,
    layer_norm,
    nested_jvp_coefficients,
    relative_error,
)
from torch import Tensor, nn

from tl_jets.calculus import Jet, Series, jet

TOLERANCE = 1e-10


def randn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = randn(2, 3, 4, seed=1), randn(2, 3, 4, seed=2)
W_Q, W_K, W_V, W_O = (randn(4, 4, seed=10 + i) / 2 for i in range(4))
GAIN, BIAS = randn(4, seed=20), randn(4, seed=21)
ALLOWED = torch.ones(3, 3, dtype=torch.bool).tril()


def sublayer(x: Tensor) -> Tensor:
    """An attention sublayer as models write it."""
    x = F.layer_norm(x, (4,), GAIN, BIAS, 1e-2)
    scores = torch.einsum("bqd,bkd->bqk", x @ W_Q, x @ W_K) / 2
    pattern = scores.masked_fill(~ALLOWED, -math.inf).softmax(-1)
    return F.gelu(pattern @ (x @ W_V) @ W_O, approximate="tanh")


def sublayer_by_hand(x: Tensor) -> Tensor:
    x = layer_norm(x, GAIN, BIAS, 1e-2)
    out = attention(x @ W_Q.to(x.dtype), x @ W_K.to(x.dtype), x @ W_V.to(x.dtype), ALLOWED) @ W_O.to(x.dtype)
    return 0.5 * out * (1 + torch.tanh(math.sqrt(2 / math.pi) * (out + 0.044715 * out**3)))


@pytest.mark.parametrize("degree", range(7))
def test_a_polynomial_is_its_own_jet_at_its_degree(degree):
    def polynomial(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for i in range(degree + 1):
            total = total + (i - 2.5) * x**i
        return total @ W_Q

    value = jet(polynomial, X, Y, degree).value
    assert relative_error(value, polynomial(Y)) < TOLERANCE
    if degree > 1:
        below = jet(polynomial, X, Y, degree - 1).value
        assert relative_error(below, polynomial(Y)) > 1e-3


@pytest.mark.parametrize("order", range(7))
def test_a_sublayer_against_two_oracles(order):
    found = jet(sublayer, X, X + 0.3 * (Y - X), order).coefficients
    line = torch.stack([X, 0.3 * (Y - X)])
    assert relative_error(found, contour_coefficients(sublayer_by_hand, line, order, points=64)) < TOLERANCE
    if order <= 3:
        nested = nested_jvp_coefficients(sublayer_by_hand, X, 0.3 * (Y - X), order)
        assert relative_error(found, nested) < TOLERANCE


@pytest.mark.parametrize("order", range(5))
def test_the_error_decays_with_one_more_power_than_the_order(order):
    slope = convergence_slope(sublayer, lambda y: jet(sublayer, X, y, order).value, X, X + 0.2 * (Y - X))
    assert slope == pytest.approx(order + 1, abs=0.25)


def test_the_first_two_coefficients_by_finite_differences():
    v, step = Y - X, 1e-4
    found = jet(sublayer, X, Y, 2).coefficients
    ahead, behind = sublayer(X + step * v), sublayer(X - step * v)
    assert relative_error(found[1], (ahead - behind) / (2 * step)) < 1e-6
    assert relative_error(found[2], (ahead - 2 * sublayer(X) + behind) / (2 * step**2)) < 1e-5


def test_partial_sums_and_value():
    found = jet(sublayer, X, Y, 3)
    assert found.order == 3
    assert found.partial_sums.shape == found.coefficients.shape == (4, 2, 3, 4)
    for k in range(4):
        assert relative_error(found.partial_sums[k], jet(sublayer, X, Y, k).value) < TOLERANCE
    assert relative_error(found.value, found.partial_sums[-1]) < TOLERANCE
    assert torch.equal(jet(sublayer, X, Y, 0).value, sublayer(X))
    assert repr(found) == "Jet(order=3, out=[2, 3, 4], dtype=torch.float64)"


def test_a_jet_at_its_own_center_is_the_function():
    found = jet(sublayer, X, X, 4).coefficients
    assert relative_error(found[0], sublayer(X)) < TOLERANCE
    assert found[1:].abs().max() == 0


# The algebra of jets. -----------------------------------------------------------------------------------------------

FUNCTIONS = {
    "tanh": torch.tanh,
    "exp": torch.exp,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "sin": torch.sin,
    "square": torch.square,
}
numbers = st.floats(-1.5, 1.5, allow_nan=False, width=32)
points = st.lists(numbers, min_size=3, max_size=3).map(lambda values: torch.tensor(values, dtype=torch.float64))
names = st.sampled_from(sorted(FUNCTIONS))
orders = st.integers(0, 6)


@settings(max_examples=25, deadline=None)
@given(names, names, points, points, orders, numbers, numbers)
def test_jets_are_linear(f, g, x, y, order, a, b):
    f, g = FUNCTIONS[f], FUNCTIONS[g]
    together = jet(lambda t: a * f(t) + b * g(t), x, y, order).coefficients
    apart = a * jet(f, x, y, order).coefficients + b * jet(g, x, y, order).coefficients
    assert relative_error(together, apart) < TOLERANCE


@settings(max_examples=25, deadline=None)
@given(names, names, points, points, orders)
def test_the_jet_of_a_product_is_the_truncated_product(f, g, x, y, order):
    f, g = FUNCTIONS[f], FUNCTIONS[g]
    together = jet(lambda t: f(t) * g(t), x, y, order).coefficients
    a, b = jet(f, x, y, order).coefficients, jet(g, x, y, order).coefficients
    apart = torch.stack([sum(a[i] * b[n - i] for i in range(n + 1)) for n in range(order + 1)])
    assert relative_error(together, apart) < TOLERANCE


@settings(max_examples=25, deadline=None)
@given(names, names, points, points, orders)
def test_the_jet_of_a_composition_is_the_truncated_substitution(f, g, x, y, order):
    f, g = FUNCTIONS[f], FUNCTIONS[g]
    together = jet(lambda t: g(f(t)), x, y, order).coefficients
    inner = jet(f, x, y, order).coefficients
    outer = jet(g, inner[0], inner[0] + 1, order).coefficients
    assert relative_error(together, compose(outer, inner)) < TOLERANCE


@settings(max_examples=15, deadline=None)
@given(points, points, orders)
def test_identities_between_functions(x, y, order):
    def coefficients(f):
        return jet(f, x, y, order).coefficients

    line = coefficients(lambda t: t)
    one = torch.zeros_like(line)
    one[0] = 1
    assert relative_error(coefficients(lambda t: torch.log(torch.exp(t))), line) < TOLERANCE
    assert relative_error(coefficients(lambda t: torch.sin(t) ** 2 + torch.cos(t) ** 2), one) < TOLERANCE
    assert relative_error(coefficients(lambda t: torch.erf(t) + torch.erfc(t)), one) < TOLERANCE
    assert relative_error(coefficients(lambda t: torch.sigmoid(t) + torch.sigmoid(-t)), one) < TOLERANCE
    assert relative_error(coefficients(lambda t: (t * t + 1).sqrt() * (t * t + 1).rsqrt()), one) < TOLERANCE
    assert relative_error(coefficients(lambda t: F.softmax(t, 0).sum().expand(3)), one) < TOLERANCE


# What f may be, and where. ------------------------------------------------------------------------------------------


def test_a_constant_function():
    found = jet(lambda x: W_Q, X, Y, 2)
    assert torch.equal(found.coefficients[0], W_Q)
    assert torch.equal(found.coefficients[1:], torch.zeros(2, 4, 4, dtype=torch.float64))
    found.coefficients.zero_()
    assert W_Q.abs().sum() > 0


def test_the_identity_shares_nothing_with_its_argument():
    center = X.clone()
    for order in (0, 1):
        jet(lambda x: x, center, Y, order).coefficients.zero_()
        jet(lambda x: x.zero_(), center, Y, order)
    assert torch.equal(center, X)


def test_modules_whose_weights_require_gradients():
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 4)).double()
    center = X.clone().requires_grad_()
    found = jet(module, center, Y, 2).coefficients
    assert not found.requires_grad
    weights = [parameter.detach().requires_grad_(False) for parameter in module.parameters()]

    def by_hand(x):
        hidden = layer_norm(x, weights[0], weights[1]) @ weights[2].T + weights[3]
        return (hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2) @ weights[4].T + weights[5]

    assert relative_error(found, nested_jvp_coefficients(by_hand, X, Y - X, 2)) < TOLERANCE


def test_inference_mode_and_inference_tensors():
    expected = jet(sublayer, X, Y, 3).coefficients
    with torch.inference_mode():
        assert torch.equal(jet(sublayer, X, Y, 3).coefficients, expected)
        center, variate = X.clone(), Y.clone()
    assert torch.equal(jet(sublayer, center, variate, 3).coefficients, expected)


def test_float32_stays_close():
    found = jet(lambda x: sublayer(x.double()).float(), X.float(), Y.float(), 3).coefficients
    assert found.dtype == torch.float32
    assert relative_error(found.double(), jet(sublayer, X.float().double(), Y.float().double(), 3).coefficients) < 1e-5


def test_batch_and_positions_commute_with_jets():
    def per_position(x: Tensor) -> Tensor:
        return F.layer_norm(x, (4,), GAIN, BIAS).tanh() @ W_Q

    whole = jet(per_position, X, Y, 3).coefficients
    assert relative_error(whole[:, 1], jet(per_position, X[1], Y[1], 3).coefficients) < TOLERANCE
    assert relative_error(whole[:, :, 2], jet(per_position, X[:, 2], Y[:, 2], 3).coefficients) < TOLERANCE


def test_degenerate_shapes():
    for shape in ((), (0, 3), (1,)):
        x, y = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
        assert jet(torch.exp, x, y, 2).coefficients.shape == (3, *shape)


# Errors. ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("center", "variate", "order", "error", "message"),
    [
        (X, Y, -1, ValueError, r"order must be an integer >= 0; got -1"),
        (X, Y, 1.0, TypeError, r"order must be an integer >= 0; got 1\.0"),
        (X, Y, True, TypeError, r"order must be an integer >= 0; got True"),
        (X, Y[0], 1, ValueError, r"one shape; got torch.Size\(\[2, 3, 4\]\) and torch.Size\(\[3, 4\]\)"),
        (X, Y.float(), 1, ValueError, r"one dtype; got torch.float64 and torch.float32"),
        (X, Y.to("meta"), 1, ValueError, r"one device; got cpu and meta"),
        (X.bfloat16(), Y.bfloat16(), 1, TypeError, r"float32 or float64; got torch.bfloat16 as center"),
        (X, Y.half(), 1, TypeError, r"got torch.float16 as variate. Cast"),
        (X.long(), Y.long(), 1, TypeError, r"got torch.int64 as center"),
        (X.to(torch.complex128), Y, 1, TypeError, r"got torch.complex128"),
        (X / 0, Y, 1, ValueError, r"center is finite"),
        (X, Y * math.nan, 0, ValueError, r"variate is finite"),
        ([1.0], Y, 1, TypeError, r"center is a plain tensor; got list"),
        (Series(X), Y, 1, TypeError, r"center is a plain tensor; got Series"),
    ],
)
def test_what_is_refused(center, variate, order, error, message):
    with pytest.raises(error, match=message):
        jet(sublayer, center, variate, order)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
def test_quantized_tensors_are_refused():
    quantized = torch.quantize_per_tensor(X.float(), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"got torch.qint8"):
        jet(sublayer, quantized, quantized, 1)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("order", [0, 1])
def test_a_function_that_gives_no_tensor_is_refused(order):
    with pytest.raises(TypeError, match=r"returned tuple. Wrap it"):
        jet(lambda x: (x, x), X, Y, order)


def test_a_write_into_a_plain_tensor_is_refused():
    buffer = torch.zeros_like(X)
    with pytest.raises(TypeError, match="only be written into a Series"):
        jet(lambda x: buffer.copy_(x), X, Y, 1)


def test_a_jet_is_frozen():
    found = Jet(X)
    with pytest.raises(AttributeError):
        found.coefficients = Y  # type: ignore[misc]
