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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_jets.calculus import Norm
from tl_jets.core.decoder import Decoder
from tl_jets.core.lens_logits import Readings
from tl_jets.core.metric import Gram, augmented
from tl_jets.core.notebook import dataframe_html
from tl_jets.core.options import check_integers
from tl_jets.core.results import Result
from tl_jets.core.selection import Rows
from tl_jets.core.sinks import Sinks

MEASURES = ("remainder_norm", "cosine", "centered_cosine", "kl", "top1_agreement")


@dataclass(frozen=True, eq=False)
class Measures(Result):
    """How close logits are to the model's, by the measures in the module's table; NaN at padding.

    All tensors have one shape [*axes, batch, pos]. `sinks` are the positions that `mean` leaves out, attention sinks.
    """

    remainder_norm: Float[Tensor, "*cells batch pos"]
    cosine: Float[Tensor, "*cells batch pos"]
    centered_cosine: Float[Tensor, "*cells batch pos"]
    kl: Float[Tensor, "*cells batch pos"]
    top1_agreement: Float[Tensor, "*cells batch pos"]
    sinks: Bool[Tensor, "batch pos"] | None = None

    @classmethod
    def of(cls, rows: Rows, geometry: dict[str, Tensor], read: Readings, sinks: Sinks, cells: Any = ...) -> Measures:
        """Measures of selected cells, of the selected rows of a trace."""
        if read.kl is None:
            raise ValueError("Measures need a scan with measures=True; this one was run without.")
        kl = read.kl[cells]
        values = {**geometry, "kl": kl, "top1_agreement": read.top1_agreement[cells].to(kl.dtype)}
        return cls(**{name: rows.spread(value) for name, value in values.items()}, sinks=sinks.mask)

    def map(self, change: Callable[[Tensor], Tensor]) -> Measures:
        """The measures with `change` applied to each tensor."""
        return self._mapped(change, MEASURES)

    def mean(self, *, include_sinks: bool = False) -> dict[str, Tensor]:
        """Averages over the positions of all prompts, without attention sinks, by name: tensors [*axes].

        If all positions are sinks, they count. `lens.average()` has the same numbers as a table.
        """
        sinks = None if include_sinks else self.sinks
        if sinks is not None and bool((self.kl.isnan() | sinks).all()):
            sinks = None
        found = {name: value if sinks is None else value.masked_fill(sinks, torch.nan) for name, value in self.items()}
        return {name: value.flatten(-2).nanmean(-1) for name, value in found.items()}

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
    of_rows, size = places.tolist(), (*shape, y.shape[-1])
    drawn = {
        place: np.random.default_rng([seed, place]).standard_normal(size, dtype=np.float32) for place in set(of_rows)
    }
    noise = torch.from_numpy(np.stack([drawn[place] for place in of_rows], -2))
    noise = norm.center(noise.to(y))
    y = y / y.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)
    noise = noise - (noise * y).sum(-1, keepdim=True) * y
    return noise / noise.norm(dim=-1, keepdim=True)


def seeds_of(seed: Any, draws: int) -> list[int]:
    """Seeds of some draws of random directions, from `seed` on; none if it is None."""
    check_integers(1, draws=draws)
    if seed is None:
        return []
    check_seed(seed)
    return [int(seed) + i for i in range(draws)]


def check_seed(seed: Any) -> None:
    """Raise TypeError or ValueError unless the seed is a nonnegative integer."""
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(
            f"seed must be an integer >= 0, which everything random is drawn from; got {seed!r}. Another integer is another "
            f"draw; only iterative_jet_lens goes without its control (seed=None)."
        )
    if seed < 0:
        raise ValueError(f"seed must be an integer >= 0; got {seed}. Another integer is another draw.")


def geometry_in_plane(
    decoder: Decoder, plane: Plane, control: Tensor | None, alpha: Tensor, beta: Tensor, gamma: Tensor
) -> list[dict[str, Tensor]]:
    """Remainder norm, both cosines and the borrowed share of jets in the plane of y and q: each [layer, order, *row].

    Jets are L = alpha U(w * x) + beta U(w * y) + c, the model is T = gamma U(w * y) + c. The unit vectors `control`, if
    given, replace the direction of q: theirs come second.
    """
    norm, along = decoder.norm, plane.along[:, None]
    given = [plane.orthogonal, *([] if control is None else [control])]
    bias = torch.zeros_like(plane.variate[:1]) if norm.bias is None else norm.bias[None]
    s, q = augmented(norm.scale(plane.variate), 0.0), [augmented(norm.scale(direction), 0.0) for direction in given]
    vectors = [s, augmented(bias, 1.0), *q]
    grams = decoder.grams(*(v[:, None] if v.ndim > s.ndim else v for v in vectors))
    found = []
    for i, length in enumerate([1, plane.across[:, None]][: len(given)], 2):
        plain, centered = ([[gram[a][b] for b in (0, i, 1)] for a in (0, i, 1)] for gram in grams)
        # Coefficients of s, q and c: the lens, the model, their difference, the lens' own part, and the borrowed one.
        A, B = alpha * along + beta, alpha * length
        lens, model, short, own, lent = (A, B, 1), (gamma, 0, 1), (gamma - A, -B, 0), (along, length, 0), (1, 0, 0)
        mine, lent = alpha.abs() * _length(centered, own), beta.abs() * _length(centered, lent)
        found.append(
            {
                "cosine": _cosine(plain, lens, model),
                "remainder_norm": _length(plain, short) / _length(plain, model),
                "centered_cosine": _cosine(centered, lens, model),
                "borrowed_share": torch.where(lent == 0, 0, lent / (mine + lent)),
            }
        )
    return found


def geometry(decoder: Decoder, states: Tensor, truth: Tensor, *parts: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Remainder norm and both cosines of logits of `states` against `truth`, inputs of the unembedding.

    Second: lengths of the centered logits of `parts`, without `b_U`.
    """
    given = [augmented(states.double() - truth.double(), 0.0), *(augmented(part, 0.0) for part in parts)]
    plain, every = decoder.grams(augmented(states, 1.0), augmented(truth, 1.0), *given)
    plain, centered = ([row[:3] for row in gram[:3]] for gram in (plain, every))
    one, other, difference = (1, 0, 0), (0, 1, 0), (0, 0, 1)
    found = {
        "cosine": _cosine(plain, one, other),
        "centered_cosine": _cosine(centered, one, other),
        "remainder_norm": _length(plain, difference) / _length(plain, other),
    }
    return found, [every[i][i].clamp_min(0).sqrt() for i in range(3, 3 + len(parts))]


# A combination of vectors, whose inner products are a `Gram`.
Combination = Sequence[Tensor | int]


def _product(gram: Gram, u: Combination, v: Combination) -> Tensor:
    first, *others = (a * b * value for a, row in zip(u, gram, strict=True) for b, value in zip(v, row, strict=True))
    return sum(others, first)


def _length(gram: Gram, u: Combination) -> Tensor:
    # Rounding can leave the square of a null vector slightly below zero.
    return _product(gram, u, u).clamp_min(0).sqrt()


def _cosine(gram: Gram, u: Combination, v: Combination) -> Tensor:
    lengths = (_product(gram, u, u) * _product(gram, v, v)).clamp_min(0).sqrt()
    return (_product(gram, u, v) / lengths).clamp(-1, 1)
