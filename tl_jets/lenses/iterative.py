r"""The iterative jet lens: what every layer's stream says about the next token, at every order.

It reads the jet of the final norm at the layer's stream x = h_l, evaluated at the final stream y = h_L, through the
unembedding. Order 0 is the logit lens. Every order is a mix of two logit vectors,

.. math::
    \text{lens}_k = \alpha_k \, U(w * x) + \beta_k \, U(w * y) + \text{const}, \qquad \beta_0 = 0,

the layer's own reading and *the model's own answer*. For k >= 1 a good score may thus be borrowed: cells have `alpha`,
`beta` and `borrowed_share`, `borrowed` marks those whose answer is not the own part's, and every measure has a
`control`, a random center of equal norm and angle.

Detached (``linearize="detached"``), the final norm keeps its scale at h_L: alpha = 1 / scale(h_L), beta = 0. This is
cumulative direct logit attribution: the logit lens times scale(h_l) / scale(h_L), biases apart. Without biases, tokens
rank as in the logit lens, and differences between layers are the contributions of their writes.

Source: Chen et al., *Jet Expansions of Residual Computation*, section 4 (iterative jet lens).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_jets.calculus import CenterScale, norm_jet
from tl_jets.calculus import center_scale as center_scale_factors
from tl_jets.core.decoder import in_unit
from tl_jets.core.frozen_network import Linearize, check_detached, frozen_norm, read_order
from tl_jets.core.labels import LabelInput
from tl_jets.core.lens_logits import Control, Mixture, scan_mixture
from tl_jets.core.logit_reader import CHUNK_SIZE
from tl_jets.core.measures import Measures, geometry_in_plane, random_directions, split_along, weighted
from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.selection import Rows, TargetInput, check_options, model_logits, read_targets, stream_labels
from tl_jets.core.tokens import decode, token_names
from tl_jets.lenses.result import LensResult

# Fields with a layer axis.
_LAYERED = {
    *("rho", "tail_bound", "alpha", "beta", "borrowed_share", "top_ids", "full_values", "own_values", "own_top_ids"),
    *("measures", "control", "target_logits", "target_ranks"),
}


@dataclass(frozen=True, eq=False, repr=False)
class IterativeJetLens(LensResult):
    """Readings of every layer at every order. Axes: [layer, order, batch, pos]; NaN (ids: -1) at padding.

    Attributes:
        labels: Streams: `0_pre`, ..., `final_post` (TransformerLens' names).
        orders: 0..order.
        positions: Positions in the prompt.
        tokens: The tokens at those positions [batch, pos].
        valid: Which of them are real [batch, pos].
        linearize: `"jet"`, or `"detached"`, whose only order is 0.
        rho: Radius ratio |v| / |x| of each series, which converges if rho < 1 [layer, batch, pos]; NaN if detached.
        tail_bound: Bound on the sum of all higher orders, RMS before the norm's gain; inf if rho >= 1, NaN if detached.
        alpha: Coefficient of the layer's own reading.
        beta: Coefficient of the model's own answer; 0 for `final_post`, where the two are the same.
        borrowed_share: Length of the beta part over the sum of both lengths, logits centered over the vocabulary.
        top_ids: Best tokens, best first [layer, order, batch, pos, k].
        full_values: Their additive logits [layer, order, batch, pos, k].
        own_values: Their additive logits from the own part (without beta) [layer, order, batch, pos, k].
        own_top_ids: Best token of the own part; None if not measured.
        model_top_ids: The model's best token [batch, pos].
        measures: Measures of each cell against the model; None if not measured.
        control: Measures of the random center; None without one.
        target_ids: Token ids of the targets [batch, pos, target].
        target_names: The targets as given.
        target_logits: Their additive logits [layer, order, batch, pos, target].
        target_ranks: Their ranks, 0 for the best token [layer, order, batch, pos, target].
        unit: Unit of logits: `"logits"`, or `"logits before the softcap"`.
    """

    labels: list[str]
    orders: list[int]
    positions: list[int]
    tokens: Int[Tensor, "batch pos"]
    valid: Bool[Tensor, "batch pos"]
    center_scale: CenterScale
    linearize: Linearize
    rho: Float[Tensor, "layer batch pos"]
    tail_bound: Float[Tensor, "layer order batch pos"]
    alpha: Float[Tensor, "layer order batch pos"]
    beta: Float[Tensor, "layer order batch pos"]
    borrowed_share: Float[Tensor, "layer order batch pos"]
    top_ids: Int[Tensor, "layer order batch pos k"]
    full_values: Float[Tensor, "layer order batch pos k"]
    own_values: Float[Tensor, "layer order batch pos k"]
    own_top_ids: Int[Tensor, "layer order batch pos"] | None
    model_top_ids: Int[Tensor, "batch pos"]
    measures: Measures | None
    control: Measures | None
    target_ids: Tensor | None
    target_names: list[str | int] | None
    target_logits: Tensor | None
    target_ranks: Tensor | None
    unit: str
    tokenizer: Any

    def __getitem__(self, labels: str | Sequence[str]) -> IterativeJetLens:
        """The lens of some layers: `lens["3_pre"].kl[0, 1, 0, -1]`. The layer axis stays."""
        wanted: Any = [labels] if isinstance(labels, str) or not isinstance(labels, Iterable) else list(labels)
        unknown = [label for label in wanted if label not in self.labels]
        if unknown or not wanted:
            raise ValueError(
                f"A lens is indexed by its layers, {self.labels}; got {labels!r}. Its tensors take numbers."
            )
        index = [self.labels.index(label) for label in wanted]
        return replace(self._mapped(lambda values: values[index], _LAYERED), labels=wanted)

    def __repr__(self) -> str:
        kind = f"orders 0..{self.orders[-1]}" if self.linearize == "jet" else self.linearize
        return (
            f"IterativeJetLens({len(self.labels)} layers {self.labels[0]}..{self.labels[-1]}, {kind}, tokens "
            f"{list(self.tokens.shape)}, center_scale={self.center_scale!r}{in_unit(self.unit)})"
        )

    @property
    def borrowed(self) -> Bool[Tensor, "layer order batch pos"]:
        """Cells whose best token is not the own part's, but comes from the model's final stream."""
        if self.own_top_ids is None:
            raise AttributeError  # `__getattr__` says why
        return (self.top_ids[..., 0] != self.own_top_ids) & self.valid

    def top_tokens(self, tokenizer: Any = None) -> dict[str, Any]:
        """Decoded best tokens by layer: {label: nested lists [order][batch][pos][k]}."""
        return {label: decode(tokenizer or self.tokenizer, self.top_ids[i]) for i, label in enumerate(self.labels)}

    def rank_trajectory(self, target: str | int | None = None) -> Int[Tensor, "layer order batch pos"]:
        """Ranks of one target (0 is the best token); None takes the only one."""
        return self._of_target(self.target_ranks, target)

    def logit_difference(self, target: str | int, other: str | int) -> Float[Tensor, "layer order batch pos"]:
        """Additive logit of `target` minus that of `other`, both among the lens' targets."""
        return self._of_target(self.target_logits, target) - self._of_target(self.target_logits, other)

    def _of_target(self, values: Tensor | None, target: str | int | None) -> Tensor:
        if values is None or self.target_names is None:
            raise ValueError("Targets must be asked for when the lens is run; pass targets=...")
        if target is None and len(self.target_names) == 1:
            return values[..., 0]
        if target not in self.target_names:
            raise ValueError(f"target must be one of {self.target_names}; got {target!r}.")
        return values[..., self.target_names.index(target)]

    def average(self) -> pd.DataFrame:
        """Measures and controls averaged over real positions, per layer and order (Chen et al., figure 3, bottom)."""
        columns = {
            "rho": self.rho[:, None].expand_as(self.alpha),
            "borrowed_share": self.borrowed_share,
        } | self._scores()
        table = {name: values.flatten(-2).nanmean(-1) for name, values in columns.items()}
        return pd.DataFrame(
            [
                {"layer": label, "order": order, **{name: float(values[i, k]) for name, values in table.items()}}
                for i, label in enumerate(self.labels)
                for k, order in enumerate(self.orders)
            ]
        )

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
        tokenizer = tokenizer or self.tokenizer
        arrays = {
            name: getattr(self, name).cpu().numpy()
            for name in ("top_ids", "full_values", "own_values", "borrowed_share")
        }
        scores = {name: values.cpu().numpy() for name, values in self._scores().items()}
        names = token_names(tokenizer, [self.top_ids, self.tokens])
        rows = []
        cells = self.valid.nonzero().tolist()
        tokens = self.tokens.cpu().numpy()
        for i, label in enumerate(self.labels):
            for k, order in enumerate(self.orders):
                for b, p in cells:
                    here = {"layer": label, "order": order, "batch": b, "pos": self.positions[p]}
                    here["token"] = names[int(tokens[b, p])]
                    shared = {"borrowed_share": arrays["borrowed_share"][i, k, b, p]}
                    shared |= {name: values[i, k, b, p] for name, values in scores.items()}
                    for rank, token in enumerate(arrays["top_ids"][i, k, b, p][:top_k]):
                        row = {**here, "rank": rank, "token_index": token}
                        row["token_string"] = names[token]
                        row["logit"] = arrays["full_values"][i, k, b, p, rank]
                        row["own_logit"] = arrays["own_values"][i, k, b, p, rank]
                        rows.append(row | shared)
        return pd.DataFrame(rows)


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
        positions: Positions to read, negative ones from the end of the padded row; None for all.
        incl_mid: With `layers=None`, also read streams between attention and MLP.
        center_scale: Length of centers: `"none"` (the paper's), or `"match"` or `"orthogonal"`, whose series converge.
        linearize: `"jet"`, or `"detached"` (direct logit attribution), without order or center_scale.
        targets: Tokens to follow: strings or ids, a list of them per prompt, or ids [batch, pos] aligned with
            `positions`.
        top_k: Number of best tokens per cell.
        measures: Whether to compute measures, their controls and the own part's best token.
        seed: Seed of the control, whose directions all layers and prompts share; None for no control, a fifth faster.
        attention_mask: Passed to the model (left padding needs it).
        cache: A ready `ActivationCache` of the same input.
        chunk_size: Rows of d_vocab logits held at once.

    Raises:
        ValueError: Bad order, layer, position, option or input; the message says what must hold.
        TypeError: Order or targets of the wrong type.

    Source: Chen et al., section 4; nostalgebraist 2020 for order 0. Cost: A forward pass and one product of all layers'
    streams with the unembedding, whatever the order.
    """
    check_options(center_scale, top_k, chunk_size)
    order = read_order(linearize, order, 1)
    if linearize == "detached":
        check_detached(order=order, center_scale=center_scale)
    network = ResidualNetwork.of(model)
    trace = trace_of(network, text_or_tokens, attention_mask, cache)
    rows = Rows.of(trace, positions)
    labels = stream_labels(network, layers, incl_mid)
    decoder, norm = trace.decoder, trace.decoder.norm
    ids, names = read_targets(network, targets, rows)
    with torch.no_grad():
        centers = torch.stack([rows.take(trace[label]) for label in labels]).double()
        variate = rows.take(trace[FINAL_STREAM]).double()
        every = variate.expand_as(centers)
        scale = centers.new_ones(centers.shape[:-1])
        if center_scale != "none":
            scale = center_scale_factors(norm, centers, every, center_scale)
        if linearize == "detached":
            series = frozen_norm(norm, centers, every)
        else:
            series = norm_jet(norm, centers * scale[..., None], every, order)
        alpha, beta = (series.alpha * scale).transpose(0, 1), series.beta.transpose(0, 1)
        gamma = norm_jet(norm, variate, variate, 0).alpha[0]
        for own in (i for i, label in enumerate(labels) if label == FINAL_STREAM):
            # At the last stream, the model's answer is the own reading, at every order.
            alpha, beta = alpha.clone(), beta.clone()
            alpha[own], beta[own] = gamma, 0
        plane = split_along(norm, centers, variate)
        random = None
        if measures and seed is not None:
            random = random_directions(norm, variate, (), rows.places, seed)
        dtype = trace[FINAL_STREAM].dtype
        cast = lambda tensor: tensor.to(dtype)  # noqa: E731
        mixture = Mixture(
            own=cast(weighted(norm, norm.center(centers))),
            shared=cast(weighted(norm, plane.variate)),
            alpha=cast(alpha),
            beta=cast(beta),
            gamma=cast(gamma),
            bias=norm.bias,
        )
        scan = scan_mixture(
            decoder,
            mixture,
            top_k=top_k,
            targets=None if ids is None else ids[rows.keep],
            measures=measures,
            control=None
            if random is None
            else Control(cast(weighted(norm, random)), cast(plane.along), cast(plane.across)),
            model_logits=model_logits(trace, rows),
            chunk_size=chunk_size,
        )
        found = geometry_in_plane(decoder, plane, None, alpha, beta, gamma)
        borrowed = found.pop("borrowed_share")
        own = Measures.of(rows.spread, found, scan) if measures else None
        control = None
        if random is not None and scan.control is not None:
            of_random = geometry_in_plane(decoder, plane, random, alpha, beta, gamma)
            of_random.pop("borrowed_share")
            control = Measures.of(rows.spread, of_random, scan.control)
        spread = rows.spread
        return IterativeJetLens(
            labels=labels,
            orders=list(range(order + 1)),
            positions=rows.positions,
            tokens=trace.tokens[:, rows.positions],
            valid=rows.keep,
            center_scale=center_scale,
            linearize=linearize,
            rho=spread(series.rho),
            tail_bound=spread(series.tail_bound.transpose(0, 1)),
            alpha=spread(alpha),
            beta=spread(beta),
            borrowed_share=spread(borrowed),
            top_ids=spread(scan.top.indices, -2, -1),
            full_values=spread(scan.top.values, -2),
            own_values=spread(scan.own_values, -2),
            own_top_ids=None if scan.own_top1 is None else spread(scan.own_top1, fill=-1),
            model_top_ids=spread(scan.model.top.indices[:, 0], fill=-1),
            measures=own,
            control=control,
            target_ids=ids,
            target_names=names,
            target_logits=None if scan.target_logits is None else spread(scan.target_logits, -2),
            target_ranks=None if scan.target_ranks is None else spread(scan.target_ranks, -2, -1),
            unit=decoder.unit,
            tokenizer=network.tokenizer,
        )
