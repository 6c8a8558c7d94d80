r"""The iterative jet lens: what every layer's stream says about the next token, at every order.

Layer by layer, the jet of the final norm at the layer's stream x = h_l, evaluated at the final stream
y = h_L, through the unembedding. Order 0 is the logit lens. Because norms are what they are, every order is a mix of two
logit vectors,

.. math::
    \text{lens}_k = \alpha_k \, U(w * x) + \beta_k \, U(w * y) + \text{const}, \qquad \beta_0 = 0,

the layer's own reading and *the model's own answer*. So for k >= 1 a good score may be borrowed: every cell carries its
`alpha`, `beta` and `borrowed_share`, `borrowed` marks the cells whose answer is not the own part's, and every measure
stands beside a random center of equal norm and angle (`control`), which knows nothing of the layer.

Detached (``linearize="detached"``), the final norm keeps the scale that it has at h_L: alpha = 1 / scale(h_L) at every layer,
beta = 0. The lens is then what the stream so far gives to the model's logits, cumulative direct logit attribution: logits of
the order-0 jet, the logit lens, times scale(h_l) / scale(h_L), biases apart. Its order of tokens is the logit lens' where
there are no biases; its sizes are the model's, so that differences of layers are what their writes give.

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
from tl_jets.core.lens_logits import Control, Mixture, scan_mixture
from tl_jets.core.logit_reader import CHUNK_SIZE
from tl_jets.core.measures import Measures, geometry_in_plane, random_directions, split_along, weighted
from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.selection import Rows, TargetInput, check_options, model_logits, read_targets, stream_labels
from tl_jets.core.tokens import decode, token_names
from tl_jets.lenses.result import LensResult

# What has a layer axis.
_LAYERED = {
    *("rho", "tail_bound", "alpha", "beta", "borrowed_share", "top_ids", "full_values", "own_values", "own_top_ids"),
    *("measures", "control", "target_logits", "target_ranks"),
}


@dataclass(frozen=True, eq=False, repr=False)
class IterativeJetLens(LensResult):
    """What every layer's stream says at every order. Axes: [layer, order, batch, pos]; NaN (ids: -1) at padding.

    Attributes:
        labels: Streams, aligned to the layer axis: `0_pre`, ..., `final_post` (TransformerLens' names).
        orders: 0..order, aligned to the order axis.
        positions: Positions in the prompt, aligned to the pos axis.
        tokens: The tokens at those positions [batch, pos].
        valid: Which of them are real [batch, pos].
        center_scale: How centers were rescaled.
        linearize: `"jet"`, or `"detached"`, whose only order is 0.
        rho: Radius ratio |v| / |x| of each series; it converges at the final stream where rho < 1 [layer, batch, pos]. NaN
            for detached lenses, which are no series; so is `tail_bound`.
        tail_bound: Bound on what all higher orders add, RMS before the norm's gain; inf where rho >= 1.
        alpha: Coefficient of the layer's own reading.
        beta: Coefficient of the model's own answer; 0 for `final_post`, whose own reading that is.
        borrowed_share: Length of the beta part over the sum of the lengths of both, logits centered over the vocabulary.
        top_ids: Best tokens, best first [layer, order, batch, pos, k].
        full_values: Their additive logits [layer, order, batch, pos, k].
        own_values: What the own part alone (without beta) gives them [layer, order, batch, pos, k].
        own_top_ids: Best token of the own part alone; None if not measured.
        model_top_ids: The model's best token [batch, pos].
        measures: How close to the model each cell is; None if not measured.
        control: The same for the random center; None without one.
        target_ids: Token ids asked for [batch, pos, target].
        target_names: How they were asked for.
        target_logits: Their additive logits [layer, order, batch, pos, target].
        target_ranks: Their ranks, 0 for the best token [layer, order, batch, pos, target].
        unit: What logits are measured in: `"logits"`, or `"logits before the softcap"`.
        tokenizer: The model's tokenizer, or None.
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
        """Cells whose best token is not the own part's: the answer comes from the model's own final stream."""
        if self.own_top_ids is None:
            raise AttributeError  # `__getattr__` says why
        return (self.top_ids[..., 0] != self.own_top_ids) & self.valid

    def top_tokens(self, tokenizer: Any = None) -> dict[str, Any]:
        """Decoded best tokens by layer: {label: nested lists [order][batch][pos][k]}."""
        return {label: decode(tokenizer or self.tokenizer, self.top_ids[i]) for i, label in enumerate(self.labels)}

    def rank_trajectory(self, target: str | int | None = None) -> Int[Tensor, "layer order batch pos"]:
        """Rank of one target (0 is the best token) at every layer and order; None takes the only one."""
        return self._of_target(self.target_ranks, target)

    def logit_difference(self, target: str | int, other: str | int) -> Float[Tensor, "layer order batch pos"]:
        """Additive logit of `target` minus that of `other`, both among the `targets` asked for."""
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
        """Every measure and its control averaged over all real positions of all prompts, a row a layer and order.

        Source: Chen et al., figure 3, bottom.
        """
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
        """What was measured [layer, order, batch, pos], each measure followed by its control."""
        scores = {}
        for name, values in [] if self.measures is None else self.measures.items():
            scores[name] = values
            if self.control is not None:
                scores[f"control_{name}"] = getattr(self.control, name)
        return scores

    def to_dataframe(self, tokenizer: Any = None, top_k: int | None = None) -> pd.DataFrame:
        """One row a layer, order, batch, real position and best token.

        Columns: layer, order, batch, pos, token (read at that position), rank, token_index, token_string (the id without a
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
    layers: int | str | Sequence[int | str] | None = None,
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
    """Every layer's jet of the final norm at all orders up to `order`, through the unembedding. Order 0: the logit lens.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork` (keep one to share the metric and the self-check).
        text_or_tokens: A prompt, a list of prompts, token ids [batch, pos], or a `Trace` of the network.
        order: Highest order k >= 0; all orders 0..k are returned and cost about as much as one. None is 1.
        layers: Layers (an int l is `l_pre`, n_layers or -1 is `final_post`) or stream labels; None for all.
        positions: Positions to read; None for all. Negative ones count from the end of the padded row.
        incl_mid: With `layers=None`, also read the streams between attention and MLP (parallel blocks have none).
        center_scale: Length of the center: `"none"` (the layer's own, the paper's), `"match"` or `"orthogonal"`, which
            make the series converge; see `borrowed_share` and `control` for what that is worth.
        linearize: `"jet"`, or `"detached"`: the final norm with its scale at the final stream, direct logit attribution of
            every layer's stream; takes neither an order above 0 nor a center_scale.
        targets: Tokens whose logits and ranks to follow: strings or ids (the same everywhere), one list of them a
            prompt (`[[" Paris"], [" Rome"]]`), or a tensor of ids [batch, pos] aligned with `positions` (one a position).
        top_k: How many best tokens a cell keeps.
        measures: Compute the measures, their controls and the own part's best token.
        seed: Of the random control, whose directions depend on it and on the position in the prompt alone: all layers and prompts
            share them, and for the spread of a control several seeds are needed. None for no control, a fifth faster (then
            nothing tells what a measure is worth).
        attention_mask: Passed to the model (left padding needs it).
        cache: A ready `ActivationCache` of the same input.
        chunk_size: Rows of d_vocab logits held at once.

    Returns:
        An `IterativeJetLens` with axes [layer, order, batch, pos].

    Raises:
        ValueError: Bad order, layer, position, option or input; the message says what must hold.
        TypeError: Order or targets of the wrong type.

    Source:
        Chen et al., section 4; nostalgebraist 2020 for order 0.

    Cost:
        A forward pass and one product of all layers' streams with the unembedding, whatever the order.
    """
    check_options(center_scale, top_k, chunk_size)
    order = read_order(linearize, order, 1)
    if linearize == "detached":
        check_detached(order=order, center_scale=center_scale)
    network = ResidualNetwork.of(model)
    trace = trace_of(network, text_or_tokens, attention_mask, cache)
    rows = Rows.of(trace, positions)
    labels = stream_labels(network, layers, incl_mid)
    decoder, norm = network.decoder, network.decoder.norm
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
            # Two ways to say the same: the model's answer is the last stream's own reading, at every order.
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
