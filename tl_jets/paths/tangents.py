r"""Directional derivatives of a stage at many centers, along many directions.

D gamma(x) u of a stage comes from the graph of one evaluation (`tl_jets.core.linear_map.GraphMap`), in batches of
directions. For the final norm, with x and u centered if it centers, s = (mean(x^2) + eps)^(-1/2), and its weight apart,

.. math::
    D\gamma(x) u = s u - s^3 x \, \mathrm{mean}(x u), \qquad \gamma(x) - D\gamma(x) x = s^3 \, \mathrm{mean}(x^2) \, x .

Cost: an evaluation with its graph per center, and a batched backward pass per direction.

Example:
    >>> x, u = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[[1.0, 0.0]]], [[[0.0, 3.0]]]])
    >>> value, derivatives = Tangents(lambda x: torch.stack([x**2, x**3]))(x, u)
    >>> derivatives[:, :, 0, 0].tolist()
    [[[2.0, 0.0], [0.0, 12.0]], [[3.0, 0.0], [0.0, 36.0]]]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_jets.calculus import Norm, Series
from tl_jets.core.frozen_network import chunk_size
from tl_jets.core.linear_map import GraphMap
from tl_jets.core.protocol import relative_error


class Tangents:
    """Values and directional derivatives of a stage at one point after another, from the graph of one evaluation.

    At the first point one direction is compared with Taylor arithmetic, which replaces the graph if they differ.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function
        self.by_graph: bool | None = None

    def __call__(self, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """f(x) [step, ...] and D f(x) u [step, direction, ...]."""
        if self.by_graph is None:
            self.by_graph = self._agrees(x, directions[-1])
        return self._graph(x, directions) if self.by_graph else self._series(x, directions)

    def _agrees(self, x: Tensor, direction: Tensor) -> bool:
        _, wanted = self._series(x, direction[None])
        try:
            _, found = self._graph(x, torch.stack([direction, direction]))  # two: as a batch
        except (RuntimeError, NotImplementedError):
            return False
        return relative_error(found[:, 0], wanted[:, 0]) < (1e-8 if x.dtype is torch.float64 else 1e-3)

    def _graph(self, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = x.detach().clone().requires_grad_()
            value = self.function(point)
            linear = GraphMap(point, rearrange(value, "write ... d_model -> ... (write d_model)"))
        found = linear.apply_rows(directions, chunk_size=chunk_size(x))
        return value.detach(), rearrange(found, "... (write d_model) -> write ... d_model", write=len(value))

    def _series(self, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        found = [self.function(Series.line(x, direction, 1)) for direction in directions]
        coefficients = torch.stack(
            [
                out.coefficients if isinstance(out, Series) else torch.stack([out, torch.zeros_like(out)])
                for out in found
            ],
            2,
        )
        return coefficients[0, :, 0], coefficients[1]


def norm_paths(
    norm: Norm,
    centers: Float[Tensor, "center *row d_model"],
    values: Float[Tensor, "source *row d_model"],
    weights: Float[Tensor, "center *row 1"],
) -> Float[Tensor, "source *row d_model"]:
    """Paths of all sources (centers first) through the final norm, without its bias; `weights` are the centers'."""
    x, u, w = norm.center(centers.double()), norm.center(values.double()), weights.double()
    if norm.kind == "none":
        return norm.scale(u.to(values))
    a = x.pow(2).mean(-1, keepdim=True)
    s = (a + norm.eps).rsqrt()
    overlaps = torch.einsum("n...d,m...d->nm...", x, u) / x.shape[-1]
    paths = (w * s).sum(0) * u - torch.einsum("nm...,n...d->m...d", overlaps, w * s.pow(3) * x)
    # norm(x) - D norm(x) x = s^3 mean(x^2) x
    paths[: len(x)] += w * s.pow(3) * a * x
    return norm.scale(paths.to(values))
