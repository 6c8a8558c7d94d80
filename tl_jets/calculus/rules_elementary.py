r"""Rules of remainders, and of elementary and special functions defined by a differential equation.

If y = f(u) has the slope f'(u) = g(u, y), then n y_n = sum_{j=1..n} j u_j g_{n-j}, where g_0 .. g_{n-1} need
y_0 .. y_{n-1} only: g = 1 / (1 + u^2) for atan, sqrt(pi)/2 exp(y^2) for the inverse of erf. (Griewank & Walther
2008, *Evaluating Derivatives*, ch. 13.) c_0 is always PyTorch's own value. Cost: O(k^3) elementwise operations.

Example:
    >>> from tl_jets.calculus import Series
    >>> torch.atan(Series.line(torch.zeros(1), torch.ones(1), order=3)).coefficients.flatten()
    tensor([ 0.0000,  1.0000,  0.0000, -0.3333])
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from tl_jets.calculus import recurrences
from tl_jets.calculus.rules_nonlinear import with_value
from tl_jets.calculus.rules_structure import constant, lift, look_at_value, terms_of, value_of
from tl_jets.calculus.series import Series
from tl_jets.calculus.table import RULES, rule

aten = torch.ops.aten
Operand = Tensor | float | int
Slope = Callable[[Series, Series], Tensor]


def from_slope(operation: OpOverload, slope: Slope, x: Series) -> Series:
    """The function with c_0 = operation(u_0) and the slope `slope(x, y)`."""
    u = x.coefficients
    y = torch.zeros_like(u, memory_format=torch.contiguous_format)
    y[0] = operation(u[0])
    for n in range(1, u.shape[0]):
        rate = slope(Series(u[:n]), Series(y[:n]))
        assert isinstance(rate, Series)
        for j in range(1, n + 1):
            y[n].addcmul_(u[j], rate.coefficients[n - j], value=j / n)
    return Series(y)


# Use (1 - x)(1 + x) for 1 - x^2: it is accurate near 1.
_SLOPES: dict[OpOverload, Slope] = {
    aten.tan.default: lambda x, y: torch.cos(x) ** -2,
    aten.asin.default: lambda x, y: torch.rsqrt((1 - x) * (1 + x)),
    aten.acos.default: lambda x, y: -torch.rsqrt((1 - x) * (1 + x)),
    aten.atan.default: lambda x, y: 1 / (1 + x * x),
    aten.asinh.default: lambda x, y: torch.rsqrt(1 + x * x),
    aten.acosh.default: lambda x, y: torch.rsqrt((x - 1) * (x + 1)),
    aten.atanh.default: lambda x, y: 1 / ((1 - x) * (1 + x)),
    aten.erfinv.default: lambda x, y: math.sqrt(math.pi) / 2 * torch.exp(y * y),
    aten.special_ndtri.default: lambda x, y: math.sqrt(2 * math.pi) * torch.exp(y * y / 2),
}
RULES.update({operation: partial(from_slope, operation, slope) for operation, slope in _SLOPES.items()})


@rule(aten.special_erfcx.default)
def erfcx(x: Series) -> Series:
    """exp(x^2) erfc(x), with slope 2 x y - 2 / sqrt(pi); in float64, because the two terms cancel for large x."""
    exact = Series(x.coefficients.double())
    y = from_slope(aten.special_erfcx.default, lambda x, y: 2 * x * y - 2 / math.sqrt(math.pi), exact)
    return Series(y.coefficients.to(x.dtype))


@rule(aten.sinc.default)
def sinc(x: Series) -> Series:
    """sin(pi x) / (pi x), by its power series in (pi x)^2 near 0."""
    z = x * math.pi
    square = torch.where(z.abs() < 1, z * z, torch.zeros_like(z))
    near = torch.ones_like(z)
    for n in range(2 * math.ceil((x.order + 18) / 2), 0, -2):
        near = 1 - near * square / (n * (n + 1))
    inside = z.abs() < 1
    far = torch.sin(z) / torch.where(inside, torch.ones_like(z), z)
    out = torch.where(inside, near, far)
    assert isinstance(out, Series)
    return with_value(out.coefficients, torch.sinc(x.coefficients[0]))


@rule(aten.lgamma.default)
def lgamma(x: Series) -> Series:
    """The logarithm of the absolute gamma function."""
    u = x.coefficients
    return Series(_from_derivatives([torch.lgamma(u[0]), *(torch.polygamma(n, u[0]) for n in range(x.order))], u))


@rule(aten.polygamma.default)
def polygamma(n: int, x: Series) -> Series:
    """The derivative of order n + 1 of lgamma."""
    u = x.coefficients
    return Series(_from_derivatives([torch.polygamma(n + j, u[0]) for j in range(x.order + 1)], u))


RULES[aten.digamma.default] = partial(polygamma, 0)


def _from_derivatives(derivatives: list[Tensor], u: Tensor) -> Tensor:
    """f(u) from the derivatives f, f', f'', ... at u_0, by Horner's scheme."""
    moving = u.clone()
    moving[0] = 0
    y = torch.zeros_like(u)
    for n, derivative in reversed(list(enumerate(derivatives))):
        y = recurrences.product(y, moving)
        y[0] += derivative / math.factorial(n)
    return y


@rule(aten.atan2.default)
def atan2(a: Tensor, b: Tensor) -> Series:
    """The angle of (b, a), with slope (b a' - a b') / (a^2 + b^2)."""
    a, b = torch.broadcast_tensors(a, b)
    value = torch.atan2(value_of(a), value_of(b))
    terms = terms_of(a, b)
    if terms == 1:
        return Series(value.unsqueeze(0))
    size = torch.maximum(value_of(a).abs(), value_of(b).abs())
    u, w = lift(a, terms) / size, lift(b, terms) / size
    turn = recurrences.product(w[:-1], recurrences.derivative(u)) - recurrences.product(
        u[:-1], recurrences.derivative(w)
    )
    squares = recurrences.square(u[:-1]) + recurrences.square(w[:-1])
    rate = recurrences.product(turn, recurrences.reciprocal(squares))
    line = constant(torch.zeros_like(value), terms)
    line[1] = 1
    return Series(recurrences.integral(rate, line, value))


@rule(aten.hypot.default)
def hypot(a: Tensor, b: Tensor) -> Series:
    """sqrt(a^2 + b^2); constant where it is 0."""
    a, b = torch.broadcast_tensors(a, b)
    terms = terms_of(a, b)
    size = torch.maximum(value_of(a).abs(), value_of(b).abs())
    size = size.masked_fill(size == 0, 1)
    squares = recurrences.square(lift(a, terms) / size) + recurrences.square(lift(b, terms) / size)
    return Series(recurrences.root_of_squares(squares) * size)


def times_log(log: Callable[[Any], Any], plain: Callable[..., Tensor], x: Operand, y: Operand) -> Series:
    """Compute x log y; 0 where x is the constant 0, for every y."""
    value = plain(value_of(x), value_of(y))
    out = x * (log(y) if isinstance(y, Tensor) else log(torch.tensor(y, dtype=value.dtype, device=value.device)))
    assert isinstance(out, Series)
    zero = (x.coefficients == 0).all(0) if isinstance(x, Series) else torch.as_tensor(x, device=value.device) == 0
    return with_value(out.coefficients.masked_fill(zero.expand(value.shape), 0), value)


for _operation in (aten.xlogy.Tensor, aten.xlogy.Scalar_Self, aten.xlogy.Scalar_Other):
    RULES[_operation] = partial(times_log, torch.log, torch.xlogy)
for _operation in (aten.special_xlog1py.default, aten.special_xlog1py.self_scalar, aten.special_xlog1py.other_scalar):
    RULES[_operation] = partial(times_log, torch.log1p, torch.special.xlog1py)


@rule(aten.special_entr.default)
def entr(x: Series) -> Series:
    """-x log x, which has no derivative at 0."""
    out = times_log(torch.log, torch.xlogy, x, x)
    return with_value(-out.coefficients, torch.special.entr(x.coefficients[0]))


# Remainders, signs, quotients that are rounded. ---------------------------------------------------------------------


def after_division(plain: Callable[..., Tensor], a: Operand, b: Operand) -> Series:
    """Compute a - b q, with the rounded quotient q of c_0."""
    value = plain(value_of(a), value_of(b))
    times = torch.round((value_of(a) - value) / value_of(b))
    out = a - b * times
    assert isinstance(out, Series)
    return with_value(out.coefficients, value)


for _operation in (aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor):
    RULES[_operation] = partial(after_division, torch.remainder)
for _operation in (aten.fmod.Tensor, aten.fmod.Scalar):
    RULES[_operation] = partial(after_division, torch.fmod)


@rule(aten.div.Tensor_mode)
def div_rounded(a: Operand, b: Operand, *, rounding_mode: str | None) -> Tensor:
    """Compute a / b, or the rounded quotient of c_0 as a plain tensor."""
    if rounding_mode is None:
        return torch.true_divide(a, b)  # type: ignore[arg-type]
    return torch.div(value_of(a), value_of(b), rounding_mode=rounding_mode)


RULES[aten.floor_divide.default] = partial(look_at_value, aten.floor_divide.default)


@rule(aten.copysign.Tensor)
def copysign(a: Tensor, b: Tensor) -> Tensor:
    """|a| with the sign of b, both taken at c_0."""
    wanted = torch.copysign(torch.ones_like(value_of(a)), value_of(b))
    return a * (wanted * torch.copysign(torch.ones_like(value_of(a)), value_of(a)))
