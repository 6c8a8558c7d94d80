r"""The joint jet lens: the model's logits as one weighted sum over components.

.. math::
    \text{logits} \approx \sum_i w_i \, U J^k \gamma_{L+1}(x_i)(h_L) + b_U ,

The x_i are the embeddings and the writes of blocks, sublayers or heads; the weights on the simplex minimize a stated
objective, with `gap` as certificate. Results also contain uniform weights and a control, random centers of equal norm
and angle. Detached (``linearize="detached"``), the final norm keeps its scale at h_L, and the logits are exactly the
sum of all components' direct logit attributions and of `ln_final_bias` (the final norm's bias and b_U). `effects` are
exact shares of components in a target's logit, and sum to the centered logit of the weighted sum. Source: Chen et al.,
*Jet Expansions of Residual Computation*, section 4 (joint jet lens), Lemma 1.

Example:
    >>> import tl_jets as tj
    >>> prompt = "This function is available on Unix and"
    >>> attribution = joint_jet_lens(tj.load_tinydocs(), prompt, targets=[" is", " Windows"], linearize="detached")
    >>> is_, windows = attribution.effects[:, 0, -1].T
    >>> max(zip((is_ - windows).tolist(), attribution.labels))[1]  # favors " is" most
    '3_mlp_out'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_jets.calculus import CenterScale, norm_jet
from tl_jets.core.attribution import mean_logits
from tl_jets.core.decoder import in_unit
from tl_jets.core.frozen_network import Linearize, affine_labels, check_detached, read_order
from tl_jets.core.lens_logits import Mixture, MixtureScan, scan_mixture
from tl_jets.core.logit_reader import CHUNK_SIZE
from tl_jets.core.measures import Measures, geometry, weighted
from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.protocol import FINAL_STREAM, Granularity
from tl_jets.core.readout import TopTokens, top_tokens
from tl_jets.core.selection import ANSWER, Rows, TargetInput, check_options, model_logits, read_targets
from tl_jets.core.tokens import decode, token_names
from tl_jets.jets.expand import OBJECTIVES, Objective, decoder_weights
from tl_jets.jets.simplex import SimplexSolution
from tl_jets.jets.weights import read_weights, uniform_weights
from tl_jets.lenses.centers import Centers
from tl_jets.lenses.result import LensResult


@dataclass(frozen=True, eq=False, repr=False)
class JointJetLens(LensResult):
    """The model's logits as a weighted sum over components. Axes: [center, batch, pos]; NaN (ids: -1) at padding.

    Attributes:
        labels: Components: `embed`, `0_attn_out`, ..., `edit:<hook>`; detached, `ln_final_bias`.
        objective: Objective of the weights; `"uniform"`, `"given"` or `"detached"` if they were not optimized.
        weights: w on the simplex; detached, 1.
        gap: Bound on the objective's excess over its minimum, relative to |logits|^2, or in nats for "kl" [batch, pos].
        effective_rank: Number of weights that the data identify [batch, pos]; None, like `gap`, if not optimized.
        rho: Radius ratio of each center's series; NaN if detached.
        alpha: Coefficient of each center's own reading; 0 for `ln_final_bias`.
        beta: Coefficient of the model's own answer in each center's jet.
        effects: Logits that each center's weighted jet adds to each target, less the vocabulary's mean [..., target].
        target_names: The targets as given; `<answer>` is the model's own best token.
        borrowed_share: Share of the model's own answer in the weighted sum [batch, pos].
        top_ids: Best tokens of the weighted sum, with additive logits `full_values` [batch, pos, k].
        own_values: Their logits without the model's own answer [batch, pos, k]; the best token then is `own_top_ids`.
        measures: Measures of the sum against the model [batch, pos].
        uniform: The same for uniform weights; detached, equal to `measures`.
        control: The same for random centers, with their own optimal weights if the lens' weights are optimized.
    """

    labels: list[str]
    order: int
    objective: str
    center_scale: CenterScale
    linearize: Linearize
    positions: list[int]
    tokens: Int[Tensor, "batch pos"]
    valid: Bool[Tensor, "batch pos"]
    weights: Float[Tensor, "center batch pos"]
    gap: Float[Tensor, "batch pos"] | None
    effective_rank: Int[Tensor, "batch pos"] | None
    rho: Float[Tensor, "center batch pos"]
    alpha: Float[Tensor, "center batch pos"]
    beta: Float[Tensor, "center batch pos"]
    effects: Float[Tensor, "center batch pos target"]
    target_ids: Int[Tensor, "batch pos target"]
    target_names: list[str | int]
    borrowed_share: Float[Tensor, "batch pos"]
    top_ids: Int[Tensor, "batch pos k"]
    full_values: Float[Tensor, "batch pos k"]
    own_values: Float[Tensor, "batch pos k"]
    own_top_ids: Int[Tensor, "batch pos"]
    model_top_ids: Int[Tensor, "batch pos"]
    measures: Measures
    uniform: Measures
    control: Measures
    unit: str
    tokenizer: Any
    _centers: Centers
    _random: _Sum

    def __repr__(self) -> str:
        kind = f"order {self.order}" if self.linearize == "jet" else self.linearize
        return (
            f"JointJetLens({len(self.labels)} centers, {kind}, tokens {list(self.tokens.shape)}, "
            f"objective={self.objective!r}, center_scale={self.center_scale!r}{in_unit(self.unit)})"
        )

    @property
    def borrowed(self) -> Bool[Tensor, "batch pos"]:
        """Positions whose best token differs from that of the sum without the model's own answer."""
        return (self.top_ids[..., 0] != self.own_top_ids) & self.valid

    def top_tokens(self, tokenizer: Any = None) -> Any:
        """Decoded best tokens of the weighted sum, nested lists [batch][pos][k]."""
        return decode(tokenizer or self.tokenizer, self.top_ids)

    def center_top_tokens(self, k: int = 1) -> TopTokens:
        """Best tokens of each center's own jet, with its biases [center, batch, pos, k]; computed on request."""
        centers = self._centers
        bias_weight = centers.constants[:, None].expand(centers.jets.shape[:-1])
        found = top_tokens(centers.decoder, centers.jets, bias_weight=bias_weight, k=k)
        spread = centers.rows.spread
        return TopTokens(spread(found.values, -2), spread(found.indices, -2, -1))

    def contributions(
        self,
        k: int = 1,
        *,
        prompt: int = 0,
        places: Sequence[int] | None = None,
        labels: Sequence[str] | None = None,
    ) -> TopTokens:
        """Additive logits that each center's weighted jet adds to its own k best tokens, less the vocabulary's mean.

        For one `prompt`, at `places` of the pos axis, and for some `labels` (None for all). Returns values and ids
        [center, place, k], best first; NaN and -1 at padding.
        """
        centers, decoder = self._centers, self._centers.decoder
        wanted = list(range(len(self.positions))) if places is None else [p % len(self.positions) for p in places]
        keep = centers.rows.keep
        here = keep[prompt, wanted]
        row_of = (keep.flatten().cumsum(0) - 1).view_as(keep)[prompt, wanted][here]
        chosen = [self.labels.index(label) for label in (self.labels if labels is None else labels)]
        jets = centers.jets[chosen][:, row_of]
        weights = self.weights[chosen][:, prompt, wanted].to(jets)[:, here]
        constants = centers.constants[chosen, None].expand(jets.shape[:-1])
        found = top_tokens(decoder, jets, bias_weight=constants, k=k)
        means = mean_logits(decoder, jets, constants)
        values = found.values.new_full((*weights.shape[:1], len(wanted), k), float("nan"))
        indices = found.indices.new_full(values.shape, -1)
        values[:, here] = (weights[..., None] * (found.values - means[..., None])).to(values)
        indices[:, here] = found.indices
        return TopTokens(values, indices)

    @cached_property
    def control_uniform(self) -> Measures:
        """Measures of the control's random centers with uniform weights; `control` shows what optimal weights gain."""
        centers, (total, variate) = self._centers, self._random
        decoder, rows = centers.decoder, centers.rows
        with torch.no_grad():
            scan = _scan_sums(centers.network, total[None], total.new_zeros(len(total)), variate, 1, CHUNK_SIZE, None)
            found = geometry(decoder, total[None], decoder.norm(variate.double()))
            measures = Measures.of(rows.spread, {name: v[0] for name, v in found.items()}, scan, (0, 0))
        return measures.map(lambda values: values.to(self.weights.device))

    def average(self) -> pd.DataFrame:
        """Measures of the sum, of uniform weights and of both controls, averaged over real positions."""
        kinds = {"weighted": self.measures, "uniform": self.uniform}
        kinds |= {"control": self.control, "control_uniform": self.control_uniform}
        means = {kind: measures.mean() for kind, measures in kinds.items()}
        rows = [{"weights": kind, **{name: float(v) for name, v in mean.items()}} for kind, mean in means.items()]
        return pd.DataFrame(rows)

    def to_dataframe(self, tokenizer: Any = None) -> pd.DataFrame:
        """One row per center, batch, real position and target.

        Columns: center, batch, pos, token, weights, rho, alpha, beta (if jets), token_index, token_string, target,
        effect.
        """
        tokenizer = tokenizer or self.tokenizer
        top = self.center_top_tokens(1)
        names = token_names(tokenizer, [top.indices, self.tokens, self.target_ids])
        numbers = () if self.linearize == "detached" else ("weights", "rho", "alpha", "beta")
        targets, effects = self.target_ids.tolist(), self.effects.tolist()
        rows = []
        for i, label in enumerate(self.labels):
            for b, p in self.valid.nonzero().tolist():
                row = {"center": label, "batch": b, "pos": self.positions[p]}
                row["token"] = names[int(self.tokens[b, p])]
                row |= {name: float(getattr(self, name)[i, b, p]) for name in numbers}
                row["token_index"] = int(top.indices[i, b, p, 0])
                row["token_string"] = names[row["token_index"]]
                for target, effect in zip(targets[b][p], effects[i][b][p], strict=True):
                    rows.append(row | {"target": names[target], "effect": effect})
        return pd.DataFrame(rows)


def joint_jet_lens(
    model: Any,
    text_or_tokens: Any,
    *,
    order: int = 0,
    granularity: Granularity | None = None,
    embeddings: bool = True,
    weights: Literal["optimal", "uniform"] | Sequence[float] | Tensor | None = None,
    objective: Objective = "centered_l2",
    positions: int | Sequence[int] | None = None,
    center_scale: CenterScale = "none",
    linearize: Linearize = "jet",
    targets: TargetInput | None = None,
    top_k: int = 5,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    chunk_size: int = CHUNK_SIZE,
) -> JointJetLens:
    """The model's logits as a weighted sum over components with weights per token, as a `JointJetLens`.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork`, which shares computations between calls.
        text_or_tokens: A prompt, a list of prompts, token ids [batch, pos], or a `Trace`.
        order: Order k >= 0 of each component's jet.
        granularity: `"block"`, `"sublayer"` or `"head"`; None is the network's own, `"sublayer"` for a model.
        embeddings: Whether the embeddings are components.
        weights: `"optimal"` (None), `"uniform"`, or numbers on the simplex, [center] or [center, batch, pos].
        objective: Distance to logits up to a constant (`"centered_l2"`), as they are (`"l2"`, the paper's), or `"kl"`.
        positions: Positions to read, with which `weights` and ids by position are aligned; None for all.
        center_scale: Length of the centers: `"none"`, `"match"` or `"orthogonal"`.
        linearize: `"jet"`, or `"detached"` (direct logit attribution), without order, weights, objective, center_scale.
        targets: Strings or ids, a list per prompt, or ids [batch, pos(, target)]; None for the model's best token.
        top_k: Number of best tokens per position.
        seed: Seed of the control, whose directions all prompts share.
        attention_mask: Passed to the model (left padding needs it).
        cache: A ready `ActivationCache` of the same input.
        chunk_size: Positions whose weights are solved at once.

    Raises:
        ValueError: Bad order, position, option, weights, target or input; the message says what must hold.
        TypeError: Targets of the wrong type.
        NotImplementedError: `objective="kl"` on a model with a final softcap.

    Source: Chen et al., section 4, Lemma 1. Cost: A forward pass and two quadratic programs per position (one for the
    control); "kl" needs all components' logits.
    """
    check_options(center_scale, top_k, chunk_size)
    order = read_order(linearize, order, 0)
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {OBJECTIVES}; got {objective!r}.")
    is_detached = linearize == "detached"
    if is_detached:
        check_detached(order=order, weights=weights, objective=objective, center_scale=center_scale)
    weights = "optimal" if weights is None else weights
    network = ResidualNetwork.of(model, granularity)
    trace = trace_of(network, text_or_tokens, attention_mask, cache)
    rows = Rows.of(trace, positions)
    ids, asked = read_targets(network, targets, rows)
    labels = [label for label in network.components if embeddings or label not in network.sources]
    labels += [label for stream in network.streams for label in trace.edits(stream)]
    with torch.no_grad():
        values = torch.stack([rows.take(trace[label]) for label in labels])
        variate = rows.take(trace[FINAL_STREAM])
        if is_detached:
            labels += affine_labels(None)[1]
            values = torch.cat([values, torch.zeros_like(values[:1])])
            centers = Centers.detached(network, rows, values, variate)
        else:
            centers = Centers.of(network, rows, values, variate, order, center_scale)
        truth = network.decoder.norm(variate.double())
        random = centers.randomized(values, variate, seed)
        if is_detached:
            chosen = uniform = of_random = truth.new_ones(len(truth), len(labels))
            solution, optimized = None, linearize
        else:
            chosen, solution = _choose(network, centers.jets, truth, weights, objective, rows, chunk_size)
            uniform = uniform_weights(len(labels), len(truth), device=truth.device)
            of_random, _ = _choose(network, random.jets, truth, weights, objective, rows, chunk_size)
            optimized = objective if solution is not None else weights if isinstance(weights, str) else "given"
        sums = torch.stack([centers.sum(chosen), centers.sum(uniform), random.sum(of_random)])
        borrowed = (chosen * centers.beta.T).sum(-1)
        scan = _scan_sums(network, sums, borrowed, variate, top_k, chunk_size, model_logits(trace, rows))
        assert scan.own_top1 is not None  # the scan measures
        found = geometry(network.decoder, sums, truth)
        measures = [Measures.of(rows.spread, {name: v[i] for name, v in found.items()}, scan, (i, 0)) for i in range(3)]
        spread = rows.spread
        answers = spread(scan.model.top.indices[:, 0], fill=-1)
        names: list[str | int] = [ANSWER] if asked is None else asked
        ids = answers[..., None] if ids is None else ids
        return JointJetLens(
            labels=labels,
            order=order,
            objective=optimized,
            center_scale=center_scale,
            linearize=linearize,
            positions=rows.positions,
            tokens=trace.tokens[:, rows.positions],
            valid=rows.keep,
            weights=spread(chosen.T),
            gap=None if solution is None else spread(solution.gap),
            effective_rank=None if solution is None else spread(solution.effective_rank, fill=-1),
            rho=spread(centers.rho),
            alpha=spread(centers.alpha),
            beta=spread(centers.beta),
            effects=spread(chosen.T[..., None] * centers.effects(ids[rows.keep]), 1),
            target_ids=ids,
            target_names=names,
            borrowed_share=spread(_borrowed_share(network, sums[0], borrowed, variate)),
            top_ids=spread(scan.top.indices[0, 0], -2, -1),
            full_values=spread(scan.top.values[0, 0], -2),
            own_values=spread(scan.own_values[0, 0], -2),
            own_top_ids=spread(scan.own_top1[0, 0], fill=-1),
            model_top_ids=answers,
            measures=measures[0],
            uniform=measures[1],
            control=measures[2],
            unit=network.decoder.unit,
            tokenizer=network.tokenizer,
            _centers=centers,
            _random=_Sum(random.sum(uniform), variate),
        )


class _Sum(NamedTuple):
    """A weighted sum of centers, and the final stream [row, d_model]."""

    total: Tensor
    variate: Tensor


def _choose(
    network: ResidualNetwork,
    jets: Tensor,
    truth: Tensor,
    weights: Any,
    objective: Objective,
    rows: Rows,
    chunk_size: int,
) -> tuple[Tensor, SimplexSolution | None]:
    """Weights [row, center], and the solution if they were optimized."""
    n = len(jets)
    if isinstance(weights, str) and weights == "optimal":
        parts = [
            decoder_weights(
                network.decoder, jets[:, start : start + chunk_size], truth[start : start + chunk_size], objective
            )
            for start in range(0, len(truth), chunk_size)
        ]
        solution = SimplexSolution.cat(parts)
        return solution.weights, solution
    if isinstance(weights, str) and weights == "uniform":
        return uniform_weights(n, len(truth), device=truth.device), None
    if isinstance(weights, str):
        raise ValueError(f"weights must be 'optimal', 'uniform' or numbers on the simplex; got {weights!r}.")
    given = weights if isinstance(weights, Tensor) else torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if given.ndim == 3 and given.shape[1:] == rows.keep.shape:
        given = given[:, rows.keep.to(given.device)]  # padding may hold NaN, as a lens' own weights do
    elif given.ndim > 1:
        raise ValueError(
            f"weights must be [center] or [center, batch, pos] with batch and pos {tuple(rows.keep.shape)}, aligned "
            f"with positions; got shape {tuple(given.shape)}."
        )
    return read_weights(given, n).movedim(0, -1).to(truth).expand(len(truth), n), None


def _scan_sums(
    network: ResidualNetwork,
    sums: Tensor,
    borrowed: Tensor,
    variate: Tensor,
    top_k: int,
    chunk_size: int,
    given: Callable[[slice], Tensor] | None,
) -> MixtureScan:
    """Read weighted sums [sum, row, d_model]; the first is split into its own and its borrowed part."""
    norm, (n, n_rows) = network.decoder.norm, sums.shape[:2]
    shared = weighted(norm, norm.center(variate.double()))
    beta = sums.new_zeros(n, 1, n_rows)
    beta[0, 0] = borrowed
    own = sums - beta[:, 0, :, None] * shared
    own = own if norm.bias is None else own - norm.bias
    gamma = norm_jet(norm, variate.double(), variate.double(), 0).alpha[0]
    dtype = variate.dtype
    mixture = Mixture(
        own.to(dtype), shared.to(dtype), torch.ones_like(beta).to(dtype), beta.to(dtype), gamma.to(dtype), norm.bias
    )
    return scan_mixture(network.decoder, mixture, top_k=top_k, model_logits=given, chunk_size=chunk_size)


def _borrowed_share(network: ResidualNetwork, total: Tensor, borrowed: Tensor, variate: Tensor) -> Tensor:
    """Length of the beta part over the sum of both lengths, logits centered over the vocabulary."""
    if not borrowed.any():
        return torch.zeros_like(borrowed)
    norm, metric = network.decoder.norm, network.decoder.metric(centered=True)
    shared = borrowed[:, None] * weighted(norm, norm.center(variate.double()))
    own = total - shared if norm.bias is None else total - shared - norm.bias
    lengths = metric.norm(shared, 0.0), metric.norm(own, 0.0)
    return torch.where(borrowed == 0, 0, lengths[0] / (lengths[0] + lengths[1]))
