r"""Measures of how close an expansion's logits are to the model's, and the random-center control of each measure.

For the model's additive logits T and the expansion's L, at one position:

======================  ===========================================================================
measure                 definition
======================  ===========================================================================
`remainder_norm`        |T - L| / |T|
`cosine`                cos(T, L), the paper's
`centered_cosine`       the same after the mean over the vocabulary is taken off both
`kl`                    KL(softmax(tau(T)) || softmax(tau(L))) in nats, tau the model's own last transform
`top1_agreement`        whether both have the same best token
======================  ===========================================================================

**The plane of a jet.** The jet of the final norm at a center x lies in the plane of x and the final stream y. With x =
a y + q, q orthogonal to y (both as the norm sees them: centered for LayerNorm),

.. math::
    L = (\alpha a + \beta) s + \alpha p + c, \qquad T = \gamma s + c, \qquad s = U(w * y),\; p = U(w * q),

so the lengths and angles of every order follow from six inner products, and T - L = (gamma - beta - alpha a) s - alpha
p is computed without cancellation.

**The control** replaces q by a random vector of the same length, orthogonal to y: a center with the layer's norm,
angle, alpha, beta and rho, but no information about the layer. A score that the control also reaches is not evidence
about the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.calculus import Norm
from tl_jets.core.decoder import Decoder
from tl_jets.core.lens_logits import Readings
from tl_jets.core.notebook import dataframe_html
from tl_jets.core.results import Result

MEASURES = ("remainder_norm", "cosine", "centered_cosine", "kl", "top1_agreement")


@dataclass(frozen=True, eq=False)
class Measures(Result):
    """How close logits are to the model's, by the measures in the module's table; NaN at padding.

    All tensors have one shape [*axes, batch, pos].
    """

    remainder_norm: Float[Tensor, "*cells"]
    cosine: Float[Tensor, "*cells"]
    centered_cosine: Float[Tensor, "*cells"]
    kl: Float[Tensor, "*cells"]
    top1_agreement: Float[Tensor, "*cells"]

    @classmethod
    def of(
        cls, spread: Callable[[Tensor], Tensor], geometry: dict[str, Tensor], read: Readings, cells: Any = ...
    ) -> Measures:
        """Measures of selected cells; `spread` maps rows back to [batch, pos]."""
        if read.kl is None:
            raise ValueError("Measures need a scan with measures=True; this one was run without.")
        kl = read.kl[cells]
        values = {**geometry, "kl": kl, "top1_agreement": read.top1_agreement[cells].to(kl.dtype)}
        return cls(**{name: spread(value) for name, value in values.items()})

    def map(self, change: Any) -> Measures:
        """The measures with `change` applied to each tensor."""
        return replace(self, **{field.name: change(getattr(self, field.name)) for field in fields(self)})

    def mean(self) -> dict[str, Tensor]:
        """Averages over real positions of all prompts, by name: tensors [*axes]."""
        return {name: getattr(self, name).flatten(-2).nanmean(-1) for name in MEASURES}

    def _headline(self) -> str:
        return f"Measures of cells {list(self.kl.shape)}"

    def _body(self) -> str:
        cells = {name: values[~values.isnan()].double() for name, values in self.items()}
        kinds = {"mean": Tensor.mean, "smallest": Tensor.min, "largest": Tensor.max}
        rows = [
            {"measure": name}
            | {kind: float(take(values)) if len(values) else float("nan") for kind, take in kinds.items()}
            for name, values in cells.items()
        ]
        return dataframe_html(pd.DataFrame(rows))

    def items(self) -> list[tuple[str, Tensor]]:
        """(name, values) of every measure."""
        return [(name, getattr(self, name)) for name in MEASURES]


@dataclass(frozen=True, eq=False)
class Plane:
    """Centers split along the final stream y (`variate`), as the final norm sees them: x = along * y + orthogonal.

    `across` is the length of `orthogonal`.
    """

    variate: Float[Tensor, "*row d_model"]
    along: Float[Tensor, " layer *row"]
    across: Float[Tensor, " layer *row"]
    orthogonal: Float[Tensor, "layer *row d_model"]


def split_along(norm: Norm, centers: Tensor, variate: Tensor) -> Plane:
    """Split centers [layer, *row, d_model] along the variate [*row, d_model], in float64."""
    x, y = norm.center(centers.double()), norm.center(variate.double())
    along = (x * y).sum(-1) / y.square().sum(-1).clamp_min(torch.finfo(y.dtype).tiny)
    orthogonal = x - along[..., None] * y
    return Plane(y, along, orthogonal.norm(dim=-1), orthogonal)


def random_directions(norm: Norm, variate: Tensor, shape: tuple[int, ...], places: Tensor, seed: int) -> Tensor:
    """Float64 unit vectors orthogonal to the variate and centered with it; each depends on seed and position alone."""
    check_seed(seed)
    y = norm.center(variate.double())
    drawn = {
        place: np.random.default_rng([seed, place]).standard_normal((*shape, y.shape[-1]), dtype=np.float32)
        for place in places.unique().tolist()
    }
    noise = torch.from_numpy(np.stack([drawn[place] for place in places.tolist()], -2))
    noise = norm.center(noise.to(y))
    y = y / y.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)
    noise = noise - (noise * y).sum(-1, keepdim=True) * y
    return noise / noise.norm(dim=-1, keepdim=True)


def check_seed(seed: Any) -> None:
    """Raise TypeError or ValueError unless the seed is a nonnegative integer."""
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(
            f"seed must be an integer >= 0, which everything random is drawn from; got {seed!r}. Another integer is another "
            f"draw; only iterative_jet_lens goes without its control (seed=None)."
        )
    if seed < 0:
        raise ValueError(f"seed must be an integer >= 0; got {seed}. Another integer is another draw.")


def weighted(norm: Norm, states: Tensor) -> Tensor:
    """The norm's weight times states."""
    return states if norm.weight is None else states * norm.weight


def geometry_in_plane(
    decoder: Decoder, plane: Plane, control: Tensor | None, alpha: Tensor, beta: Tensor, gamma: Tensor
) -> dict[str, Tensor]:
    """Remainder norm, both cosines and the borrowed share of jets in the plane of y and q: each [layer, order, *row].

    Jets are L = alpha U(w * x) + beta U(w * y) + c, the model is T = gamma U(w * y) + c. The unit vectors `control`, if
    given, replace the direction of q.
    """
    norm = decoder.norm
    along = plane.along[:, None]
    direction, length = (plane.orthogonal, 1) if control is None else (control, plane.across[:, None])
    A, B = alpha * along + beta, alpha * length
    found = {}
    both = _inner_products(decoder, weighted(norm, plane.variate), weighted(norm, direction))
    for centered, products in zip((False, True), both, strict=True):
        ss, sq, qq, sc, qc, cc = (value if value.ndim == gamma.ndim else value[:, None] for value in products)
        of_model = gamma.square() * ss + 2 * gamma * sc + cc
        of_lens = A.square() * ss + B.square() * qq + cc + 2 * (A * B * sq + A * sc + B * qc)
        cross = A * gamma * ss + A * sc + B * gamma * sq + B * qc + gamma * sc + cc
        cosine = (cross / (of_model * of_lens).clamp_min(0).sqrt()).clamp(-1, 1)
        if centered:
            own = alpha.abs() * _length(along.square() * ss + 2 * along * length * sq + length**2 * qq)
            borrowed = beta.abs() * _length(ss)
            found["centered_cosine"] = cosine
            found["borrowed_share"] = torch.where(borrowed == 0, 0, borrowed / (own + borrowed))
        else:
            short = gamma - A
            remainder = short.square() * ss - 2 * short * B * sq + B.square() * qq
            found["cosine"] = cosine
            found["remainder_norm"] = _length(remainder) / _length(of_model)
    return found


def geometry(decoder: Decoder, states: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Remainder norm and both cosines of logits of `states` against `truth`, inputs of the unembedding."""
    found = {}
    metric = decoder.metric(centered=True)
    x, y = metric.augment(states, 1.0), metric.augment(truth, 1.0)
    Mx, My = x @ metric.gram, y @ metric.gram
    centered = [(My * y).sum(-1), (My * x).sum(-1), (Mx * x).sum(-1)]
    x_mean, y_mean = x @ metric.mean, y @ metric.mean
    plain = [
        value + extra
        for value, extra in zip(centered, (y_mean * y_mean, y_mean * x_mean, x_mean * x_mean), strict=True)
    ]
    for name, (yy, xy, xx) in (("cosine", plain), ("centered_cosine", centered)):
        found[name] = (xy / (xx * yy).sqrt()).clamp(-1, 1)
    found["remainder_norm"] = decoder.metric(False).norm(states.double() - truth.double(), 0.0) / _length(plain[0])
    return found


def _inner_products(decoder: Decoder, s: Tensor, q: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """<s,s>, <s,q>, <q,q>, <s,c>, <q,c>, <c,c> of plain and of centered logits; c is the norm's bias with b_U."""
    metric = decoder.metric(centered=True)
    gram, mean = metric.gram, metric.mean
    bias = s.new_zeros(s.shape[-1]) if decoder.norm.bias is None else decoder.norm.bias.to(s)
    biases = torch.cat([bias, bias.new_ones(1)])
    c = biases @ gram
    Ms, Mq = s @ gram[:-1, :-1], q @ gram[:-1, :-1]
    ss = (Ms * s).sum(-1)
    centered = (ss, (Ms * q).sum(-1), (Mq * q).sum(-1), s @ c[:-1], q @ c[:-1], (c @ biases).expand_as(ss))
    s_mean, q_mean, c_mean = s @ mean[:-1], q @ mean[:-1], biases @ mean
    extra = (s_mean**2, s_mean * q_mean, q_mean**2, s_mean * c_mean, q_mean * c_mean, c_mean**2)
    return tuple(value + more for value, more in zip(centered, extra, strict=True)), centered


def _length(square: Tensor) -> Tensor:
    # Rounding can leave the square of a null vector slightly below zero.
    return square.clamp_min(0).sqrt()
