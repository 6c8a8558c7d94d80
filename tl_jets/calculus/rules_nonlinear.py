r"""Rules of smooth functions: elementary and special functions, activations, softmax, layer norm; and of remainders.

Elementary functions follow `tl_jets.calculus.recurrences` (Griewank & Walther 2008, *Evaluating Derivatives*, ch. 13) in
O(k^2) elementwise operations; activations and norms compose them. Others have y = f(u) with a slope f'(u) = g(u, y):
n y_n = sum_{j=1..n} j u_j g_{n-j}, where g_0 .. g_{n-1} need y_0 .. y_{n-1} only, in O(k^3).

Example:
    >>> from tl_jets.calculus import Series
    >>> torch.exp(Series.line(torch.zeros(1), torch.ones(1), order=2)).coefficients.flatten()
    tensor([1.0000, 1.0000, 0.5000])
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from tl_jets.calculus import recurrences
from tl_jets.calculus.rules_structure import axes, axis, constant, lift, look_at_value, terms_of, value_of
from tl_jets.calculus.series import RULES, Series, rule

aten = torch.ops.aten
Number = float | int
Operand = Tensor | float | int
Slope = Callable[[Series, Series], Tensor]


# Powers, exponentials, logarithms, trigonometry. --------------------------------------------------------------------


@rule(aten.pow.Tensor_Scalar)
def power(x: Series, exponent: Number) -> Series:
    """Elementwise x^exponent."""
    return Series(recurrences.power(x.coefficients, exponent))


@rule(aten.pow.Scalar)
def power_of_number(base: Number, exponent: Series) -> Series:
    """base^x; NaN above c_0 where the base is negative and the exponent varies."""
    return power_of_tensor(torch.tensor(base, dtype=exponent.dtype, device=exponent.device), exponent)


@rule(aten.pow.Tensor_Tensor)
def power_of_tensor(base: Tensor, exponent: Tensor) -> Series:
    """base^exponent: the recurrence of fixed powers where the exponent is constant, else exp(exponent log base)."""
    if not isinstance(exponent, Series) and exponent.numel() == 1 and exponent.ndim <= base.ndim:
        assert isinstance(base, Series)
        return power(base, exponent.item())
    terms = terms_of(base, exponent)
    value = torch.pow(value_of(base), value_of(exponent))
    u, w = (lift(x.expand(value.shape).to(value.dtype), terms) for x in (base, exponent))
    out = recurrences.powers(u, w[0])
    if isinstance(exponent, Series):
        moving = recurrences.exponential(recurrences.product(w, recurrences.logarithm(u)), value)
        # 0^x is the constant 0 for x > 0, and by PyTorch's convention at x = 0.
        moving[1:].masked_fill_((u == 0).all(0) & (w[0] >= 0), 0)
        out = torch.where((w[1:] == 0).all(0), out, moving)
    return with_value(out, value)


def _log1p(u: Tensor) -> Tensor:
    shifted = u.clone()
    shifted[0] += 1
    return recurrences.logarithm(shifted)


# Functions of the stacked coefficients.
_RECURRENCES: dict[OpOverload, Callable[[Tensor], Tensor]] = {
    aten.square.default: recurrences.square,
    aten.reciprocal.default: recurrences.reciprocal,
    aten.sqrt.default: partial(recurrences.power, exponent=0.5),
    aten.rsqrt.default: partial(recurrences.power, exponent=-0.5),
    aten.exp.default: recurrences.exponential,
    aten.log.default: recurrences.logarithm,
    aten.sin.default: lambda u: recurrences.sine_cosine(u)[0],
    aten.cos.default: lambda u: recurrences.sine_cosine(u)[1],
    aten.sinh.default: lambda u: recurrences.sine_cosine(u, hyperbolic=True)[0],
    aten.cosh.default: lambda u: recurrences.sine_cosine(u, hyperbolic=True)[1],
    aten.tanh.default: recurrences.tangent_hyperbolic,
    aten.sigmoid.default: recurrences.logistic,
    aten.silu.default: lambda u: recurrences.product(u, recurrences.logistic(u)),
    aten.erf.default: recurrences.error_function,
}
# Those whose c_0 would lose digits, and is PyTorch's own.
_RECURRENCES_ABOVE: dict[OpOverload, Callable[[Tensor], Tensor]] = {
    aten.exp2.default: lambda u: recurrences.exponential(u * math.log(2)),
    aten.expm1.default: recurrences.exponential,
    aten.log2.default: lambda u: recurrences.logarithm(u) / math.log(2),
    aten.log10.default: lambda u: recurrences.logarithm(u) / math.log(10),
    aten.log1p.default: _log1p,
    aten.erfc.default: lambda u: -recurrences.error_function(u),
}


def by_recurrence(recurrence: Callable[[Tensor], Tensor], x: Series) -> Series:
    """A function of the stacked coefficients."""
    return Series(recurrence(x.coefficients))


def by_recurrence_above(operation: OpOverload, recurrence: Callable[[Tensor], Tensor], x: Series) -> Series:
    """A function of the stacked coefficients, with PyTorch's own value as c_0."""
    return with_value(recurrence(x.coefficients), operation(x.coefficients[0]))


RULES.update({operation: partial(by_recurrence, f) for operation, f in _RECURRENCES.items()})
RULES.update({operation: partial(by_recurrence_above, operation, f) for operation, f in _RECURRENCES_ABOVE.items()})


def with_value(coefficients: Tensor, value: Tensor) -> Series:
    """Set c_0 to PyTorch's value where the recurrence's own would cancel."""
    coefficients[0] = value
    return Series(coefficients)


# Smooth activations. ------------------------------------------------------------------------------------------------


@rule(aten.gelu.default)
def gelu(x: Series, *, approximate: str = "none") -> Series:
    """Compute x Phi(x), or its tanh approximation."""
    u = x.coefficients
    if approximate == "none":
        half = recurrences.error_function(u, math.sqrt(0.5)).mul_(0.5)
        # (1 + erf(z)) / 2 = erfc(-z) / 2, which is accurate for very negative z.
        half[0] = 0.5 * torch.erfc(-math.sqrt(0.5) * u[0])
    else:
        # (1 + tanh z) / 2 is the logistic function of 2 z = 2 sqrt(2/pi) (u + 0.044715 u^3).
        inner = recurrences.square(u).mul_(2 * 0.044715 * math.sqrt(2 / math.pi))
        inner[0].add_(2 * math.sqrt(2 / math.pi))
        half = recurrences.logistic(recurrences.product(inner, u))
    return Series(recurrences.product(u, half))


@rule(aten.softplus.default)
def softplus(x: Series, beta: Number = 1, threshold: Number = 20) -> Series:
    """log(1 + exp(beta x)) / beta."""
    u = x.coefficients
    value = F.softplus(u[0], beta, threshold)
    if u.shape[0] == 1:
        return Series(value.unsqueeze(0))
    smooth = recurrences.integral(recurrences.logistic(u[:-1] * beta), u, value)
    # PyTorch's softplus is the identity above the threshold.
    return Series(torch.where(u[0] * beta > threshold, u, smooth))


@rule(aten.log_sigmoid_forward.default)
def log_sigmoid(x: Series) -> tuple[Series, Tensor]:
    """-log(1 + exp(-x)), and the buffer that PyTorch returns with it."""
    u = x.coefficients
    value = F.logsigmoid(u[0])
    buffer = value.new_empty(0)
    if u.shape[0] == 1:
        return Series(value.unsqueeze(0)), buffer
    return Series(recurrences.integral(recurrences.logistic(-u[:-1]), u, value)), buffer


@rule(aten._softmax.default)
def softmax(x: Series, dim: int, half_to_float: bool = False) -> Series:
    """exp(x) / sum exp(x)."""
    return Series(_at_least_one_axis(recurrences.softmax, x, dim))


@rule(aten._safe_softmax.default)
def safe_softmax(x: Series, dim: int, dtype: torch.dtype | None = None) -> Series:
    """The softmax, with 0 for rows of -inf."""
    y = softmax(Series(x.coefficients.to(dtype or x.dtype)), dim)
    y.coefficients[0].nan_to_num_(0.0)
    return y


@rule(aten._log_softmax.default)
def log_softmax(x: Series, dim: int, half_to_float: bool = False) -> Series:
    """Compute x - log sum exp(x)."""
    return Series(_at_least_one_axis(recurrences.log_softmax, x, dim))


def _at_least_one_axis(function: Callable[[Tensor, int], Tensor], x: Series, dim: int) -> Tensor:
    u = x.coefficients if x.ndim else x.coefficients.unsqueeze(1)
    return function(u, axis(dim, x.ndim)).view(x.coefficients.shape)


@rule(aten.logsumexp.default)
def logsumexp(x: Series, dim: Sequence[int], keepdim: bool = False) -> Series:
    """Log sum exp(x) over some axes."""
    if x.ndim == 0:
        return Series(x.coefficients.clone())
    places = axes(dim, x.ndim)
    # Move the reduced axes last and merge them.
    kept = [place for place in range(1, x.ndim + 1) if place not in places]
    merged = x.coefficients.permute(0, *kept, *places).flatten(1 + len(kept))
    out = recurrences.log_sum_exp(merged, -1).squeeze(-1)
    for place in sorted(places) if keepdim else ():
        out = out.unsqueeze(place)
    return Series(out)


# Norms. -------------------------------------------------------------------------------------------------------------


@rule(aten.native_layer_norm.default)
def layer_norm(
    x: Series, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Series, Series]:
    """(x - mean) / sqrt(var + eps) weight + bias, with mean and reciprocal root."""
    u = x.coefficients
    places = list(range(u.ndim - len(normalized_shape), u.ndim))
    center = u.mean(places, keepdim=True)
    deviation = u - center
    mean_square = recurrences.square(deviation).mean(places, keepdim=True)
    mean_square[0].add_(eps)
    scale = recurrences.power(mean_square, -0.5)
    out: Tensor = Series(recurrences.product(deviation, scale))
    out = out if weight is None else out * weight
    out = out if bias is None else out + bias
    return out, Series(center), Series(scale)


# Functions defined by a differential equation. ------------------------------------------------------------------------


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
