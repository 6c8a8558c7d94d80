r"""The iterative jet lens: what every layer's stream says about the next token, at every order.

It reads the jet of the final norm at the layer's stream x = h_l, evaluated at the final stream y = h_L, through the
unembedding. Order 0 is the logit lens. Every order is a mix of two logit vectors,

.. math::
    \text{lens}_k = \alpha_k \, U(w * x) + \beta_k \, U(w * y) + \text{const}, \qquad \beta_0 = 0,

the layer's own reading and *the model's own answer*. For k >= 1 a good score may thus be borrowed: cells have `alpha`,
`beta` and `borrowed_share`, `borrowed` marks those whose answer is not the own part's, and every measure has a
`control`, a random center of equal norm and angle.

Detached (``linearize="detached"``), the final norm keeps its scale at h_L: alpha = 1 / scale(h_L), beta = 0. This is
cumulative direct logit attribution: the logit lens times scale(h_l) / scale(h_L), biases apart.

Source: Chen et al., *Jet Expansions of Residual Computation*, section 4 (iterative jet lens).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.calculus import CenterScale, norm_jet
from tl_jets.calculus import center_scale as center_scale_factors
from tl_jets.core.changes import one_look
from tl_jets.core.decoder import in_unit
from tl_jets.core.frozen_network import Linearize, check_detached, frozen_norm, read_order
from tl_jets.core.labels import LabelInput, is_label, read_label
from tl_jets.core.logit_reader import CHUNK_SIZE
from tl_jets.core.measures import random_directions, seeds_of, split_along
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.options import check_choice
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.selection import TargetInput, check_options, positions_at, stream_labels
from tl_jets.core.tokens import nested_texts
from tl_jets.core.trace import Trace
from tl_jets.lenses.logits import logits_of_layer
from tl_jets.lenses.results import LensInput, LensResult, table
from tl_jets.lenses.trajectories import leads_from, trajectory_table
from tl_jets.lenses.verdicts import Verdict, verdict_of

# Fields with a layer axis.
_LAYERED = {
    *("rho", "tail_bound", "alpha", "beta", "borrowed_share", "top_ids", "full_values", "own_values", "own_top_ids"),
    *("target_logits", "target_ranks", "control_draws"),
}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class IterativeJetLens(LensResult):
    """Readings of every layer at every order. Axes: [layer, order, batch, pos]; NaN (ids: -1) at padding.

    Attributes:
        labels: Streams: `0_pre`, ..., `final_post` (TransformerLens' names).
        orders: 0..order.
        positions: Positions in the prompt, with their tokens and whether they are real: `tokens`, `valid` [batch, pos].
        linearize: `"jet"`, or `"detached"`, whose only order is 0.
        rho: Radius ratio |v| / |x| of each series, which converges if rho < 1 [layer, batch, pos]; NaN if detached.
        tail_bound: Bound on the sum of all higher orders, RMS before the norm's gain; inf if rho >= 1, NaN if detached.
        alpha: Coefficient of the layer's own reading.
        beta: Coefficient of the model's own answer; 0 for `final_post`, where the two are the same.
        borrowed_share: Length of the beta part over the sum of both lengths, logits centered over the vocabulary.
        top_ids: Best tokens, best first [layer, order, batch, pos, k].
        full_values: Their additive logits [layer, order, batch, pos, k]; `own_values` from the own part (without beta).
        own_top_ids: Best token of the own part; None if not measured.
        model_top_ids: The model's best token [batch, pos].
        measures: Measures of each cell against the model; `control` has those of the random center. None if not measured.
        control_draws: KL of every draw of the random center, `control` first; None if one was drawn.
        target_ids: Token ids of the targets [batch, pos, target]; `target_names` are the targets as given.
        target_logits: Their additive logits [layer, order, batch, pos, target].
        target_ranks: Their ranks, 0 for the best token [layer, order, batch, pos, target].
        unit: Unit of logits: `"logits"`, or `"logits before the softcap"`.
        token_names: Texts of the ids.
        sinks: Positions that `average` leaves out.
        n_layers: Number of blocks of the model.
        model: Name of the model and a digest of its weights, which `concat` compares; None: not known.
        seed: Seed of the control, or its first draw; None without one.
        translator: Name of the lens whose translators moved the streams (`translated_lens`); None for the streams themselves.
    """

    orders: list[int]
    rho: Float[Tensor, "layer batch pos"]
    tail_bound: Float[Tensor, "layer order batch pos"]
    alpha: Float[Tensor, "layer order batch pos"]
    beta: Float[Tensor, "layer order batch pos"]
    target_logits: Float[Tensor, "layer order batch pos target"] | None
    target_ranks: Int[Tensor, "layer order batch pos target"] | None
    translator: str | None = None
    control_draws: Float[Tensor, "layer order batch pos draw"] | None = None

    def __getitem__(self, labels: LabelInput | Sequence[LabelInput]) -> IterativeJetLens:
        """The lens of some layers: `lens["3_pre"].kl[0, 1, 0, -1]`, `lens["resid_pre", 3]`. The layer axis stays."""
        wanted: Any = [labels] if is_label(labels) or not isinstance(labels, Iterable) else list(labels)
        if self.n_layers is not None:
            wanted = [read_label(label, self.n_layers) if is_label(label) else label for label in wanted]
        unknown = [label for label in wanted if label not in self.labels]
        if unknown or not wanted:
            raise ValueError(
                f"A lens is indexed by its layers, {self.labels}; got {labels!r}. Its tensors take numbers."
            )
        index = [self.labels.index(label) for label in wanted]
        measures = [x if x is None else x.map(lambda values: values[index]) for x in (self.measures, self.control)]
        found = self._mapped(lambda values: values[index], _LAYERED)
        return replace(found, labels=wanted, measures=measures[0], control=measures[1])

    def __repr__(self) -> str:
        kind = f"orders 0..{self.orders[-1]}" if self.linearize == "jet" else self.linearize
        kind += "" if self.translator is None else f" of {self.translator}"
        return (
            f"IterativeJetLens({len(self.labels)} layers {self.labels[0]}..{self.labels[-1]}, {kind}, tokens "
            f"{list(self.tokens.shape)}, center_scale={self.center_scale!r}{in_unit(self.unit)}{self._left_out()})"
        )

    def top_tokens(self, tokenizer: Any = None) -> dict[str, Any]:
        """Decoded best tokens by layer: {label: nested lists [order][batch][pos][k]}."""
        names = self._names(tokenizer)
        return {label: nested_texts(names, self.top_ids[i]) for i, label in enumerate(self.labels)}

    def first_leads(self) -> Int[Tensor, "order batch pos"]:
        """Index of the layer from which on every layer's best token is the model's; -1 at padding.

        `len(labels)` where not even the last layer's is. Borrowed answers count: order 0 has none.
        """
        leads = leads_from(self.top_ids[..., 0] == self.model_top_ids)
        return (len(self.labels) - leads.long().sum(0)).masked_fill(~self.valid, -1)

    def trajectories(self, *, include_sinks: bool = False) -> pd.DataFrame:
        """One row per layer, order and target: its rank, and whether it leads, over the positions of all prompts.

        Columns: layer, order, target, `rank_median` over prompts (each by the median of its positions; 0 is the best token)
        with its 95% interval `rank_low`, `rank_high`; `leads`, the share of positions at which the target is the best token
        from this layer on, with its interval `leads_low`, `leads_high`; and `control_leads`, the share at which the model's
        own answer is the random center's best token from this layer on.

        Args:
            include_sinks: Whether BOS and positions of outlying streams (`sinks`) count, too.

        Raises:
            ValueError: No targets, or no positions but sinks.
        """
        if self.target_ranks is None or self.target_names is None:
            raise ValueError("Trajectories are of targets; pass targets=... when the lens is run, or use answer_lens.")
        index = self._cells()
        kept = self.valid if include_sinks or self.sinks is None else self.valid & ~self.sinks.mask
        control = None if self.control is None else self.control.top1_agreement == 1
        return trajectory_table(index, self.target_ranks, self.target_names, kept, control)

    def rank_trajectory(self, target: str | int | None = None) -> Int[Tensor, "layer order batch pos"]:
        """Ranks of one target (0 is the best token); None takes the only one."""
        return self._of_target(self.target_ranks, target)

    def logit_difference(self, target: str | int, other: str | int) -> Float[Tensor, "layer order batch pos"]:
        """Additive logit of `target` minus that of `other`, both among the lens' targets."""
        return self._of_target(self.target_logits, target) - self._of_target(self.target_logits, other)

    def logits(
        self, layer: LabelInput, order: int | None = None, *, trace: Trace
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Additive logits of one layer at one order, before any softcap; NaN at padding.

        A lens keeps its best tokens only; the rest is mixed again, for a loaded lens or one of `concat`, too.

        Args:
            layer: Its label, or TransformerLens' name.
            order: One of `orders`; None for the highest.
            trace: `ResidualNetwork(model).trace(prompts)` of the lens' prompts, all of them and in order.

        Raises:
            ValueError: No such layer or order, or a trace of another input or model.

        Example:
            >>> import tl_jets as tj
            >>> network = tj.ResidualNetwork(tj.load_tinydocs())
            >>> trace = network.trace("This function is available on Unix and")
            >>> lens = iterative_jet_lens(network, trace)
            >>> torch.equal(lens.logits("2_pre", order=1, trace=trace).argmax(-1), lens["2_pre"].top_ids[0, 1, ..., 0])
            True
        """
        return logits_of_layer(self._layer(layer), trace, order, False)

    def log_probs(
        self, layer: LabelInput, order: int | None = None, *, trace: Trace
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Log-probabilities in nats of one layer at one order, after any softcap; else as `logits`."""
        return logits_of_layer(self._layer(layer), trace, order, True)

    def _layer(self, layer: LabelInput) -> IterativeJetLens:
        """The lens of one layer."""
        if not is_label(layer):
            raise ValueError(f"layer must be one of {self.labels}; got {layer!r}.")
        return self[layer]

    def _of_target(self, values: Tensor | None, target: str | int | None) -> Tensor:
        if values is None or self.target_names is None:
            raise ValueError("Targets must be asked for when the lens is run; pass targets=...")
        if target is None and len(self.target_names) == 1:
            return values[..., 0]
        check_choice("target", target, self.target_names)
        return values[..., self.target_names.index(target)]  # type: ignore[arg-type]

    def verdict(
        self, *, prompt: int | None = None, place: int | None = None, controls: Sequence[Tensor] = ()
    ) -> Verdict:
        """Whether readings beat their controls, converge, and have the answer, by layer and in words.

        Args:
            prompt: Index of a prompt; None for all.
            place: Index along the pos axis; None for all. Attention sinks are left out unless nothing else is there.
            controls: `control.kl` of the same lens with other seeds, beside the lens' own draws.

        Example:
            >>> import tl_jets as tj
            >>> lens = iterative_jet_lens(tj.load_tinydocs(), "This function is available on Unix and")
            >>> lens.verdict().lines[0].split(";")[1]
            ' its series diverges at 2 of 4 layers (0_pre..1_pre).'
        """
        chosen = torch.zeros_like(self.valid)
        chosen[slice(None) if prompt is None else prompt, slice(None) if place is None else place] = True
        cells = self.valid & chosen
        kept = cells & self.counted if bool((cells & self.counted).any()) else cells
        own = self.control_draws
        own = [] if self.control is None else [self.control.kl] if own is None else own.unbind(-1)
        return verdict_of(
            self.labels,
            self.orders,
            rho=self.rho[:, kept],
            leads=(self.top_ids[:, 0, ..., 0] == self.model_top_ids)[:, kept],
            kl=None if self.measures is None else self.measures.kl[..., kept],
            controls=[draw[..., kept] for draw in (*own, *controls)],
            is_detached=self.linearize == "detached",
        )

    def _columns(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        columns = {"rho": self.rho[:, None].expand_as(self.alpha), "borrowed_share": self.borrowed_share}
        return self._cells(), columns | self._scores()

    def _cells(self) -> list[dict[str, Any]]:
        """The first entries of the rows of every layer and order: lens (if translated), layer, order."""
        lens = {} if self.translator is None else {"lens": self.translator}
        return [lens | {"layer": label, "order": order} for label in self.labels for order in self.orders]

    def _scores(self) -> dict[str, Tensor]:
        """The measures [layer, order, batch, pos], each followed by its control."""
        scores = {}
        for name, values in [] if self.measures is None else self.measures.items():
            scores[name] = values
            if self.control is not None:
                scores[f"control_{name}"] = getattr(self.control, name)
        return scores

    def to_dataframe(self, tokenizer: Any = None, top_k: int | None = None) -> pd.DataFrame:
        """One row per layer, order, batch, real position and best token.

        Columns: layer, order, batch, pos, token (at that position), rank, token_index, token_string (the id without a
        tokenizer), logit, own_logit, borrowed_share, and the measures with their controls.
        """
        if top_k is not None and not 1 <= top_k <= self.top_ids.shape[-1]:
            raise ValueError(
                f"top_k must lie in 1..{self.top_ids.shape[-1]}, what the lens kept; got {top_k}. Run it with a larger one."
            )
        names = self._names(tokenizer)
        kept = self.top_ids[..., :top_k]
        *at, rank = self.valid[:, :, None].expand_as(kept).nonzero().T
        layer, order, b, p = at
        tokens = kept[(*at, rank)].tolist()
        columns = {"layer": [self.labels[i] for i in layer], "order": [self.orders[i] for i in order], "batch": b}
        columns |= {"pos": positions_at(self.positions, b, p), "token": [names[i] for i in self.tokens[b, p].tolist()]}
        columns |= {"rank": rank, "token_index": tokens, "token_string": [names[i] for i in tokens]}
        logits = {"logit": self.full_values, "own_logit": self.own_values}
        columns |= {name: values[(*at, rank)].cpu().numpy() for name, values in logits.items()}
        scores = {"borrowed_share": self.borrowed_share, **self._scores()}
        return table(columns | {name: values[tuple(at)].cpu().numpy() for name, values in scores.items()})


@one_look()
def iterative_jet_lens(
    model: Any,
    text_or_tokens: Any,
    *,
    order: int | None = None,
    layers: int | LabelInput | Sequence[int | LabelInput] | None = None,
    positions: int | Sequence[int] | None = None,
    incl_mid: bool = False,
    center_scale: CenterScale = "none",
    linearize: Linearize = "jet",
    targets: TargetInput | None = None,
    top_k: int = 5,
    measures: bool = True,
    seed: int | None = 0,
    draws: int = 1,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    chunk_size: int = CHUNK_SIZE,
) -> IterativeJetLens:
    """The jet of the final norm at every layer's stream, at orders 0..`order`, as an `IterativeJetLens`.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork`, which shares computations between calls.
        text_or_tokens: A prompt, a list of prompts, token ids [batch, pos], or a `Trace`.
        order: Highest order k >= 0; None is 1.
        layers: Layers (l is `l_pre`; n_layers or -1 is `final_post`) or stream labels; None for all.
        positions: Positions to read among each prompt's real tokens, -1 its last; None for all.
        incl_mid: With `layers=None`, also read streams between attention and MLP.
        center_scale: Length of centers: `"none"` (the paper's), or `"match"` or `"orthogonal"`, whose series converge.
        linearize: `"jet"`, or `"detached"` (direct logit attribution), without order or center_scale.
        targets: Tokens to follow: strings (`" is"`, or `"·is"` as tables write it), ids, a list of them per prompt,
            or ids [batch, pos] aligned with `positions`.
        top_k: Number of best tokens per cell.
        measures: Whether to compute measures, their controls and the own part's best token.
        seed: Seed of the control, whose directions all layers and prompts share; None for no control, a fifth faster.
        draws: Number of random centers, of seeds `seed`, `seed` + 1, ..., by whose KL `verdict` judges; eight are enough.
        attention_mask: Passed to the model (left padding needs it).
        cache: A ready `ActivationCache` of the same input.
        chunk_size: Rows of d_vocab logits held at once.

    Raises:
        ValueError, TypeError: Bad order, layer, position, targets, option or input; the message says what must hold.

    Source: Chen et al., section 4; nostalgebraist 2020 for order 0. Cost: A forward pass and one product of all layers'
    streams with the unembedding, whatever the order.
    """
    check_options(center_scale, top_k, chunk_size)
    order = read_order(linearize, order, 1)
    if linearize == "detached":
        check_detached(order=order, center_scale=center_scale)
    network = ResidualNetwork.of(model)
    inputs = LensInput.of(network, text_or_tokens, positions, targets, attention_mask, cache)
    labels = stream_labels(network, layers, incl_mid)
    final = labels.index(FINAL_STREAM) if FINAL_STREAM in labels else None
    options = {"top_k": top_k, "measures": measures, "chunk_size": chunk_size, "final": final}
    seeds = seeds_of(seed if measures else None, draws)
    with torch.no_grad():
        centers = inputs.streams(labels)
        found = read_lens(inputs, labels, centers, order, center_scale, linearize, seeds, options)
    return replace(found, seed=None if seed is None else int(seed))


def read_lens(
    inputs: LensInput,
    labels: list[str],
    centers: Float[Tensor, "layer row d_model"],
    order: int,
    center_scale: CenterScale,
    linearize: Linearize,
    seeds: Sequence[int],
    options: dict[str, Any],
) -> IterativeJetLens:
    """The lens of these centers, float64, with a control of each seed; `options` are those of the scan."""
    rows, norm = inputs.rows, inputs.trace.decoder.norm
    variate = inputs.variate.expand_as(centers)
    if linearize == "detached":
        scale, series = centers.new_ones(centers.shape[:-1]), frozen_norm(norm, centers, variate)
    else:
        scale = center_scale_factors(norm, centers, variate, center_scale)
        series = norm_jet(norm, centers * scale[..., None], variate, order)
    # At the last stream, the model's answer is the own reading, at every order.
    is_last = torch.tensor([label == FINAL_STREAM for label in labels], device=scale.device)[:, None, None]
    alpha = torch.where(is_last, inputs.gamma, (series.alpha * scale).transpose(0, 1))
    beta = torch.where(is_last, 0, series.beta.transpose(0, 1))
    plane = split_along(norm, centers, inputs.variate)
    drawn = [random_directions(norm, inputs.variate, (), rows.places, seed) for seed in seeds]
    random = torch.stack(drawn) if drawn else None
    ids = inputs.target_ids
    scan = inputs.scan(
        norm.scale(norm.center(centers)),
        alpha,
        beta,
        None if random is None else (norm.scale(random), plane.along, plane.across),
        targets=None if ids is None else ids[rows.kept],
        **options,
    )
    borrowed, own, control = inputs.measured(scan, plane, drawn[0] if drawn else None, alpha, beta)
    spread, kl = rows.spread, None if scan.control is None else scan.control.kl
    return IterativeJetLens(
        labels=labels,
        orders=list(range(order + 1)),
        center_scale=center_scale,
        linearize=linearize,
        rho=spread(series.rho),
        tail_bound=spread(series.tail_bound.transpose(0, 1)),
        alpha=spread(alpha),
        beta=spread(beta),
        borrowed_share=borrowed,
        measures=own,
        control=control,
        control_draws=None if kl is None or len(kl) == 1 else spread(kl.movedim(0, -1), -2),
        target_names=inputs.target_names,
        target_logits=None if scan.target_logits is None else spread(scan.target_logits, -2),
        target_ranks=None if scan.target_ranks is None else spread(scan.target_ranks, -2, -1),
        **inputs.fields(scan, ..., ids),
    )
