r"""Slow, independent references for Taylor coefficients: no code of tl_jets is used here.

- `contour_coefficients`: Cauchy's integral formula, c_j = mean over |t| = r of f(x(t)) t^{-j}, in complex arithmetic.
- `nested_jvp_coefficients`: j-fold forward differentiation, divided by j!. Never give it `F.layer_norm`, whose
  second-order forward derivative is wrong in torch 2.13 (pytorch#196700).
- `convergence_slope`: how fast a truncated series approaches the function; order k must give k + 1.
- `compose`: substitution of one truncated series into another.
- norms and attention written out.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over 1 + largest value; infinite if shapes differ or anything is not finite."""
    if found.shape != expected.shape or not (torch.isfinite(found).all() and torch.isfinite(expected).all()):
        return math.inf
    if found.numel() == 0:
        return 0.0
    return ((found - expected).abs().max() / (1 + expected.abs().max())).item()


def curve(coefficients: Tensor, t: Tensor) -> Tensor:
    """c_0 + c_1 t + ... for coefficients [order+1, *shape] and a number t."""
    powers = t ** torch.arange(len(coefficients))
    return torch.einsum("j,j...->...", powers, coefficients.to(powers.dtype))


def contour_coefficients(
    f: Function, coefficients: Tensor, order: int, radius: float = 0.2, points: int = 32
) -> Tensor:
    """Taylor coefficients of t -> f(c_0 + c_1 t + ...), for an f that is analytic within the radius: [order+1, *out].

    Rounding is about 1e-16 / radius^order, the truncation (radius / radius of convergence)^points.
    """
    angles = 2 * math.pi * torch.arange(points, dtype=torch.float64) / points
    nodes = torch.polar(torch.full_like(angles, radius), angles)
    values = torch.stack([f(curve(coefficients, node)) for node in nodes])
    found = [torch.einsum("p,p...->...", node_power, values) / points for node_power in _inverse_powers(nodes, order)]
    return torch.stack(found).real


def _inverse_powers(nodes: Tensor, order: int) -> Tensor:
    return nodes ** -torch.arange(order + 1).unsqueeze(1)


def nested_jvp_coefficients(f: Function, center: Tensor, direction: Tensor, order: int) -> Tensor:
    """Taylor coefficients of t -> f(center + t direction) by nested forward differentiation: [order+1, *out]."""

    def differentiated(g: Function) -> Function:
        return lambda t: torch.func.jvp(g, (t,), (torch.ones_like(t),))[1]

    g: Function = lambda t: f(center + t * direction)  # noqa: E731
    found = []
    for j in range(order + 1):
        found.append(g(torch.zeros((), dtype=center.dtype)) / math.factorial(j))
        g = differentiated(g)
    return torch.stack(found)


def convergence_slope(f: Function, value_at: Function, center: Tensor, variate: Tensor) -> float:
    """log-log slope of |f(y) - value_at(y)| as y approaches the center; value_at(y) is the truncated series at y."""
    steps = [0.1, 0.05, 0.025]
    errors = []
    for step in steps:
        y = center + step * (variate - center)
        errors.append((f(y) - value_at(y)).norm().item())
    return math.log(errors[0] / errors[-1]) / math.log(steps[0] / steps[-1])


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """Coefficients of outer(inner(t)) for outer [order+1, *shape] in powers of inner - inner_0: [order+1, *shape]."""
    total = torch.zeros_like(inner)
    power = torch.zeros_like(inner)
    power[0] = 1
    moving = inner.clone()
    moving[0] = 0
    for coefficient in outer:
        total = total + coefficient * power
        power = torch.stack(
            [sum(power[i] * moving[n - i] for i in range(n + 1)) for n in range(len(inner))]  # type: ignore[misc]
        )
    return total


def erf(z: Tensor) -> Tensor:
    """The error function by its power series, for complex arguments of modest size."""
    total, term = torch.zeros_like(z), z
    for n in range(80):
        total = total + term / (2 * n + 1)
        term = -term * z * z / (n + 1)
    return total * 2 / math.sqrt(math.pi)


def layer_norm(x: Tensor, weight: Tensor | float = 1.0, bias: Tensor | float = 0.0, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last axis, written out."""
    deviation = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (deviation * deviation).sum(-1, keepdim=True) / x.shape[-1]
    return deviation / torch.sqrt(variance + eps) * weight + bias


def rms_norm(x: Tensor, weight: Tensor | float = 1.0, bias: Tensor | float = 0.0, eps: float = 1e-5) -> Tensor:
    """RMSNorm over the last axis, written out."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) * weight + bias


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """exp over its sum, for scores of modest size."""
    weights = torch.exp(x)
    return weights / weights.sum(dim, keepdim=True)


def attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt d) v over the keys that `allowed` [query, key] permits."""
    weights = torch.exp(query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1]))
    weights = weights if allowed is None else weights * allowed
    return weights / weights.sum(-1, keepdim=True) @ value
