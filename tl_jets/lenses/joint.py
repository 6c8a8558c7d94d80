r"""The joint jet lens: the model's logits as one weighted sum over components.

.. math::
    \text{logits} \approx \sum_i w_i \, U J^k \gamma_{L+1}(x_i)(h_L) + b_U ,

with the embeddings and the writes of blocks, sublayers or heads as x_i, and weights on the simplex that are optimal for a
stated objective, certified by `gap`. Uniform weights stand beside, and random centers of equal norm and angle (the control)
with weights of either kind: what the weights achieve is told apart from what the components hold.

Detached (``linearize="detached"``), the final norm keeps the scale that it has at h_L, and the logits are the sum as it is, of
every component's direct logit attribution (embeddings included) and of the final norm's bias and b_U (`ln_final_bias`): all
weights are 1, nothing remains and nothing is optimized or borrowed.

Either way logits are additive, so that a component's share in the logit of a target is exact: `effects`, which sum to the
centered logit that the weighted sum gives to it (detached, that is the model's own).

Example:
    >>> import tl_jets as tj
    >>> prompt = "This function is available on Unix and"
    >>> attribution = joint_jet_lens(tj.load_tinydocs(), prompt, targets=[" is", " Windows"], linearize="detached")
    >>> is_, windows = attribution.effects[:, 0, -1].T
    >>> max(zip((is_ - windows).tolist(), attribution.labels))[1]  # favors " is" most
    '3_mlp_out'

Source: Chen et al., *Jet Expansions of Residual Computation*, section 4 (joint jet lens), Lemma 1.
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
        labels: Components, aligned to the center axis: `embed`, `0_attn_out`, ..., `edit:<hook>`; detached, `ln_final_bias`.
        order: k.
        objective: What the weights minimize; `"uniform"` or `"given"` if they were not optimized, `"detached"` if there
            is nothing to weigh.
        center_scale: How centers were rescaled.
        linearize: `"jet"`, or `"detached"`, whose weights are all 1.
        positions: Positions in the prompt, aligned to the pos axis.
        tokens: The tokens at those positions [batch, pos].
        valid: Which of them are real [batch, pos].
        weights: w on the simplex [center, batch, pos]; detached, 1.
        gap: Certificate: the objective is at most this above its minimum [batch, pos], relative to the squared length
            of the model's logits, or in nats for "kl"; None for given or uniform weights.
        effective_rank: How many of the centers' weights the data identify [batch, pos]; None with `gap`.
        rho: Radius ratio of each center's series [center, batch, pos]; NaN if detached, which is no series.
        alpha: Coefficient of each center's own reading; 0 for `ln_final_bias`, a constant.
        beta: Coefficient of the model's own answer in each center's jet.
        effects: Logits that each center's weighted jet adds to each target, beyond the mean of the vocabulary
            [center, batch, pos, target]. They sum to the lens' own centered logits.
        target_ids: Token ids [batch, pos, target].
        target_names: How they were asked for; `<answer>` is the model's own best token.
        borrowed_share: Share of the model's own answer in the weighted sum [batch, pos].
        top_ids: Best tokens of the weighted sum [batch, pos, k].
        full_values: Their additive logits [batch, pos, k].
        own_values: The same without the model's own answer [batch, pos, k].
        own_top_ids: Best token without the model's own answer [batch, pos].
        model_top_ids: The model's best token [batch, pos].
        measures: How close to the model the sum is; each measure [batch, pos].
        uniform: The same for uniform weights; detached, that of `measures`.
        control: The same for random centers of equal norm and angle, with weights optimized for them in the same way; with
            the lens' own weights where these were not optimized (uniform, given, or 1).
        unit: What effects and logits are measured in: `"logits"`, or `"logits before the softcap"`.
        tokenizer: The model's tokenizer, or None.
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
        """Positions whose best token is not that of the sum without the model's own answer."""
        return (self.top_ids[..., 0] != self.own_top_ids) & self.valid

    def top_tokens(self, tokenizer: Any = None) -> Any:
        """Decoded best tokens of the weighted sum, nested lists [batch][pos][k]."""
        return decode(tokenizer or self.tokenizer, self.top_ids)

    def center_top_tokens(self, k: int = 1) -> TopTokens:
        """Best tokens of each center's own jet J^order(x_i) alone [center, batch, pos, k]; read when asked for.

        A jet carries the final norm's bias and b_U; a detached term does not, `ln_final_bias` does.
        """
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
        """What every center's weighted jet adds to the logits of its own best tokens; to given ones, `effects`.

        Args:
            k: How many best tokens.
            prompt: Index of the prompt.
            places: Indices along the pos axis; None for all.
            labels: Centers; None for all.

        Returns:
            Additive logits beyond the mean of the vocabulary, best first, and ids [center, place, k]; NaN and -1 at padding.
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
        """The measures of the control's random centers with uniform weights (detached, those of `control`). Each [batch, pos].

        So what solving for weights gains is told apart from what the components hold: `uniform` against `measures` for components,
        `control_uniform` against `control` for random centers. Read when first asked for: two rows of the product with W_U.
        """
        centers, (total, variate) = self._centers, self._random
        decoder, rows = centers.decoder, centers.rows
        with torch.no_grad():
            scan = _scan_sums(centers.network, total[None], total.new_zeros(len(total)), variate, 1, CHUNK_SIZE, None)
            found = geometry(decoder, total[None], decoder.norm(variate.double()))
            measures = Measures.of(rows.spread, {name: v[0] for name, v in found.items()}, scan, (0, 0))
        return measures.map(lambda values: values.to(self.weights.device))

    def average(self) -> pd.DataFrame:
        """The measures of the sum, of uniform weights and of both controls, averaged over real positions."""
        kinds = {"weighted": self.measures, "uniform": self.uniform}
        kinds |= {"control": self.control, "control_uniform": self.control_uniform}
        means = {kind: measures.mean() for kind, measures in kinds.items()}
        rows = [{"weights": kind, **{name: float(v) for name, v in mean.items()}} for kind, mean in means.items()]
        return pd.DataFrame(rows)

    def to_dataframe(self, tokenizer: Any = None) -> pd.DataFrame:
        """One row a center, batch, real position and target.

        Columns: center, batch, pos, token (read at that position), weights, rho, alpha, beta (no such columns if detached:
        there is nothing to weigh), token_index and token_string (the center's own best token), target, effect.
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
    """The model's logits as a weighted sum over components, with optimal weights, a token at a time.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork` (keep one to share the metric and the self-check).
        text_or_tokens: A prompt, a list of prompts, token ids [batch, pos], or a `Trace`.
        order: k >= 0 of each component's jet of the final norm.
        granularity: What the components are: `"block"`, `"sublayer"` or `"head"`. None is the network's own, which is
            `"sublayer"` (attention and MLP) for a model, and for a `ResidualNetwork` that was made without another.
        embeddings: Whether the embeddings are components, too.
        weights: `"optimal"` (None), `"uniform"`, or numbers on the simplex, [center] or
            [center, batch, pos] aligned with `positions`.
        objective: What optimal weights minimize: the distance to the model's logits up to a constant a token
            (`"centered_l2"`), as they are (`"l2"`, the paper's), or KL(model || sum) (`"kl"`, nats).
        positions: Positions to read; None for all.
        center_scale: Length of the centers: `"none"`, `"match"` or `"orthogonal"`.
        linearize: `"jet"`, or `"detached"`: direct logit attribution to every component, with the final norm's scale at
            the final stream; takes no order above 0, weights, objective or center_scale.
        targets: Tokens to report the effects on: strings or ids (the same everywhere), one list of them a prompt
            (`[[" Paris"], [" Rome"]]`), or a tensor of ids [batch, pos] or [batch, pos, target] aligned with `positions`; None
            for the model's own best token.
        top_k: How many best tokens a position keeps.
        seed: Of the random control, whose directions depend on it, the center and the position in the prompt alone: all prompts
            share them, and for the spread of a control several seeds are needed.
        attention_mask: Passed to the model (left padding needs it).
        cache: A ready `ActivationCache` of the same input.
        chunk_size: Positions whose weights are solved at once.

    Returns:
        A `JointJetLens`. Edits by the user's hooks on the stream are components of their own (`edit:<hook>`).

    Raises:
        ValueError: Bad order, position, option, weights, target or input; the message says what must hold.
        TypeError: Targets of the wrong type.
        NotImplementedError: `objective="kl"` on a model with a final softcap.

    Source:
        Chen et al., section 4, Lemma 1.

    Cost:
        A forward pass and, a position, a quadratic program with as many variables as components, solved twice (the
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
    """Weights [row, center], and the solution if they were solved."""
    n = len(jets)
    if isinstance(weights, str) and weights == "optimal":
        parts = [
            decoder_weights(network, jets[:, start : start + chunk_size], truth[start : start + chunk_size], objective)
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
    """Read the weighted sums [sum, row, d_model]; the first is split into its own part and what it borrows."""
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
    """Length of the beta part over the sum of the lengths of both parts, logits centered over the vocabulary."""
    if not borrowed.any():
        return torch.zeros_like(borrowed)
    norm, metric = network.decoder.norm, network.decoder.metric(centered=True)
    shared = borrowed[:, None] * weighted(norm, norm.center(variate.double()))
    own = total - shared if norm.bias is None else total - shared - norm.bias
    lengths = metric.norm(shared, 0.0), metric.norm(own, 0.0)
    return torch.where(borrowed == 0, 0, lengths[0] / (lengths[0] + lengths[1]))
