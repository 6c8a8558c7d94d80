r"""Order-1 jets regrouped by source: the reorganized form.

The jets of a stage at centers x_i, with weights w_i that sum to one, are evaluated at the true stream h. With h written
as a sum of sources, h = sum_j x_j + sum_m r_m (centers x_j; biases, edits and `rest` are carried),

.. math::
    \sum_i w_i J^1 \gamma(x_i)(h) = \gamma(0) + \sum_j p_j + \sum_m M r_m, \qquad M = \sum_i w_i D\gamma(x_i),

.. math::
    p_j = w_j \bigl(\gamma(x_j) - \gamma(0) - D\gamma(x_j)\, x_j\bigr) + M x_j .

Each plain term w_i J^1 gamma(x_i)(h) carries the whole stream; a path p_j carries only x_j. The sum and the remainder
are those of the plain jets. On a linear network p_j = A x_j for any weights: the recursion gives eq. 5.

On the embedded model (8 sublayers, 256 paths; one prompt of 8 tokens, float64):

==========================================  =========  ====  =============================================
form                                        remainder  rest  paths that decode to the model's own answer
==========================================  =========  ====  =============================================
plain jets, order 1                         34               73%
reorganized                                 5.5        18    1 of 257, `rest > ln_final`
plain jets, order 1, norm-matched centers   0.23             29%
reorganized, norm-matched centers           0.098      0.52  1 of 257, `rest > ln_final`
==========================================  =========  ====  =============================================

The length of `rest`, which holds the model's answer, over that of the last stream shows what no path explains.

============================  =====================================================================================
source                        what it is
============================  =====================================================================================
`embed`, `embed > 0_attn`     a center x_j, named by its path
`0_mlp_bias`                  gamma(0), the step's write for a stream of zero; carried by later stages
`edit:<hook>`                 a user's hook edit of the stream; carried
`rest`                        h less all others: remainders of earlier jets, or omitted centers; carried
============================  =====================================================================================

`Tangents` and `norm_paths` have D gamma(x) u. For the final norm, with x and u centered if it centers, s = (mean(x^2) +
eps)^(-1/2), and its weight apart,

.. math::
    D\gamma(x) u = s u - s^3 x \, \mathrm{mean}(x u), \qquad \gamma(x) - D\gamma(x) x = s^3 \, \mathrm{mean}(x^2) \, x .

Source: Chen et al., *Jet Expansions of Residual Computation*, eq. 5, Lemma 1; the regrouping is ours. Cost: for N
centers and M sources, N evaluations of the stage and N M directional derivatives, as batched backward passes.

Example:
    A linear network, whose paths are products of matrices:

    >>> from tl_jets import CallableModel, Decoder, Norm
    >>> _ = torch.manual_seed(0)
    >>> E, A, B = torch.randn(5, 4).double(), torch.randn(4, 4).double(), torch.randn(4, 4).double()
    >>> model = CallableModel(
    ...     embed=lambda tokens: E[tokens],
    ...     stages=[{"0_block": lambda x: x @ A}, {"1_block": lambda x: x @ B}],
    ...     decoder=Decoder(Norm("none"), torch.randn(4, 7).double(), torch.zeros(7).double()),
    ... )
    >>> tokens = torch.tensor([[0, 3, 1]])
    >>> paths = reorganized_expansion(model)(tokens)
    >>> [label for label in paths.labels if not label.startswith("rest")]
    ['embed > ln_final', 'embed > 0_block > ln_final', 'embed > 1_block > ln_final', 'embed > 0_block > 1_block > ln_final']
    >>> bool(torch.allclose(paths["embed > 0_block > 1_block > ln_final"], E[tokens] @ A @ B))
    True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_jets.calculus import CenterScale, Norm, Series, rescaled
from tl_jets.calculus.rules_structure import lift
from tl_jets.core.changes import one_look
from tl_jets.core.frozen_network import chunk_size
from tl_jets.core.linear_map import GraphMap
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.options import check_integers
from tl_jets.core.path import Path
from tl_jets.core.protocol import BIAS, DECODER_STEP, FINAL_STREAM, frozen_biases, relative_error
from tl_jets.core.selection import Rows
from tl_jets.core.trace import Trace
from tl_jets.jets.accuracy import Check
from tl_jets.jets.cache import JetCache
from tl_jets.jets.centers import Center
from tl_jets.jets.expand import Expansion, jet_expand
from tl_jets.paths.cache import PathCache
from tl_jets.paths.graph import count_text

REST = "rest"
MAX_CENTERS = 256


@one_look()
def reorganized_expansion(
    model: Any,
    step: str = DECODER_STEP,
    *,
    centers: Any = None,
    carried: Any = (),
    weights: Literal["uniform", "optimal"] | Sequence[float] | Tensor = "uniform",
    center_scale: CenterScale = "none",
    max_centers: int = MAX_CENTERS,
) -> ReorganizedExpansion:
    """Expand a stage at order 1, with one path per source. Symbolic; composable as `jet_expand`.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork` (whose granularity says what the steps are).
        step: A step (`3_mlp`, `L3H2`), its stream (`3_mid`), or `ln_final` for the decoder.
        centers: Centers, as in `jet_expand`; a `ReorganizedExpansion` of the previous stage adds its biases, edits and
            rest as sources. None expands every stage up to `step` at all paths so far: 2^L paths from the embeddings.
        carried: Further summands of the stream that are not centers: labels, terms or functions.
        weights: `"uniform"`, `"optimal"` (the smallest remainder), or [center] or [center, batch, pos] on the simplex.
        center_scale: Rescale centers inside gamma: `"none"`, `"match"` or `"orthogonal"`, as in `jet_expand`.
        max_centers: Refuse more: a stage of N centers costs N^2 derivatives.

    Returns:
        A `ReorganizedExpansion`: call it on an input to get a `PathCache` (for the decoder) or `JetCache`.

    Raises:
        ValueError: More than `max_centers` centers, numeric weights without centers, or what `jet_expand` refuses.

    Source: Chen et al., eq. 5, Lemma 1; the regrouping is ours.
    """
    check_integers(1, max_centers=max_centers)
    network = ResidualNetwork.of(model)
    options: dict[str, Any] = {"weights": weights, "center_scale": center_scale, "max_centers": max_centers}
    if centers is None:
        return _from_sources(network, step, options)
    given = list(centers) if isinstance(centers, (list, tuple)) else [centers]
    previous = [center for center in given if isinstance(center, ReorganizedExpansion)]
    if len(previous) > 1:
        raise ValueError(
            f"Centers may hold one reorganized expansion, that of the stage before; got {len(previous)}. Name single terms "
            f"of others: expansion['embed > 0_attn']."
        )
    plain = jet_expand(network, step, centers=centers, order=1, weights=weights, center_scale=center_scale)
    _check_count(len(plain.centers), max_centers)
    none = isinstance(carried, (list, tuple)) and not carried
    others = () if none else jet_expand(network, step, centers=carried).centers
    twice = {str(center.path) for center in plain.centers}.intersection(str(center.path) for center in others)
    if twice:
        raise ValueError(f"A source is a center or carried, not both; got {sorted(twice)} as both. Leave one out.")
    return ReorganizedExpansion(
        **{field.name: getattr(plain, field.name) for field in fields(plain)},
        carried=others,
        previous=previous[0] if previous else None,
    )


def _from_sources(network: ResidualNetwork, step: str, options: dict[str, Any]) -> ReorganizedExpansion:
    """The recursion over all stages up to a step, from the embeddings."""
    if not isinstance(options["weights"], str):
        raise ValueError("weights without centers must be 'uniform' or 'optimal', for every stage; got numbers.")
    decodes = step in (DECODER_STEP, FINAL_STREAM)
    last = len(network.stages) if decodes else network.stages.index(network.stage(step))
    steps = [[s for s in stage.steps if s.kind != "attn_bias"] for stage in network.stages[:last]]
    _check_count(len(network.sources) * math.prod(1 + len(taken) for taken in steps), options["max_centers"])
    centers: Any = list(network.sources)
    for stage in network.stages[:last]:
        centers = reorganized_expansion(network, stage.stream, centers=centers, **options)
    return reorganized_expansion(network, step, centers=centers, **options)


def _check_count(count: int, max_centers: int) -> None:
    if count > max_centers:
        raise ValueError(
            f"A reorganized expansion takes at most max_centers = {max_centers} centers, as every stage costs the square of "
            f"their number; here are {count_text(count)} at the last one. Expand fewer stages from centers that you choose "
            f"(streams, writes), take a coarser granularity, or raise max_centers; exact paths in any number are those of "
            f"exponential_expansion(model, linearize='detached')."
        )


@dataclass(frozen=True, eq=False, repr=False)
class ReorganizedExpansion(Expansion):
    """A stage expanded at order 1, with one path per source; `terms` are those of the centers.

    Sources are also `carried` and the biases, edits and rest of the expansion of the `previous` stage.
    """

    carried: tuple[Center, ...] = ()
    previous: ReorganizedExpansion | None = None

    @property
    def kind(self) -> str:
        """Name of the kind of paths."""
        return "reorganized order-1 jet"

    def __repr__(self) -> str:
        return (
            f"ReorganizedExpansion({', '.join(self.steps[:3])} of {self.network.view.name} at {len(self.centers)} centers, "
            f"{len(self)} paths, those from biases, edits and rest apart)"
        )

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps that paths pass through; the attention bias of heads is a source."""
        if self.stage is None:
            return (DECODER_STEP,)
        return tuple(step.label for step in self.stage.steps if step.kind != "attn_bias")

    def __call__(
        self,
        text_or_tokens: Any,
        *,
        positions: int | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
    ) -> JetCache:
        """Evaluate on one input.

        Args:
            text_or_tokens: A prompt, a list of prompts, token ids [batch, pos], or a `Trace`.
            positions: Positions to read, for paths of the decoder; None for all.
            attention_mask: Passed to the model (left padding needs it).
            cache: A ready `ActivationCache` of the same input.

        Returns:
            For the decoder a `PathCache`, with the `remainders` of all stages; else a `JetCache`.

        Raises:
            ValueError: Positions of an inner stage.
        """
        if positions is not None and self.stage is not None:
            raise ValueError(
                f"positions are chosen where paths are decoded; these end at {self.steps[0]}. Slice them instead: "
                f"apply_slice_to_pos_dim(...)."
            )
        found = super().__call__(text_or_tokens, attention_mask=attention_mask, cache=cache)
        return found if positions is None else found.at_rows(Rows.of(found.trace, positions))

    def check(self, cache: JetCache) -> Check:
        """Compare the sum of the paths with the plain jets, which are differentiated another way (Taylor arithmetic)."""
        trace, keep = cache.trace, cache.trace.valid
        if not cache.is_whole:
            raise ValueError(
                f"check needs a whole cache, [batch, pos] = {list(keep.shape)}; this one has {list(cache.truth.shape[:-1])}. "
                f"Evaluate without positions, and do not slice."
            )
        plain = Expansion(*(getattr(self, field.name) for field in fields(Expansion))).evaluate(trace)
        # Sources that are not centers also pass through the identity; plain jets omit them.
        others = [] if self.stage is None else [v for k, v in self.sources(trace).items() if k not in plain.terms]
        found, wanted = cache.truth - cache.remainder, plain.truth - plain.remainder
        wanted = wanted + sum(others, torch.zeros_like(wanted))
        return Check(relative_error(found[keep], wanted[keep]), plain.check().slopes, 1)

    def sources(self, trace: Trace) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """All summands of the stream by name: the centers, the carried sources, then `rest`."""
        found = {str(center.path): center.evaluate(trace) for center in self.centers}
        carried = {str(center.path): center.evaluate(trace) for center in self.carried}
        if self.previous is not None:
            carried |= self.previous.evaluate(trace).terms
        elif tuple(found) == self.network.sources:
            carried |= trace.edits(self.stream)
        found |= {
            label: value for label, value in carried.items() if label not in found and Path.parse(label).source != REST
        }
        return found | {REST: trace[self.stream] - torch.stack(list(found.values())).sum(0)}

    def _evaluate(self, trace: Trace) -> JetCache:
        with torch.inference_mode(False), torch.no_grad():
            sources, h = self.sources(trace), trace[self.stream]
            n, values = len(self.centers), torch.stack([value.detach().clone() for value in sources.values()])
            norm = trace.decoder.norm
            truth = norm(h) if self.stage is None else h + trace.writes(self.stage).sum(0)
            # The sum of the jets is that of the plain form, so the optimal weights are the same.
            jets = self._jets(trace, values[:n]).sum(0) if self.weights == "optimal" else values[:n]
            weights, solution = self._weights(trace, jets, values[:n], truth)
            scaled = rescaled(norm, values[:n], h, self.center_scale)
            if self.stage is None:
                paths = norm_paths(norm, scaled, values, weights[..., None].to(values))
                return self._decoded(trace, dict(zip(sources, paths, strict=True)), truth)
            paths, constants = self._inner_paths(trace, scaled, values, weights[..., None].to(values))
            terms = self._named(trace, list(sources), values, paths, constants)
            following = trace.edits(self.network.next_stream(self.stage))
            truth = truth + sum(following.values(), torch.zeros_like(truth))
            return JetCache.of(self, trace, {**terms, **following}, weights=weights, truth=truth, solution=solution)

    def _inner_paths(self, trace: Trace, scaled: Tensor, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Paths of all sources through the stage [step, source, ...], and gamma at zero [step, ...]."""
        assert self.stage is not None
        gammas = trace.stage_function(self.stage)
        constants = gammas(torch.zeros_like(values[0]))
        if not bool(constants[:, trace.valid].isfinite().all()):
            raise ValueError(
                f"A stage must be finite for a stream of zero, where its bias is read; {self.steps[0]} is not (a norm with "
                f"eps = 0?). Use jet_expand, whose terms share the bias among them."
            )
        tangents = Tangents(gammas)
        paths = values.new_zeros(len(constants), *values.shape)
        for i, (center, weight) in enumerate(zip(scaled, weights, strict=True)):
            value, derivatives = tangents(center, torch.cat([values, center[None]]))
            paths += weight * derivatives[:, :-1]
            paths[:, i] += weight * (value - constants - derivatives[:, -1])
        return paths, constants

    def _named(
        self, trace: Trace, labels: list[str], values: Tensor, paths: Tensor, constants: Tensor
    ) -> dict[str, Tensor]:
        """Terms by name: first those of `self.terms`, then carried sources, biases last."""
        assert self.stage is not None
        n, rows = len(self.centers), [i for i, s in enumerate(self.stage.steps) if s.kind != "attn_bias"]
        terms = {}
        for part in (slice(0, n), slice(n, None)):
            terms |= dict(zip(labels[part], values[part], strict=True))
            for row in rows:
                through = [str(Path.parse(label).then(self.stage.steps[row].label)) for label in labels[part]]
                terms |= dict(zip(through, paths[row, part], strict=True))
        for label, steps in frozen_biases([self.stage])[0]:
            constant = constants[steps].sum(0)
            if bool(constant[trace.valid].any()):
                terms[label] = constant
        return terms

    def _decoded(self, trace: Trace, paths: dict[str, Tensor], truth: Tensor) -> PathCache:
        """The paths through the decoder, and its own bias, as a PathCache."""
        norm, b_U = trace.decoder.norm, trace.decoder.b_U
        terms = {str(Path.parse(label).then(DECODER_STEP)): path for label, path in paths.items()}
        if (norm.bias is not None and bool(norm.bias.any())) or bool(b_U.any()):
            terms[DECODER_STEP + BIAS] = norm.add_bias(torch.zeros_like(truth))
        weights = truth.new_tensor([float(label == DECODER_STEP + BIAS) for label in terms])
        remainders, stage = {}, self
        while stage is not None:
            stream, rest = trace[stage.stream][trace.valid], stage.sources(trace)[REST][trace.valid]
            remainders[stage.stream] = float(rest.norm() / stream.norm())
            stage = stage.previous
        found = PathCache.of(
            self,
            trace,
            terms,
            weights=weights[:, None, None].expand(-1, *truth.shape[:-1]),
            truth=truth,
            columns=list(range(truth.shape[1])),
        )
        ordered = dict(reversed(remainders.items())) | {DECODER_STEP: found.relative_remainder}
        return replace(found, remainders=ordered)


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
        coefficients = torch.stack([lift(out, 2) for out in found], 2)
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
