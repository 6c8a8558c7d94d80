r"""Interactions: the joint effect of pairs of components on a logit, from the final norm's second-degree jet terms.

With centers x_i, weights w_i and v_i = h_L - x_i, the second-degree terms of the final norm gamma are c_2 = D^2
gamma(x_i)[v_i, v_i] / 2. The stream h_L is the sum of all components and of `rest`, v_i the sum of all but x_i, and

.. math::
    \sum_i w_i c_2(x_i) = \sum_{j, m} I_{jm}, \qquad
    I_{jm} = \tfrac12 \sum_i w_i a_{ij} a_{im} \, D^2 \gamma(x_i)[x_j, x_m], \qquad a_{ij} = 1 - \delta_{ij} .

Read along a direction g (a token's column of W_U less the mean column, or the difference of two), I is a symmetric
matrix of logits. With x centered if the norm centers, w the norm's weight, <u, v> = mean(u v) over d_model, and s =
(<x, x> + eps)^(-1/2),

.. math::
    D^2 (g \cdot \gamma)(x)[u, v] = -s^3 \bigl( (g w \cdot u) \langle x, v \rangle + (g w \cdot v) \langle x, u \rangle \bigr)
    + (g w \cdot x) \bigl( 3 s^5 \langle x, u \rangle \langle x, v \rangle - s^3 \langle u, v \rangle \bigr) .

For a center that is rescaled to c_i x_i (`center_scale`), a_ii = 1 - c_i.

The **control** replaces each component by a random vector of equal length and equal angle to the final stream, as the
norm sees them, and keeps a and w. Interactions that it also shows come from lengths and angles alone.

*Read before use*: where `rho` is above 1 the series diverges: compare `degrees` with `logit`. So the default of
`center_scale` is not the paper's: on SmolLM2-135M the degrees sum to within 0.2 and 2.6 of logits of 17.5 and 19.0
(`"match"` to 17 and 19, `"none"` to 8,000 and 12,000).

============  ==========================
symbol        name here
============  ==========================
I             `Interactions.matrix`
sum of I      `Interactions.term`
w_i           `Interactions.weights`
============  ==========================

Source: Chen et al., *Jet Expansions of Residual Computation*, eq. 6-7 and Lemma 1, at order 2; the split into pairs is
ours. Cost: a forward pass, and N^3 multiply-adds per position for N components.

Example:
    >>> from tl_jets.pretrained import load_tinydocs
    >>> prompt = "This function is available on Unix and"
    >>> pairs = interactions(load_tinydocs(), prompt, targets=" Windows")
    >>> pairs
    Interactions(9 components and rest, 1 prompts at [7]; of ' Windows'; second degree 2.24 of 10)
    >>> pairs.to_dataframe()[["first", "second"]].iloc[0].tolist()
    ['0_mlp_out', '2_attn_out']
    >>> bool(torch.allclose(pairs.matrix.sum((0, 1)), pairs.term))
    True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_jets.calculus import CenterScale, Norm, norm_jet
from tl_jets.calculus import center_scale as center_scale_factors
from tl_jets.core.attribution import ANSWER, LogitAttribution
from tl_jets.core.averages import Averaged
from tl_jets.core.changes import one_look
from tl_jets.core.decoder import in_unit
from tl_jets.core.divergence import warn_of
from tl_jets.core.measures import random_directions, split_along
from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.notebook import dataframe_html
from tl_jets.core.protocol import DECODER_STEP, FINAL_STREAM, Granularity
from tl_jets.core.selection import Rows, TargetInput, positions_of
from tl_jets.core.sinks import Sinks
from tl_jets.core.target_results import TargetResult, target_fields
from tl_jets.core.trace import Trace
from tl_jets.jets.expand import Expansion, jet_expand
from tl_jets.paths.reorganized import REST

SHOWN = 10


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Interactions(TargetResult, Averaged):
    """Second-degree effects of pairs of components on a logit; NaN at padding.

    Logits are additive (before a final softcap) and centered over the vocabulary. Positions and targets as
    in `TargetResult`.

    Attributes:
        labels: Components, aligned to both component axes; the last is `rest`, the final stream less all components.
        matrix: I, symmetric, in logits. The effect of a pair is the sum of its two entries.
        control: I for random vectors of equal length and angle to the final stream.
        degrees: Contribution of degrees 0, 1 and 2 of the weighted jets to the target.
        logit: The model's own centered logit of the target, or difference.
        weights: w; centers are all labels but `rest`.
        rho: Radius ratio of each center's series, which converges below 1.
        valid: Which `tokens` are real.
        target_ids: The target, or the target and the token that it is compared with.
        sinks: Positions that `average` leaves out.
        seed: Seed of the control.
    """

    labels: list[str]
    matrix: Float[Tensor, "component component batch pos"]
    control: Float[Tensor, "component component batch pos"]
    degrees: Float[Tensor, "degree batch pos"]
    logit: Float[Tensor, "batch pos"]
    weights: Float[Tensor, "center batch pos"]
    rho: Float[Tensor, "center batch pos"]
    center_scale: CenterScale
    valid: Bool[Tensor, "batch pos"]
    sinks: Sinks | None = None
    seed: int | None = None

    @property
    def term(self) -> Float[Tensor, "batch pos"]:
        """The second-degree term: the sum of the matrix."""
        return self.degrees[2]

    def __repr__(self) -> str:
        term, logit = (float(value[self.counted].mean()) for value in (self.term, self.logit))
        names = " - ".join(ANSWER if name == ANSWER else repr(name) for name in self.target_names)
        return (
            f"Interactions({len(self.labels) - 1} components and rest, {len(self.tokens)} prompts at {self.positions}; of "
            f"{names}; second degree {term:.3g} of {logit:.3g}{in_unit(self.unit)}{self._left_out()})"
        )

    def __str__(self) -> str:
        table = self.average(include_sinks=self.only_sinks).head(SHOWN)
        return f"{self!r}\n{table.to_string(index=False, float_format='{:.3g}'.format)}"

    def _body(self) -> str:
        return dataframe_html(self.average(include_sinks=self.only_sinks), whole="average()")

    def average(self, **options: Any) -> pd.DataFrame:
        """One row per pair, largest first: first, second, effect, size, control; options as in `Averaged.average`."""
        table = super().average(**options)
        return table.sort_values("size", ascending=False, kind="stable").reset_index(drop=True)

    def _columns(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        pairs, effect, control = self._pairs()
        return pairs.to_dict("records"), {"effect": effect, "size": effect.abs(), "control": control.abs()}

    def to_dataframe(self, tokenizer: Any = None) -> pd.DataFrame:
        """One row per pair, prompt and real position, the largest effect first.

        Columns: first, second, batch, pos, token, target, effect (both entries of the matrix), control.
        """
        names = self._names(tokenizer)
        pairs, effect, control = self._pairs()
        tables = []
        for b, p in self.valid.nonzero().tolist():
            target = " - ".join(names[token] for token in self.target_ids[b, p].tolist())
            here = {
                "batch": b,
                "pos": positions_of(self.positions, b)[p],
                "token": names[int(self.tokens[b, p])],
                "target": target,
            }
            tables.append(pairs.assign(**here, effect=effect[:, b, p].tolist(), control=control[:, b, p].tolist()))
        table = pd.concat(tables, ignore_index=True)
        return table.sort_values("effect", key=abs, ascending=False, kind="stable").reset_index(drop=True)

    def _pairs(self) -> tuple[pd.DataFrame, Tensor, Tensor]:
        """Names of all unordered pairs, their effects, and those of the control [pair, batch, pos]."""
        n = len(self.labels)
        first, second = torch.triu_indices(n, n, device="cpu")
        twice = torch.where(first == second, 1.0, 2.0)[:, None, None].to(self.matrix)
        pairs = {"first": [self.labels[i] for i in first], "second": [self.labels[i] for i in second]}
        return pd.DataFrame(pairs), twice * self.matrix[first, second], twice * self.control[first, second]


@torch.no_grad()
@one_look()
def interactions(
    model: Any,
    text_or_tokens: Any,
    *,
    targets: TargetInput | None = None,
    minus: TargetInput | None = None,
    centers: Any = None,
    granularity: Granularity | None = None,
    positions: int | Sequence[int] | None = -1,
    weights: Literal["uniform"] | Sequence[float] | Tensor = "uniform",
    center_scale: CenterScale = "orthogonal",
    seed: int = 0,
    attention_mask: Tensor | None = None,
    cache: Any = None,
) -> Interactions:
    """Second-degree effects of pairs of components on a logit, or on a difference of two: an `Interactions` in float64.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork`.
        text_or_tokens: A prompt, a list of prompts, token ids [batch, pos], or a `Trace`.
        targets: The token whose logit is read: a string of one token, an id, one list a prompt, or ids [batch, pos]
            aligned with `positions`; None for the model's own best token.
        minus: A token whose logit is subtracted, as `targets`; None for the logit itself.
        centers: Components, as in `jet_expand`; None for all summands of the final stream: embeddings, writes, edits.
        granularity: `"block"`, `"sublayer"` or `"head"`. None is `"sublayer"` for a model, and a network's own.
        positions: Positions to read among each prompt's real tokens, -1 its last; None for all.
        weights: `"uniform"`, or numbers on the simplex, [center] or [center, batch, pos] of the whole input.
        center_scale: Rescale centers: `"orthogonal"`, `"match"` or `"none"` (the paper's), as in `jet_expand`.
        seed: Seed of the random control.
        attention_mask: Passed to the model (left padding needs it).
        cache: A ready `ActivationCache` of the same input.

    Raises:
        ValueError: Bad labels, positions, weights or input, several targets per position, or a zero center.

    Source: Chen et al., eq. 6-7, Lemma 1, at order 2.
    """
    network = ResidualNetwork.of(model, granularity)
    trace = trace_of(network, text_or_tokens, attention_mask, cache)
    rows = Rows.of(trace, positions)
    if centers is None:
        centers = [*network.components, *(label for stream in network.streams for label in trace.edits(stream))]
    expansion = jet_expand(network, DECODER_STEP, centers=centers, order=2, weights=weights, center_scale=center_scale)
    along, ids, names = _directions(trace, rows, targets, minus)
    found = _second_degree(expansion, trace, rows, along, seed)
    return Interactions(
        labels=[*(str(center.path) for center in expansion.centers), REST],
        **{name: rows.spread(values) for name, values in found.items()},
        center_scale=center_scale,
        valid=rows.keep,
        sinks=Sinks.of(trace, rows),
        seed=int(seed),
        **target_fields(trace, rows, ids, names),
    )


def _second_degree(
    expansion: Expansion, trace: Trace, rows: Rows, along: Float[Tensor, "row d_model_and_bias"], seed: int
) -> dict[str, Tensor]:
    """The numbers of an `Interactions`, read along a direction, at real positions [..., row]."""
    norm, h = trace.decoder.norm, rows.take(trace[FINAL_STREAM]).double()
    values = torch.stack([rows.take(center.evaluate(trace)) for center in expansion.centers]).double()
    w = _weights(expansion.weights, rows, len(values))
    scale = center_scale_factors(norm, values, h.expand_as(values), expansion.center_scale)
    series = norm_jet(norm, scale[..., None] * values, h.expand_as(values), 2)
    left = norm(h) - torch.einsum("crd,cr->rd", series.value(2), w)
    remainder = float(left.norm() / norm(h).norm())
    warn_of(DECODER_STEP, 2, remainder, expansion.center_scale, float(series.rho.max()))
    sources = torch.cat([values, (h - values.sum(0))[None]])
    plane = split_along(norm, sources, h)
    random = random_directions(norm, h, sources.shape[:1], rows.places, seed)
    random = plane.along[..., None] * plane.variate + plane.across[..., None] * random
    directions = along[:, :-1]
    return {
        "matrix": _matrix(norm, sources, directions, w, scale),
        "control": _matrix(norm, random, directions, w, scale),
        "degrees": torch.einsum("kcrd,rd,cr->kr", series.coefficients(), directions, w),
        "logit": (norm(h) * directions).sum(-1) + along[:, -1],
        "weights": w,
        "rho": series.rho,
    }


def _matrix(
    norm: Norm,
    sources: Float[Tensor, "source row d_model"],
    directions: Float[Tensor, "row d_model"],
    weights: Float[Tensor, "center row"],
    scale: Float[Tensor, "center row"],
) -> Float[Tensor, "source source row"]:
    """The matrix I of all pairs of sources, expanded at all sources but the last."""
    n, x = len(weights), norm.center(sources).movedim(0, 1)  # rows first, for products of matrices
    if norm.kind == "none":
        return x.new_zeros(len(sources), len(sources), len(x))
    inner = x @ x.mT / x.shape[-1]
    along = (x * norm.scale(directions)[:, None]).sum(-1)
    c, w = scale.T, weights.T
    s = (c.square() * inner.diagonal(dim1=-2, dim2=-1)[:, :n] + norm.eps).rsqrt()
    a = x.new_ones(len(x), n, n + 1)
    a[:, range(n), range(n)] = 1 - c
    # Every center as a row: a_ij, and a_ij <x_i, x_j> at the center's own scale.
    seen, half = a * c[..., None] * inner[:, :n], w / 2
    crossed = (seen.mT * (half * s**3)[:, None]) @ a * along[:, None, :]
    of_center = half * c * along[:, :n]
    matrix = 3 * (seen.mT * (of_center * s**5)[:, None]) @ seen
    matrix = matrix - inner * ((a.mT * (of_center * s**3)[:, None]) @ a) - crossed - crossed.mT
    return (matrix + matrix.mT).movedim(0, -1) / 2  # symmetric to the last bit


def _weights(weights: str | Tensor, rows: Rows, n: int) -> Float[Tensor, "center row"]:
    """Weights of the centers at the selected positions, float64."""
    if isinstance(weights, str):
        if weights != "uniform":
            raise ValueError(f"weights must be 'uniform' or numbers on the simplex; got {weights!r}.")
        weights = torch.full((n,), 1 / n, dtype=torch.float64, device=rows.keep.device)
    weights = weights.double().to(rows.keep.device)
    if weights.ndim == 1:
        return weights[:, None].expand(n, len(rows.places))
    return torch.stack([rows.take(weight) for weight in weights])


def _directions(
    trace: Trace, rows: Rows, targets: TargetInput | None, minus: TargetInput | None
) -> tuple[Float[Tensor, "row d_model_and_bias"], Int[Tensor, "batch pos target"], list[str | int]]:
    """Directions (b_U appended) whose inner product is the centered logit or difference; the target ids and names."""
    total, ids, names = torch.zeros((), device="cpu"), [], []
    for sign, given in ((1, targets), (-1, minus)):
        if given is None and sign < 0:
            continue
        found = LogitAttribution.of(trace, rows, given)
        if found.directions.shape[1] != 1:
            raise ValueError(
                f"Interactions are of one target a position, or of the difference of one from another; got "
                f"{found.directions.shape[1]}. Pass one token to each of targets and minus."
            )
        total = total + sign * found.directions[:, 0]
        ids.append(found.target_ids)
        names += found.target_names
    return total, torch.cat(ids, -1), names
