r"""Taylor arithmetic on stacked coefficients: products, quotients, powers and elementary functions.

All functions take and return coefficients `[order+1, *shape]`; u_n is the coefficient of t^n. A product is the Cauchy
product (a b)_n = sum_i a_i b_{n-i}. A function y = f(u) with derivative g(u) obeys y' = g u', hence

    n y_n = sum_{j=1..n} j u_j g_{n-j},

where y_n needs g_0 .. g_{n-1} only: g = y for exp, 1 - y^2 for tanh, y - y^2 for the logistic function,
2/sqrt(pi) exp(-u^2) for erf. Powers use u y' = r u' y. (Griewank & Walther 2008, *Evaluating Derivatives*, ch. 13,
table 13.2.)

| symbol | variable |
|---|---|
| u, y | `u`, `y`: argument and result |
| u' | `slope`: coefficients of du/dt, j u_j at index j - 1 |
| g | `rate` |
| k | `order` = len(u) - 1 |

Cost: O(k^2) elementwise multiply-adds, in place.

Example:
    >>> exponential(torch.tensor([0.0, 1.0, 0.0, 0.0])) * torch.tensor([1.0, 1.0, 2.0, 6.0])
    tensor([1., 1., 1., 1.])
"""

import math

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """Cauchy product; trailing axes broadcast."""
    if a.dtype != b.dtype:
        common = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(common), b.to(common)
    if a.ndim < b.ndim:
        a, b = b, a
    b = b.reshape(b.shape[0], *(1,) * (a.ndim - b.ndim), *b.shape[1:])
    terms = a.shape[0]
    out = a * b[0]
    for i in range(1, terms):
        out[i:].addcmul_(a[: terms - i], b[i])
    return out


def square(u: Tensor) -> Tensor:
    """Cauchy product of a series with itself; each pair i < j is computed once."""
    terms = u.shape[0]
    out = u * u[0]
    out[1:].mul_(2)
    for i in range(1, terms):
        if 2 * i < terms:
            out[2 * i].addcmul_(u[i], u[i])
            out[2 * i + 1 :].addcmul_(u[i + 1 : terms - i], u[i], value=2)
    return out


def reciprocal(u: Tensor) -> Tensor:
    """1 / u, from u y = 1: y_n = -(sum_{j=1..n} u_j y_{n-j}) / u_0."""
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    torch.reciprocal(u[0], out=y[0])
    if u.shape[0] > 1:
        minus = -y[0]
        for n in range(1, u.shape[0]):
            _convolve(u[1 : n + 1], y[:n], out=y[n]).mul_(minus)
    return y


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """The quotient a / b of equal shapes, from b q = a: q_n = (a_n - sum_{j=1..n} b_j q_{n-j}) / b_0."""
    common = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(common), b.to(common)
    q = a.clone(memory_format=torch.contiguous_format)
    q[0].div_(b[0])
    for n in range(1, q.shape[0]):
        for j in range(1, n + 1):
            q[n].addcmul_(b[j], q[n - j], value=-1)
        q[n].div_(b[0])
    return q


def exponential(u: Tensor, value: Tensor | None = None) -> Tensor:
    """exp(u): n y_n = sum_j j u_j y_{n-j}; `value` replaces exp(u_0) if given."""
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    y[0] = torch.exp(u[0]) if value is None else value
    slope = derivative(u)
    for n in range(1, u.shape[0]):
        _convolve(slope[:n], y[:n], out=y[n]).div_(n)
    return y


def logarithm(u: Tensor) -> Tensor:
    """log(u): u y' = u', so y_n = (u_n - sum_{j<n} (j/n) y_j u_{n-j}) / u_0."""
    y = u.clone(memory_format=torch.contiguous_format)
    torch.log(u[0], out=y[0])
    for n in range(1, u.shape[0]):
        for j in range(1, n):
            y[n].addcmul_(y[j], u[n - j], value=-j / n)
        y[n].div_(u[0])
    return y


def tangent_hyperbolic(u: Tensor) -> Tensor:
    """tanh(u): y' = s u', s' = -2 y s u', s_0 = 4 sigmoid(2 u_0) sigmoid(-2 u_0): no digits are lost where y saturates."""
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    torch.tanh(u[0], out=y[0])
    if u.shape[0] == 1:
        return y
    rate, bend = torch.empty_like(y[:-1]), torch.empty_like(y[:-1])
    torch.mul(torch.sigmoid(2 * u[0]), torch.sigmoid(-2 * u[0]), out=rate[0]).mul_(4)
    slope = derivative(u)
    for n in range(1, u.shape[0]):
        _convolve(slope[:n], rate[:n], out=y[n]).div_(n)
        if n < rate.shape[0]:
            _convolve(y[:n], rate[:n], out=bend[n - 1])
            _convolve(slope[:n], bend[:n], out=rate[n]).mul_(-2 / n)
    return y


def logistic(u: Tensor) -> Tensor:
    """1 / (1 + exp(-u)) = (1 + tanh(u / 2)) / 2."""
    y = tangent_hyperbolic(u * 0.5).mul_(0.5)
    torch.sigmoid(u[0], out=y[0])
    return y


def sine_cosine(u: Tensor, hyperbolic: bool = False) -> tuple[Tensor, Tensor]:
    """sin(u) and cos(u), or sinh(u) and cosh(u)."""
    sine = torch.empty_like(u, memory_format=torch.contiguous_format)
    cosine = torch.empty_like(sine)
    (torch.sinh if hyperbolic else torch.sin)(u[0], out=sine[0])
    (torch.cosh if hyperbolic else torch.cos)(u[0], out=cosine[0])
    slope = derivative(u)
    for n in range(1, u.shape[0]):
        _convolve(slope[:n], cosine[:n], out=sine[n]).div_(n)
        _convolve(slope[:n], sine[:n], out=cosine[n]).div_(n if hyperbolic else -n)
    return sine, cosine


def error_function(u: Tensor, scale: float = 1.0) -> Tensor:
    """erf(scale u): y' = 2/sqrt(pi) exp(-(scale u)^2) scale u'."""
    value = torch.erf(u[0] * scale)
    if u.shape[0] == 1:
        return value.unsqueeze(0)
    rate = exponential(square(u[:-1]).mul_(-scale * scale)).mul_(2 * scale / math.sqrt(math.pi))
    return integral(rate, u, value)


def power(u: Tensor, exponent: float | int) -> Tensor:
    """u^exponent for a fixed real exponent.

    Integer exponents are products, valid at u_0 = 0. Others obey u y' = r u' y, so
    y_n = sum_{j=1..n} (r j - (n - j)) u_j y_{n-j} / (n u_0). Where u_0 = 0 and r > 0, u = t^m w gives t^(m r) w^r: zeros
    below order m r and NaN above, where there is no series; zeros throughout if u is 0.
    """
    if float(exponent).is_integer():
        return _integer_power(u, int(exponent))
    y = _power_by_recurrence(u, torch.pow(u[0], exponent), exponent)
    if exponent > 0:
        _power_at_zero(y, u, exponent)
    return y


def powers(u: Tensor, exponents: Tensor) -> Tensor:
    """u^exponents for fixed real exponents, a tensor of the shape of u_0."""
    exponents = exponents.to(u.dtype)
    y = _power_by_recurrence(u, torch.pow(u[0], exponents), exponents)
    _power_at_zero(y, u, exponents)
    whole = (u[0] == 0) & (exponents >= 0) & (exponents == exponents.round())
    # Where u_0 = 0, u^r is zero for r > order; compute the other powers as products.
    for r in range(u.shape[0] if bool(whole.any()) else 0):
        y = torch.where(whole & (exponents == r), _integer_power(u, r), y)
    return y


def root_of_squares(u: Tensor) -> Tensor:
    """sqrt(u) where u is a sum of squares; constant where u_0 = 0, as in PyTorch."""
    y = power(u, 0.5)
    y[1:].masked_fill_(u[0] == 0, 0)
    return y


def _power_by_recurrence(u: Tensor, value: Tensor, exponent: float | Tensor) -> Tensor:
    y = torch.zeros_like(u, memory_format=torch.contiguous_format)
    y[0] = value
    for n in range(1, u.shape[0]):
        for j in range(1, n + 1):
            if isinstance(exponent, Tensor):
                y[n].addcmul_(u[j] * (exponent * j - (n - j)), y[n - j], value=1 / n)
            else:
                y[n].addcmul_(u[j], y[n - j], value=(exponent * j - (n - j)) / n)
        y[n].div_(u[0])
    return y


def _power_at_zero(y: Tensor, u: Tensor, exponent: float | Tensor) -> None:
    """Set coefficients below the leading power of u^exponent to zero where u_0 = 0 and the exponent is positive."""
    zero = (u[0] == 0) & (torch.as_tensor(exponent, device=u.device) > 0)
    start = (u == 0).cumprod(0).sum(0)
    for n in range(1, u.shape[0]):
        y[n].masked_fill_(zero & ((start == u.shape[0]) | (n < start * exponent)), 0)


def softmax(u: Tensor, dim: int) -> Tensor:
    """exp(u - m) over its sum along `dim`, an axis of the stacked tensor; m is the series of the largest u_0.

    All coefficients are 0 where u_0 is -inf; a row of -inf is the constant NaN, as in PyTorch.
    """
    _, weights, total, _, empty = _shifted_exponential(u, dim)
    y = product(weights, reciprocal(total))
    y[0].masked_fill_(empty, math.nan)
    return y


def log_sum_exp(u: Tensor, dim: int) -> Tensor:
    """Log sum exp over `dim`, an axis of the stacked tensor, kept with length 1."""
    _, _, total, largest, empty = _shifted_exponential(u, dim)
    y = logarithm(total).add_(largest)
    y[0].masked_fill_(empty, -math.inf)
    return y


def log_softmax(u: Tensor, dim: int) -> Tensor:
    """(u - m) - log sum exp(u - m) over `dim`, which avoids the difference of two large numbers."""
    shifted, _, total, _, _ = _shifted_exponential(u, dim)
    y = shifted.sub_(logarithm(total))
    y[0] = torch.log_softmax(u[0], dim - 1 if dim > 0 else dim)
    return y


def derivative(u: Tensor) -> Tensor:
    """Coefficients of du/dt: j u_j for j = 1..k, `[order, *shape]`."""
    return u[1:] * _powers(u)


def integral(rate: Tensor, u: Tensor, value: Tensor) -> Tensor:
    """The y with y' = rate u' and y_0 = value; rate is `[order, *shape]` or longer, u `[order+1, *shape]`."""
    higher = product(rate[: u.shape[0] - 1], derivative(u)).div_(_powers(u))
    return torch.cat([value.unsqueeze(0), higher])


def _powers(u: Tensor) -> Tensor:
    """1 .. order, shaped to multiply u[1:]."""
    count = torch.arange(1, u.shape[0], device=u.device, dtype=u.dtype)
    return count.view(-1, *(1,) * (u.ndim - 1))


def _convolve(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write sum_i a_i b_{m-i} over two stacks of length m + 1 into `out`."""
    last = a.shape[0] - 1
    torch.mul(a[0], b[last], out=out)
    for i in range(1, last + 1):
        out.addcmul_(a[i], b[last - i])
    return out


def _integer_power(u: Tensor, exponent: int) -> Tensor:
    """u^exponent by repeated squaring."""
    if exponent < 0:
        return _integer_power(reciprocal(u), -exponent)
    if exponent == 0:
        y = torch.zeros_like(u)
        y[0] = 1
        return y
    if exponent == 1:
        return u.clone()
    half = square(u) if exponent < 4 else square(_integer_power(u, exponent // 2))
    return product(half, u) if exponent % 2 else half


def _shifted_exponential(u: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return u - m, exp(u - m), its sum over `dim`, m, and which rows are -inf throughout.

    m is the series of the element with the largest u_0. That element becomes the constant 1 and the sum is 1 plus the
    others, so no digits are lost where one element dominates. Rows of -inf use m = 0 and sum 1 to avoid 0/0.
    """
    index = u[0].argmax(dim - 1 if dim > 0 else dim, keepdim=True)
    largest = u.gather(dim, index.expand(u.shape[0], *index.shape))
    empty = largest[0] == -math.inf
    largest = largest.masked_fill(empty, 0)
    shifted = u - largest
    weights = exponential(shifted)
    total = weights.sum(dim, keepdim=True)
    total[0].masked_fill_(empty, 1)
    return shifted, weights, total, largest, empty
