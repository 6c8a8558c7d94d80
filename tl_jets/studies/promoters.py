r"""Which heads, MLPs and neurons of the whole network promote a set of tokens, from the weights alone.

A component writes vectors w_i to the stream. With D the final norm without its scale (centering, weight) and c_t(x) what x adds
to the logit of token t minus the mean over the vocabulary (`tl_jets.core.attribution`),

.. math::
    \text{score} = \frac{\frac1n \sum_i \frac{1}{|S|} \sum_{t \in S} c_t(D w_i)}
    {\sqrt{\frac1n \sum_i \frac1V \sum_t c_t(D w_i)^2}} .

It is the mean effect on the set in units of the component's own effects on the whole vocabulary, whatever the size of its writes.
A set of one token that alone is raised reaches about sqrt(V); of a set of random tokens it is about 1/sqrt(|S|).

=========  ===============================================================================================
component  its writes w_i
=========  ===============================================================================================
neuron     its row of W_out, one vector. Its activation may have either sign (gated MLPs): so may its score
MLP        what it writes of random single tokens, without attention
head       what W_O makes of its values on the same tokens, minus those of the zero stream
=========  ===============================================================================================

MLPs and heads read the embedding with the first MLP's write (`tl_jets.studies.heads`). A head that copies what it reads
promotes no set. Under a post-norm a neuron's or head's write passes its weight, not its scale.

**Control.** Sets of as many random tokens, as frequent as those of the set (`tl_jets.studies.matched_tokens`). `chance` asks the
whole network: the share of these sets (and the set itself) of which some component of the kind has a score as large.

Cost: the Gram matrix of W_U, and d_model^2 multiply-adds a neuron; no vector of the size of the vocabulary per component, but
its scores of all sets: 8 bytes a component and set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tl_jets.adapters.callables import CallableModel
from tl_jets.adapters.parts import output_weights
from tl_jets.calculus import Norm
from tl_jets.core.attribution import directions
from tl_jets.core.intervals import central
from tl_jets.core.logit_reader import slices
from tl_jets.core.measures import check_seed
from tl_jets.core.model_marks import model_mark
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.options import check_choice, check_integers
from tl_jets.core.results import Result
from tl_jets.core.tokens import token_names, visible
from tl_jets.ngrams.float32 import full_float32
from tl_jets.ngrams.head_maps import HeadReader
from tl_jets.ngrams.streams import TokenIds, VocabularyStreams, mlp_steps, read_tokens
from tl_jets.studies.heads import read_layers
from tl_jets.studies.matched_tokens import frequency_key, matched

Kind = Literal["neuron", "mlp", "head"]
# Neurons scored at a time, and prompts of one token in the forward pass.
ROWS, PROMPTS = 4096, 64


@dataclass(frozen=True, eq=False, repr=False)
class Promoters(Result):
    """The components of each kind with the largest scores, by size.

    Attributes:
        labels: Components: `L3N17`, `3_mlp`, `L3H2`.
        kinds: `"neuron"`, `"mlp"` or `"head"` of each.
        scores: Mean effect on the set, in the component's own units; see the module. Shape [component].
        controls: Its scores of the control sets. Shape [component, control].
        chance: Share of control sets, and the set, with a component of the kind whose score is as large. Shape [component].
        counts: Number of components of each kind.
        tokens: Ids of the set. Shape [token].
        token_names: Their texts.
        n_tokens: Number of random tokens that MLPs and heads were read on.
        matched_by: What makes control tokens as frequent: `"embedding norm"` or `"unigram"`.
        seed: Random seed.
        model: Mark of the model.
    """

    labels: list[str]
    kinds: list[str]
    scores: Float[Tensor, " component"]
    controls: Float[Tensor, "component control"] = field(repr=False)
    chance: Float[Tensor, " component"]
    counts: dict[str, int]
    tokens: Int[Tensor, " token"]
    token_names: dict[int, str] = field(repr=False)
    n_tokens: int
    matched_by: str
    seed: int
    model: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per component: score, central 95% interval of its scores of control sets, chance."""
        ends = [central(row) for row in self.controls.numpy()]
        columns: dict[str, Any] = {"component": self.labels, "kind": self.kinds, "score": self.scores.tolist()}
        columns |= {"control_low": [low for low, _ in ends], "control_high": [high for _, high in ends]}
        return pd.DataFrame(columns | {"chance": self.chance.tolist()})

    def top(self, k: int = 10, kind: Kind | None = None) -> pd.DataFrame:
        """The k components with the largest scores by size, of a kind or of all."""
        check_integers(1, k=k)
        check_choice("kind", kind, [None, *get_args(Kind)])
        order = self.scores.abs().sort(descending=True, stable=True).indices.tolist()
        chosen = [i for i in order if kind in (None, self.kinds[i])]
        return self.to_dataframe().iloc[chosen[:k]].reset_index(drop=True)

    def __repr__(self) -> str:
        names = [visible(self.token_names[token]) for token in self.tokens[:6].tolist()]
        more = f", ... ({len(self.tokens)})" if len(self.tokens) > len(names) else ""
        searched = ", ".join(f"{count:,} {kind}s" for kind, count in self.counts.items())
        found = pd.concat([self.top(5, kind) for kind in self.counts])  # type: ignore[arg-type]
        shown = found.to_string(index=False, float_format="%.3g")
        return f"Promoters({', '.join(names)}{more}; {searched}; {self.controls.shape[1]} control sets)\n{shown}"


@torch.no_grad()
@full_float32()
def search(
    model: Any,
    tokens: TokenIds,
    *,
    kinds: Sequence[Kind] = get_args(Kind),
    layers: Sequence[int] | None = None,
    n_tokens: int = 256,
    unigram: Float[Tensor, " d_vocab"] | None = None,
    controls: int = 100,
    top_k: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> Promoters:
    """Heads, MLPs and neurons that promote (or suppress) a set of tokens, over the whole network, from the weights.

    Args:
        model: A model or a `ResidualNetwork`.
        tokens: Ids or texts of one token (with their leading space).
        kinds: Kinds of components to search: `"neuron"`, `"mlp"`, `"head"`.
        layers: Layers; None for all.
        n_tokens: Number of random tokens on which MLPs and heads are read.
        unigram: Probability of every token, which control tokens are matched by; None: by embedding norms. Shape [d_vocab].
        controls: Number of control sets.
        top_k: Number of components of each kind in the result.
        seed: Random seed of tokens and control sets.
        progress: Show a bar in a terminal over layers.

    Raises:
        ValueError: A token, layer or option is invalid, or there is no component of these kinds.
        NotImplementedError: Plain functions; neurons or heads that are not understood: leave their kind out.

    Source: Geva et al., arXiv 2012.14913 and 2203.14680 (rows of W_out promote tokens); heads and controls are ours.

    Example:
        >>> import tl_jets as tj
        >>> found = search(tj.load_tinydocs(), [" file", " files", " directory"], controls=5, top_k=3, progress=False)
        >>> found.counts, len(found.labels)
        ({'neuron': 1792, 'mlp': 4, 'head': 16}, 9)
    """
    check_integers(0, controls=controls)
    check_integers(1, n_tokens=n_tokens, top_k=top_k)
    check_seed(seed)
    network = _network(model, kinds)
    wanted = read_layers(layers, network)
    single = VocabularyStreams(network, mlp_steps(network), prompts=PROMPTS)
    ids = read_tokens("tokens", tokens, network.decoder.d_vocab, "cpu", network.tokenizer)
    draw = np.random.default_rng(seed)
    sets = torch.cat([ids[None], matched(ids, frequency_key(single, unigram), controls, draw)])
    words = torch.from_numpy(draw.permutation(single.n_tokens)[:n_tokens])
    reader = _Reader(single, sets, words)
    found: dict[str, tuple[list[str], list[Tensor]]] = {kind: ([], []) for kind in kinds}
    for layer in tqdm(wanted, unit="layer", delay=1, leave=False, disable=None if progress else True):
        for kind in kinds:
            own, scores = reader.read(kind, layer)
            found[kind][0].extend(own)
            found[kind][1].append(scores)
    if not any(labels for labels, _ in found.values()):
        raise ValueError(f"There must be components to search; layers {wanted} have none of the kinds {list(kinds)}.")
    matched_by = "embedding norm" if unigram is None else "unigram"
    return _result(found, top_k, network, tokens=ids, n_tokens=len(words), matched_by=matched_by, seed=seed)


def _network(model: Any, kinds: Sequence[Kind]) -> ResidualNetwork:
    """The network whose components of some kinds are searched."""
    for kind in kinds:
        check_choice("kinds", kind, get_args(Kind))
    network = ResidualNetwork(model).at("sublayer")
    if isinstance(network.view, CallableModel):
        raise NotImplementedError("`search` reads weights of MLPs and heads; plain functions have none. Pass a model.")
    return network


def _result(
    found: dict[str, tuple[list[str], list[Tensor]]], top_k: int, network: ResidualNetwork, tokens: Tensor, **about: Any
) -> Promoters:
    """The largest components of each kind, from the labels of all and their scores [component, set] by layer."""
    labels, kinds, best, chance = [], [], [], []
    found = {kind: own for kind, own in found.items() if own[0]}
    for kind, (names, parts) in found.items():
        every = torch.cat(parts)
        order = every[:, 0].abs().sort(descending=True, stable=True).indices[:top_k]
        own, peaks = every[order], every[:, 1:].abs().amax(0)
        labels += [names[i] for i in order.tolist()]
        kinds += [kind] * len(order)
        best.append(own)
        # The set itself counts among them.
        chance.append((1 + (peaks >= own[:, :1].abs()).sum(1)).double() / every.shape[1])
    return Promoters(
        labels=labels,
        kinds=kinds,
        scores=torch.cat(best)[:, 0],
        controls=torch.cat(best)[:, 1:],
        chance=torch.cat(chance),
        counts={kind: len(names) for kind, (names, _) in found.items()},
        tokens=tokens,
        token_names=token_names(network.tokenizer, [tokens]),
        model=model_mark(network),
        **about,
    )


class _Reader:
    """Scores of a layer's components for sets of tokens."""

    def __init__(self, single: VocabularyStreams, sets: Int[Tensor, "set token"], words: Int[Tensor, " word"]):
        view: Any = single.network.view
        self.single, self.view = single, view
        decoder = single.network.decoder
        self.norm = decoder.norm
        self.goal = torch.stack([directions(decoder, ids)[:, :-1].mean(0) for ids in sets], dim=1)  # [d_model, set]
        self.gram = decoder.metric(centered=True).gram[:-1, :-1] / decoder.d_vocab
        self._none = torch.empty(0, len(sets), dtype=torch.float64, device="cpu")
        embed = single.embed(words.to(single.device))
        first = "0_mlp"
        self.first, self.later = embed, embed + single.stream(embed, first) if first in single.paths else embed

    def read(self, kind: Kind, layer: int) -> tuple[list[str], Float[Tensor, "component set"]]:
        """Labels and scores of the components of a kind."""
        return {"neuron": self._neurons, "mlp": self._mlp, "head": self._heads}[kind](layer)

    def _neurons(self, layer: int) -> tuple[list[str], Tensor]:
        if f"{layer}_mlp" not in self.single.paths:
            return [], self._none
        label = f"L{layer}N0_out"
        self.single.trace[label]  # compares all neurons with what the MLP wrote
        W_out, _ = output_weights(self.view, layer)
        parts = [self._decoded(W_out[part], self.view.post_norm(layer, "mlp")) for part in slices(len(W_out), ROWS)]
        scores = [self._scores(x @ self.goal, ((x @ self.gram) * x).sum(-1)) for x in parts]
        return [f"L{layer}N{neuron}" for neuron in range(len(W_out))], torch.cat(scores)

    def _mlp(self, layer: int) -> tuple[list[str], Tensor]:
        label = f"{layer}_mlp"
        if label not in self.single.paths:
            return [], self._none
        writes = self._decoded(self.single.stream(self._stream(layer), label), None)
        mean, square = writes.mean(0, keepdim=True), ((writes @ self.gram) * writes).sum(-1).mean(0, keepdim=True)
        return [label], self._scores(mean @ self.goal, square)

    def _heads(self, layer: int) -> tuple[list[str], Tensor]:
        if f"{layer}_attn" not in {step.label for step in self.single.network.steps}:
            return [], self._none
        reader = HeadReader(self.single.network, layer, self.single)
        values = reader.values(self._stream(layer)).double()
        W_O = self.view.blocks[layer].attn.W_O.detach()
        scores = []
        for head, own in enumerate(values.unbind(1)):
            rows = self._decoded(W_O[head], self.view.post_norm(layer))
            own = own.to(rows)
            second = own.T @ own / len(own)
            square = (second * (rows @ self.gram @ rows.T)).sum()[None]
            scores.append(self._scores(own.mean(0, keepdim=True) @ rows @ self.goal, square))
        return [f"L{layer}H{head}" for head in range(len(scores))], torch.cat(scores)

    def _stream(self, layer: int) -> Tensor:
        return self.later if layer else self.first

    def _decoded(self, writes: Float[Tensor, "row d_model"], post: Norm | None) -> Float[Tensor, "row d_model"]:
        """Writes after a post-norm and the final norm, at scale 1, in float64."""
        found = writes.to(self.gram)
        for norm in (self.norm,) if post is None else (post, self.norm):
            found = norm.center(found)
            found = found if norm.weight is None else found * norm.weight.to(found)
        return found

    def _scores(self, effects: Float[Tensor, "row set"], squares: Float[Tensor, " row"]) -> Float[Tensor, "row set"]:
        """Effects in units of root mean square effects on the vocabulary; 0 for a component that writes nothing."""
        sizes = squares.clamp_min(0).sqrt()[:, None]
        return torch.where(sizes > 0, effects / sizes.clamp_min(1e-300), 0.0).cpu()
