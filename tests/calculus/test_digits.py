"""Coefficients in float32 are right relative to themselves, also where a function saturates or vanishes: against mpmath."""

import math

import mpmath
import pytest
import torch
import torch.nn.functional as F

from tl_jets.calculus import Series, jet

ORDER = 4
POINTS = (0.0, -1e-3, 0.03, -0.3, 0.7, -1.5, 3.0, 5.0, -5.0, 8.0, -8.0, 15.0, -15.0)
# 2,000 roundings: three digits of float32 may go, not more.
TOLERANCE = 2000 * torch.finfo(torch.float32).eps


def two(x, which, f):
    return f(torch.stack([x, torch.zeros_like(x)], -1), -1)[..., which]


def logistic(z):
    return 1 / (1 + mpmath.exp(-z))


def normal(z):
    return mpmath.erfc(-z / mpmath.sqrt(2)) / 2


def gelu_tanh(z):
    return z * logistic(2 * mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf("0.044715") * z**3))


SMOOTH = {
    "tanh": (torch.tanh, mpmath.tanh),
    "sigmoid": (torch.sigmoid, logistic),
    "silu": (F.silu, lambda z: z * logistic(z)),
    "gelu": (F.gelu, lambda z: z * normal(z)),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), gelu_tanh),
    "erf": (torch.erf, mpmath.erf),
    "erfc": (torch.erfc, mpmath.erfc),
    "softplus": (F.softplus, lambda z: mpmath.log1p(mpmath.exp(z))),
    "logsigmoid": (F.logsigmoid, lambda z: -mpmath.log1p(mpmath.exp(-z))),
    "logaddexp": (lambda x: torch.logaddexp(x, torch.zeros_like(x)), lambda z: mpmath.log1p(mpmath.exp(z))),
    "mish": (F.mish, lambda z: z * mpmath.tanh(mpmath.log1p(mpmath.exp(z)))),
    "expm1": (torch.expm1, mpmath.expm1),
    "exp2": (torch.exp2, lambda z: mpmath.mpf(2) ** z),
    "sinh": (torch.sinh, mpmath.sinh),
    "cosh": (torch.cosh, mpmath.cosh),
    "tan": (torch.tan, mpmath.tan),
    "atan": (torch.atan, mpmath.atan),
    "asinh": (torch.asinh, mpmath.asinh),
    "sinc": (torch.sinc, mpmath.sincpi),
    "hypot": (lambda x: torch.hypot(x, torch.ones_like(x)), lambda z: mpmath.sqrt(1 + z * z)),
    "softmax_winner": (lambda x: two(x, 0, torch.softmax), logistic),
    "softmax_loser": (lambda x: two(x, 1, torch.softmax), lambda z: logistic(-z)),
    "logsumexp": (lambda x: torch.logsumexp(torch.stack([x, 0 * x], -1), -1), lambda z: mpmath.log1p(mpmath.exp(z))),
}
ELSEWHERE = {
    "log1p": (torch.log1p, mpmath.log1p, (1e-4, 0.5, 30.0, -0.999)),
    "log": (torch.log, mpmath.log, (1e-6, 0.999, 1.001, 30.0)),
    "log2": (torch.log2, lambda z: mpmath.log(z, 2), (8.0, 0.999)),
    "log10": (torch.log10, lambda z: mpmath.log(z, 10), (1000.0, 0.999)),
    "rsqrt": (torch.rsqrt, lambda z: 1 / mpmath.sqrt(z), (1e-6, 1.0, 1e6)),
    "asin": (torch.asin, mpmath.asin, (1e-3, 0.5, -0.9999)),
    "acos": (torch.acos, mpmath.acos, (1e-3, 0.5, 0.9999)),
    "atanh": (torch.atanh, mpmath.atanh, (1e-3, 0.5, -0.9999)),
    "acosh": (torch.acosh, mpmath.acosh, (1.0001, 2.0, 50.0)),
    "lgamma": (torch.lgamma, mpmath.loggamma, (0.01, 2.5, 50.0)),
    "erfinv": (torch.erfinv, mpmath.erfinv, (1e-3, 0.5, -0.9999)),
    "erfcx": (torch.special.erfcx, lambda z: mpmath.exp(z * z) * mpmath.erfc(z), (-3.0, 0.5, 9.0)),
    "power": (lambda x: x**2.5, lambda z: z ** mpmath.mpf(2.5), (1e-3, 1.0, 30.0)),
    "inverse_power": (lambda x: x**-7, lambda z: z**-7, (1e-3, 1.0, 100.0)),
    "xlogy": (lambda x: torch.xlogy(x, x), lambda z: z * mpmath.log(z), (1e-5, 0.3, 5.0)),
}
CASES = {name: (*pair, POINTS) for name, pair in SMOOTH.items()} | ELSEWHERE


@pytest.mark.parametrize("name", CASES)
def test_each_coefficient_keeps_its_digits(name):
    f, exact, points = CASES[name]
    x = torch.tensor(points)
    found = f(Series.line(x, torch.ones_like(x), ORDER)).coefficients
    assert found.dtype == torch.float32
    for place, point in enumerate(x.double().tolist()):
        with mpmath.workdps(60):
            expected = [float(c) for c in mpmath.taylor(exact, mpmath.mpf(point), ORDER)]
        largest = max(abs(c) for c in expected[1:])
        for order, (value, wanted) in enumerate(zip(found[:, place].tolist(), expected, strict=True)):
            if order == 0 and value == f(x)[place].item():
                continue  # PyTorch's own value, which may have lost digits
            # Roundings of the other coefficients, where one is 0.
            assert abs(value - wanted) <= TOLERANCE * abs(wanted) + 4e-9 * largest + 1e-37, (
                point,
                order,
                value,
                wanted,
            )


def test_the_case_of_the_report():
    x = torch.tensor([5.0])
    c_2 = jet(lambda t: F.gelu(t, approximate="tanh"), x, x + 1, 2).coefficients[2].item()
    assert c_2 == pytest.approx(-4.9671e-6, rel=1e-3)


# Powers: bases of zero and below it, exponents that are tensors or move. ---------------------------------------------


def coefficients(f, center, order=3, direction=1.0):
    center = torch.tensor(center, dtype=torch.float64)
    return jet(f, center, center + direction, order).coefficients.T.tolist()


def test_powers_with_tensor_exponents_at_negative_bases_and_zero():
    integers = torch.tensor([2.0, 3.0], dtype=torch.float64)
    assert coefficients(lambda x: x**integers, [-1.0, 2.0], 1) == [[1, -2], [8, 12]]
    assert coefficients(lambda x: x**integers, [0.0, 0.0]) == [[0, 0, 1, 0], [0, 0, 0, 1]]
    exponents = torch.tensor([0.0, 1.0, 9.0], dtype=torch.float64)
    assert coefficients(lambda x: x**exponents, [0.0] * 3) == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert coefficients(lambda x: x ** torch.tensor([-2, -1]), [-1.0, -1.0]) == [[1, 2, 3, 4], [-1, -1, -1, -1]]
    assert coefficients(lambda x: torch.float_power(x, 3), [-2.0]) == [[-8, 12, -6, 1]]
    # The square of a line through 0 starts at t^2, so its power 1.5 at t^3, where |t|^3 has no series.
    assert coefficients(lambda x: (x * x) ** 1.5, [0.0], 2) == [[0, 0, 0]]
    assert coefficients(lambda x: x**1.5, [0.0], 1) == [[0, 0]]
    for r in (torch.tensor([1.5], dtype=torch.float64), 1.5):
        with pytest.raises(ValueError, match=r"order 2 is not. It arises first in aten.pow"):
            coefficients(lambda x, r=r: x**r, [0.0], 2)


def test_powers_of_numbers():
    assert coefficients(lambda x: 0**x, [2.0, 0.0]) == [[0, 0, 0, 0], [1, 0, 0, 0]]
    assert coefficients(lambda x: (-2) ** (0 * x + 3), [1.0]) == [[-8, 0, 0, 0]]
    assert coefficients(lambda x: x ** (0 * x + 2), [-3.0, 0.0]) == [[9, -6, 1, 0], [0, 0, 1, 0]]
    with pytest.raises(ValueError, match=r"order 1 is not. It arises first in aten.pow.Scalar"):
        coefficients(lambda x: (-2) ** x, [2.0])
    found = coefficients(lambda x: 3**x, [2.0])[0]
    assert found == pytest.approx([9 * math.log(3) ** n / math.factorial(n) for n in range(4)], rel=1e-14)


def test_products_with_zeros():
    assert coefficients(lambda x: x.prod().reshape(1), [0.0, 0.0, 2.0]) == [[0, 0, 2, 1]]
    assert coefficients(lambda x: x.cumprod(0), [0.0, 2.0, 0.0]) == [[0, 1, 0, 0], [0, 2, 1, 0], [0, 0, 2, 1]]


# Kinks are constants, as in PyTorch; what has no derivative is refused. ----------------------------------------------


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.norm().reshape(1),
        lambda x: torch.linalg.vector_norm(x, 3).reshape(1),
        lambda x: torch.hypot(x, x),
        lambda x: torch.cdist(x[None], x[None] * 0).flatten(),
        lambda x: (x * torch.zeros_like(x)).sqrt(),
    ],
)
def test_norms_at_zero_are_constants(f):
    assert all(row == [0, 0, 0, 0] for row in coefficients(f, [0.0, 0.0]))


def test_a_deviation_of_equal_numbers_is_a_constant():
    ramp = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    found = Series.line(torch.ones(3, dtype=torch.float64), ramp, 2).std().coefficients
    assert found.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("f", "order", "name"),
    [
        (torch.sqrt, 1, "aten.sqrt.default"),
        (torch.log, 0, "aten.log.default"),
        (torch.special.entr, 1, "aten.special_entr.default"),
        (lambda x: torch.exp(x) + torch.sqrt(x + 0).sum(), 1, "aten.sqrt.default"),
        (lambda x: torch.linalg.det(x.diag()), 1, "aten._linalg_det.default"),
    ],
)
def test_what_is_not_finite_is_refused_and_named(f, order, name):
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=rf"order {order} is not\. It arises first in {name}"):
        jet(f, x, x + 1, max(order, 1))


# c_0 is f(center). ---------------------------------------------------------------------------------------------------


def test_a_function_that_is_random_or_has_a_state_is_refused():
    x = torch.linspace(-1, 1, 8)
    calls = []

    def counted(t):
        calls.append(t)
        return t * len(calls)

    for f in (lambda t: F.dropout(t, 0.5, True), lambda t: t + torch.rand(8), counted):
        with pytest.raises(ValueError, match=r"c_0 is f\(center\); they differ by .* call eval\(\)"):
            jet(f, x, x + 1, 1)


def test_a_wrong_rule_is_refused(monkeypatch):
    from tl_jets.calculus.series import RULES

    monkeypatch.setitem(RULES, torch.ops.aten.sin.default, lambda x: Series(x.coefficients * 1.01))
    x = torch.tensor([0.5, 1.0])
    with pytest.raises(ValueError, match="wrong Taylor rule: please report it"):
        jet(torch.sin, x, x + 1, 1)


def test_rounding_is_not_taken_for_a_difference():
    x = 300 * torch.rand(64, generator=torch.Generator().manual_seed(1))
    jet(lambda t: t.sin() ** 2 + t.cos() ** 2 - 1, x, x + 1, 3)
    jet(lambda t: t - t.sum() + t.flip(0).sum(), x, x + 1, 1)
