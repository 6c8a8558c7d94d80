r"""The secant map of a function between two points, applied backwards: mean gradients on the segment between them.

For a function f, a point h and a change d,

.. math::
    f(h + d) - f(h) = S d, \qquad S = \int_0^1 Df(h + t d)\, dt \approx \sum_k w_k\, Df(h + t_k d),

with Gauss-Legendre nodes. That is a jet of order 1 with centers on the segment (Lemma 1 of Chen et al.). As the left side
is known, so is the error of the nodes on a covector g, the **gap**: the product of g with S d, less its product with the
left side. Nodes are doubled until it is small.

Example:
    >>> h, d = torch.tensor([[0.3, -1.0]], dtype=torch.float64), torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    >>> f = torch.tanh
    >>> found = pull_back(f, h, d, torch.ones(1, 1, 2).double(), (f(h + d) - f(h)).sum()[None], torch.tensor([1e-9]))
    >>> found.nodes, bool(found.gap.abs() < 1e-9)
    (16, True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from scipy.special import roots_legendre
from torch import Tensor

# Nodes of the first try, and the most.
FIRST_NODES, MOST_NODES = 2, 128
# Rounding of a gap: so many units in the last place of the sum of the absolute values of its terms.
ROUNDING = 2


class PulledBack(NamedTuple):
    """What `pull_back` found.

    Attributes:
        covectors: S' g for each covector.
        gap: Error of the nodes on each covector and prompt, float64.
        nodes: Nodes of the last try.
        evaluations: Evaluations of the function and its gradients, in all tries.
    """

    covectors: Float[Tensor, "covector ..."]
    gap: Float[Tensor, "covector ..."]
    nodes: int
    evaluations: int


def pull_back(
    function: Callable[[Tensor], Tensor],
    point: Float[Tensor, "*shape"],
    change: Float[Tensor, "*shape"],
    covectors: Float[Tensor, "covector ..."],
    true: Float[Tensor, "covector ..."],
    allowed: Float[Tensor, "covector ..."],
    **options: Any,
) -> PulledBack:
    """The secant map's transpose, applied to covectors; nodes double until every gap is at most `allowed`, or rounding.

    Args:
        function: f, differentiable.
        point: h; its first dimension is the batch, if `true` has one.
        change: d.
        covectors: g, each of the shape of f's output.
        true: The products of g with f(h + d) - f(h).
        allowed: The largest absolute gap.
        **options: `nodes`, `first` and `together`, as in `pull_back_apart`.
    """
    found = pull_back_apart(
        lambda points, weights: _gradients(function, points, weights, covectors)[None],
        point, change, [0], true[None], allowed, **options,
    )  # fmt: skip
    return found._replace(covectors=found.covectors[0], gap=found.gap[0])


def pull_back_apart(
    gradients: Callable[[Tensor, Sequence[float]], Tensor],
    point: Float[Tensor, "*shape"],
    change: Float[Tensor, "*shape"],
    part_of: Sequence[int],
    true: Float[Tensor, "part covector ..."],
    allowed: Float[Tensor, "covector ..."],
    *,
    nodes: int | None = None,
    first: int = FIRST_NODES,
    together: int = 1,
) -> PulledBack:
    """As `pull_back`, for a function that is a sum of parts, each read in one or more ways; parts' gaps count in absolute sum.

    Args:
        gradients: The transposed derivatives at points that are stacked along the first dimension, in their weighted sum, by
            reader and covector [reader, covector, *shape].
        point: h.
        change: d.
        part_of: The part that each reader belongs to.
        true: The products of g with the parts' changes.
        allowed: The largest sum of the parts' absolute gaps.
        nodes: A fixed number of nodes; None to double them, up to `MOST_NODES`.
        first: Nodes of the first try.
        together: How many points are evaluated at once, stacked along the first dimension.

    Returns:
        A `PulledBack` with covectors [reader, covector, *shape], and gaps [part, covector, ...].
    """
    count, evaluations = nodes or first, 0
    index = torch.tensor(part_of, device=point.device)
    while True:
        total: Tensor | float = 0.0
        places = legendre(count)
        for start in range(0, count, together):
            some = places[start : start + together]
            points = torch.cat([point + place * change for place, _ in some])
            total = total + gradients(points, [weight for _, weight in some])
        assert isinstance(total, Tensor)
        evaluations += count
        terms = (total.double() * change.double()).flatten(true.ndim)
        gap = (-true).index_add(0, index, terms.sum(-1))
        rounding = ROUNDING * torch.finfo(point.dtype).eps * terms.abs().sum(-1).sum(0)
        error = gap.abs().sum(0)
        if nodes is not None or count >= MOST_NODES or bool((error <= torch.maximum(allowed, rounding)).all()):
            return PulledBack(total, gap, count, evaluations)
        count *= 2


@cache
def legendre(count: int) -> tuple[tuple[float, float], ...]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1]."""
    places, weights = roots_legendre(count)
    return tuple(zip(((places + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))


def _gradients(
    function: Callable[[Tensor], Tensor], points: Tensor, weights: Sequence[float], covectors: Tensor
) -> Tensor:
    """The transposed derivatives at stacked points, in their weighted sum, applied to each covector."""
    with torch.enable_grad():
        points = points.detach().requires_grad_(True)
        value, found = function(points), []
        for i, g in enumerate(covectors):
            at_each = torch.cat([weight * g for weight in weights])
            gradient = torch.autograd.grad(value, points, at_each, retain_graph=i < len(covectors) - 1)[0]
            found.append(gradient.unflatten(0, (len(weights), -1)).sum(0))
    return torch.stack(found)
