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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.calculus import CenterScale
from tl_jets.core.attribution import mean_logits
from tl_jets.core.changes import one_look
from tl_jets.core.decoder import in_unit
from tl_jets.core.frozen_network import Linearize, check_detached, read_order
from tl_jets.core.labels import LabelInput, is_label, read_label
from tl_jets.core.logit_reader import CHUNK_SIZE, TopTokens, top_tokens
from tl_jets.core.measures import MEASURES, Measures, geometry
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.options import check_choice
from tl_jets.core.protocol import Granularity
from tl_jets.core.results import handle
from tl_jets.core.selection import ANSWER, TargetInput, check_options, positions_at
from tl_jets.core.tokens import nested_texts, token_names
from tl_jets.jets.weights import OBJECTIVES, Objective, decoder_weights, read_weights, uniform_weights
from tl_jets.lenses.centers import Centers, Components
from tl_jets.lenses.results import LensInput, LensResult, table


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
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
        control_uniform: The same for random centers with uniform weights; `control` shows what optimal weights gain.
        token_names: Texts of the ids.
        sinks: Positions that `average` leaves out.
        n_layers: Number of blocks of the model.
        model: Name of the model and a digest of its weights, which `concat` compares; None: not known.
        seed: Seed of the control.
    """

    order: int
    objective: str
    weights: Float[Tensor, "center batch pos"]
    gap: Float[Tensor, "batch pos"] | None
    effective_rank: Int[Tensor, "batch pos"] | None
    rho: Float[Tensor, "center batch pos"]
    alpha: Float[Tensor, "center batch pos"]
    beta: Float[Tensor, "center batch pos"]
    effects: Float[Tensor, "center batch pos target"]
    measures: Measures
    uniform: Measures
    control: Measures
    control_uniform: Measures
    target_ids: Int[Tensor, "batch pos target"]
    target_names: list[str | int]
    centers: Components | None = handle()

    def __repr__(self) -> str:
        kind = f"order {self.order}" if self.linearize == "jet" else self.linearize
        return (
            f"JointJetLens({len(self.labels)} centers, {kind}, tokens {list(self.tokens.shape)}, "
            f"objective={self.objective!r}, center_scale={self.center_scale!r}{in_unit(self.unit)}"
            f"{self._left_out()})"
        )

    def __getitem__(self, label: LabelInput) -> Float[Tensor, "batch pos target"]:
        """The effects of one component: `joint["3_mlp_out"]`, `joint["mlp_out", 3]`, `joint["blocks.3.hook_mlp_out"]`."""
        wanted = label if self.n_layers is None or not is_label(label) else read_label(label, self.n_layers)
        if wanted not in self.labels:
            raise ValueError(f"A joint lens is indexed by one of its components, {self.labels}; got {label!r}.")
        return self.effects[self.labels.index(wanted)]

    def top_tokens(self, tokenizer: Any = None) -> Any:
        """Decoded best tokens of the weighted sum, nested lists [batch][pos][k]."""
        return nested_texts(self._names(tokenizer), self.top_ids)

    def center_top_tokens(self, k: int = 1) -> TopTokens:
        """Best tokens of each center's own jet, with its biases [center, batch, pos, k]; computed on request."""
        components = self._centers()
        found = [
            top_tokens(part.decoder, part.jets, bias_weight=part.bias_weights, k=k)
            for part in map(components.at, components.tiles)
        ]
        values, indices = (torch.cat([getattr(part, name) for part in found], 1) for name in ("values", "indices"))
        spread = components.rows.spread
        return TopTokens(spread(values, -2), spread(indices, -2, -1))

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
        components = self._centers()
        wanted = list(range(self.tokens.shape[1])) if places is None else list(places)
        chosen = [self.labels.index(label) for label in (self.labels if labels is None else labels)]
        keep = components.rows.keep
        here = keep[prompt, wanted]
        row = (keep.flatten().cumsum(0) - 1).view_as(keep)[prompt, wanted][here]
        centers = components.at(row, [components.labels[i] for i in chosen])
        found = top_tokens(centers.decoder, centers.jets, bias_weight=centers.bias_weights, k=k)
        beyond = found.values - mean_logits(centers.decoder, centers.jets, centers.bias_weights)[..., None]
        values = self.weights.new_full((len(chosen), len(wanted), k), float("nan"))
        indices = found.indices.new_full(values.shape, -1)
        values[:, here] = self.weights[chosen][:, prompt, wanted][:, here, None] * beyond.to(values)
        indices[:, here] = found.indices.to(indices)
        return TopTokens(values, indices)

    def texts(self, ids: Int[Tensor, "*any"]) -> Mapping[int, str]:
        """Texts of any ids, while the model is there: those of `center_top_tokens` and `contributions`, too."""
        return token_names(self._centers().trace.network.tokenizer, [ids]) | self.token_names

    def _centers(self) -> Components:
        if self.centers is None:
            raise ValueError(
                "Single components are decoded by the model, which a loaded or concatenated lens is without. Run the lens."
            )
        return self.centers

    def _columns(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        kinds = {"weighted": self.measures, "uniform": self.uniform}
        kinds |= {"control": self.control, "control_uniform": self.control_uniform}
        columns = {name: torch.stack([getattr(own, name) for own in kinds.values()]) for name in MEASURES}
        return [{"weights": kind} for kind in kinds], columns

    def to_dataframe(self, tokenizer: Any = None) -> pd.DataFrame:
        """One row per center, batch, real position and target.

        Columns: center, batch, pos, token, weights, rho, alpha, beta (if jets), token_index, token_string (not if the
        lens was loaded), target, effect.
        """
        center, b, p, t = self.valid[None, :, :, None].expand_as(self.effects).nonzero().T
        columns = {"center": [self.labels[i] for i in center], "batch": b, "pos": positions_at(self.positions, b, p)}
        numbers = () if self.linearize == "detached" else ("weights", "rho", "alpha", "beta")
        columns |= {"token": self.tokens[b, p], **{name: getattr(self, name)[center, b, p] for name in numbers}}
        names = self._names(tokenizer)
        if self.centers is not None:
            best = self.center_top_tokens(1).indices[..., 0]
            names = self.texts(best) if tokenizer is None else self._names(tokenizer, best)
            columns |= {"token_index": best[center, b, p], "token_string": best[center, b, p]}
        columns |= {"target": self.target_ids[b, p, t], "effect": self.effects[center, b, p, t]}
        ids = {key: columns[key].tolist() for key in ("token", "token_string", "target") if key in columns}
        return table(columns | {key: [names[i] for i in values] for key, values in ids.items()})


@one_look()
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

    Raises:
        ValueError: Bad order, position, option, weights, target or input; the message says what must hold.
        TypeError: Targets of the wrong type.
        NotImplementedError: `objective="kl"` on a model with a final softcap.

    Source: Chen et al., section 4, Lemma 1. Cost: A forward pass and two quadratic programs per position (one for the
    control); "kl" needs all components' logits.
    """
    check_options(center_scale, top_k, CHUNK_SIZE)
    order = read_order(linearize, order, 0)
    check_choice("objective", objective, OBJECTIVES)
    if linearize == "detached":
        check_detached(order=order, weights=weights, objective=objective, center_scale=center_scale)
    weights = "optimal" if weights is None else weights
    network = ResidualNetwork.of(model, granularity)
    inputs = LensInput.of(network, text_or_tokens, positions, targets, attention_mask, cache)
    with torch.no_grad():
        components = Components.of(inputs.trace, inputs.rows, embeddings, order, center_scale, linearize)
        found = _weighted(inputs, components, weights, objective, seed, top_k)
        found |= {"center_scale": center_scale, "linearize": linearize, "seed": int(seed)}
        return JointJetLens(labels=components.labels, order=order, **found)


@dataclass(frozen=True, eq=False)
class _Sums:
    """Weights at some rows, and the weighted sums of components and of random centers; `place` is that of each measure's."""

    place: dict[str, int]
    sums: Float[Tensor, "sum row d_model"]
    weights: Float[Tensor, "center row"]
    alpha: Float[Tensor, "center row"]
    beta: Float[Tensor, "center row"]
    rho: Float[Tensor, "center row"]
    gap: Float[Tensor, "1 row"] | None
    effective_rank: Int[Tensor, "1 row"] | None

    @classmethod
    def cat(cls, parts: Sequence[_Sums]) -> _Sums:
        """Those of all rows."""
        first = parts[0]
        joined: dict[str, Any] = {
            name: None if getattr(first, name) is None else torch.cat([getattr(part, name) for part in parts], 1)
            for name in ("sums", "weights", "alpha", "beta", "rho", "gap", "effective_rank")
        }
        return cls(place=first.place, **joined)


def _summed(
    components: Components, part: slice, truth: Tensor, weights: Tensor | str, objective: Objective, seed: int
) -> tuple[_Sums, Centers]:
    """The sums of some rows with given weights [row, center], or `"optimal"` or `"uniform"` ones, and the jets."""
    centers, values, variate = components.evaluated(part)
    random = centers.randomized(values, variate, seed)
    del values
    uniform = uniform_weights(len(centers.jets), len(truth), device=truth.device)
    gap = effective_rank = None
    if components.linearize == "detached":
        chosen = of_random = uniform = torch.ones_like(uniform)
    elif isinstance(weights, Tensor) or weights == "uniform":
        centers.refuse_overflow()
        chosen = of_random = weights if isinstance(weights, Tensor) else uniform
    else:
        # Those of the control are optimal, too: both are solved at once.
        jets, n = torch.cat([centers.jets, random.jets], 1), len(truth)
        try:
            solution = decoder_weights(centers.decoder, jets, torch.cat([truth, truth]), objective)
        except ValueError:
            centers.refuse_overflow()
            raise
        chosen, of_random = solution.weights[:n], solution.weights[n:]
        gap, effective_rank = solution.gap[None, :n], solution.effective_rank[None, :n]
    parts = {"measures": (centers, chosen), "uniform": (centers, uniform)}
    parts |= {"control": (random, of_random), "control_uniform": (random, uniform)}
    # Distinct sums only: with uniform weights there are two.
    distinct = {(id(of), id(w)): (of, w) for of, w in parts.values()}
    place = {name: list(distinct).index((id(of), id(w))) for name, (of, w) in parts.items()}
    sums = torch.stack([of.sum(w) for of, w in distinct.values()])
    return _Sums(place, sums, chosen.T, centers.alpha, centers.beta, centers.rho, gap, effective_rank), centers


def _weighted(
    inputs: LensInput, components: Components, weights: Any, objective: Objective, seed: int, top_k: int
) -> dict[str, Any]:
    """Fields of the lens: weights, what the weighted sums of components and of random centers say, and their measures."""
    rows, decoder, spread, tiles = inputs.rows, inputs.trace.decoder, inputs.rows.spread, components.tiles
    truth, is_detached, n = decoder.norm(inputs.variate), components.linearize == "detached", len(components.labels)
    given = "uniform" if is_detached else _read(weights, rows.keep, n, truth)
    parts = []
    for part in tiles:
        own = given[part] if isinstance(given, Tensor) else given
        found, centers = _summed(components, part, truth[part], own, objective, seed)
        parts.append(found)
        if len(tiles) == 1:
            components = replace(components, kept=centers)
        del centers
    found = _Sums.cat(parts)
    # The first sum is split into its own and its borrowed part.
    beta = found.sums.new_zeros(len(found.sums), 1, len(truth))
    beta[0, 0] = (found.weights * found.beta).sum(0)
    shared = beta[:, 0, :, None] * inputs.shared
    own = found.sums - shared if decoder.norm.bias is None else found.sums - shared - decoder.norm.bias
    scan = inputs.scan(own, torch.ones_like(beta), beta, top_k=top_k)
    close, (lent, mine) = geometry(decoder, found.sums, truth, shared[0], own[0])
    read = {
        name: Measures.of(inputs.rows, {key: values[i] for key, values in close.items()}, scan, inputs.sinks, (i, 0))
        for name, i in found.place.items()
    }
    answers = spread(scan.model.top.indices[:, 0], fill=-1)
    ids = answers[..., None] if inputs.target_ids is None else inputs.target_ids
    effects = torch.cat([components.at(part).effects(ids[rows.kept][part]) for part in tiles], 1)
    kind = "given" if isinstance(given, Tensor) else objective if given == "optimal" else given
    return {
        "objective": components.linearize if is_detached else kind,
        "weights": spread(found.weights),
        "gap": None if found.gap is None else spread(found.gap[0]),
        "effective_rank": None if found.effective_rank is None else spread(found.effective_rank[0], fill=-1),
        "rho": spread(found.rho),
        "alpha": spread(found.alpha),
        "beta": spread(found.beta),
        "effects": spread(found.weights[..., None] * effects, 1),
        "target_names": [ANSWER] if inputs.target_names is None else inputs.target_names,
        "borrowed_share": spread(torch.where(beta[0, 0] == 0, 0, lent / (lent + mine))),
        "centers": components,
        **read,
        **inputs.fields(scan, (0, 0), ids),
    }


def _read(weights: Any, keep: Tensor, n: int, truth: Tensor) -> Tensor | str:
    """Given weights [row, center], `"optimal"` or `"uniform"`."""
    if isinstance(weights, str):
        if weights not in ("optimal", "uniform"):
            raise ValueError(f"weights must be 'optimal', 'uniform' or numbers on the simplex; got {weights!r}.")
        return weights
    given = weights if isinstance(weights, Tensor) else torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if given.ndim == 3 and given.shape[1:] == keep.shape:
        given = given[:, keep.to(given.device)]  # padding may hold NaN, as a lens' own weights do
    elif given.ndim > 1:
        raise ValueError(
            f"weights must be [center] or [center, batch, pos] with batch and pos {tuple(keep.shape)}, aligned "
            f"with positions; got shape {tuple(given.shape)}."
        )
    return read_weights(given, n).movedim(0, -1).to(truth).expand(len(truth), n)
