r"""Singular values, stable ranks and leading directions of detached maps, layer by layer, for one prompt.

With J = U S V' the map from the input to one output position:

=================================  ====================================================================
symbol                             name here
=================================  ====================================================================
s_1 >= s_2 >= ...                  `values` [map, vector]
\|J\|_F^2 / s_1^2                  `stable_rank`: how many directions carry the map, 1 .. d_model
u_1, u_2, ...                      `left` [map, vector, d_model], each in the sign of the prompt's own input
<u_i of map l, u_j of map n>       `projections(onto=n)`; `projection_path(onto=n)`: the paper's figure 4B
\|U_l' U_n\|_F^2 / k               `overlap(onto=n)`: mean squared cosine of the two subspaces of k directions
\|U_l' y\|^2 / \|y\|^2             `explained`: the share of the final stream y inside the layer's k directions
=================================  ====================================================================

A subspace of k random directions has an overlap and an explained share of k / d_model on average (`chance`).
`explained` says that the layer's map *writes* where the final stream points, not that it has computed the answer.

Source: Golden (arXiv 2505.24293, v3), section 3.5 and figure 4; `overlap`, `explained` and `chance` are ours. Cost: for
each input position, d_model vectors through all stages once, at positions that it reaches (`tl_jets.core.factors`; an MLP as a
matrix at each position). Matrices are never held, only their Gram matrices [d_model, d_model] in float64.

Example:
    >>> import torch
    >>> from tl_jets import CallableModel, Decoder, Norm
    >>> _ = torch.manual_seed(0)
    >>> W = torch.randn(2, 4, 4)
    >>> model = CallableModel(
    ...     embed=torch.nn.Embedding(5, 4),
    ...     stages=[{f"{i}_mlp": lambda x, i=i: torch.nn.functional.silu(x @ W[i])} for i in range(2)],
    ...     decoder=Decoder(Norm("RMS"), torch.randn(4, 7), torch.zeros(7)),
    ... )
    >>> spectra = detached_spectra(model, torch.tensor([[0, 3, 1]]), k=2)
    >>> spectra.labels
    ['embed > 0_mlp_out', 'embed > 1_pre', 'embed > 1_mlp_out', 'embed > final_post']
    >>> spectra.values.shape, spectra.projections().shape
    (torch.Size([4, 2]), torch.Size([4, 2, 2]))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tl_jets.core.changes import one_look
from tl_jets.core.decoder import add_gram
from tl_jets.core.factors import Span
from tl_jets.core.linear_map import MAX_BYTES
from tl_jets.core.logit_reader import TopTokens, slices
from tl_jets.core.model_marks import model_mark
from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.notebook import dataframe_html
from tl_jets.core.numerals import size_text
from tl_jets.core.options import check_integers
from tl_jets.core.protocol import DECODER_STEP, FINAL_STREAM
from tl_jets.core.results import Result, handle
from tl_jets.core.selection import Rows
from tl_jets.core.structure import Structure
from tl_jets.core.trace import Trace
from tl_jets.detached_map.composed_jacobian import LOGITS, ComposedJacobian
from tl_jets.detached_map.decoding import Directions, check_same, of_model

Maps = Literal["cumulative", "layers"]
# Size of the vectors of several input positions that run together.
GROUP_BYTES = 2**27


@dataclass(frozen=True, eq=False, repr=False)
class DetachedSpectra(Result):
    """The leading singular values and left directions of several detached maps of one prompt.

    Attributes:
        wrt: Labels of the maps' inputs, at `pos` (None: all positions, side by side).
        outputs: Labels of the maps' outputs, at `position`.
        values: Largest singular values, in descending order.
        stable_rank: frobenius^2 / values[0]^2; 0 for a map that is zero (an MLP alone, between two positions).
        left: Left singular vectors, in the sign of the prompt's own input.
        written: The model's own value at each output; `final` is the final stream at the position.
        model: Name of the model and a digest of its weights; None: not known.
        trace: The trace of the prompt. A loaded result has none: its directions are decoded after `with_model`.
    """

    wrt: list[str]
    outputs: list[str]
    position: int
    pos: int | None
    tokens: Int[Tensor, "1 pos"]
    values: Float[Tensor, "map vector"]
    frobenius: Float[Tensor, " map"]
    stable_rank: Float[Tensor, " map"]
    left: Float[Tensor, "map vector d_model"]
    written: Float[Tensor, "map d_model"]
    final: Float[Tensor, " d_model"]
    model: str | None = None
    trace: Any = handle()

    def __repr__(self) -> str:
        ranks = ", ".join(f"{rank:.2f}" for rank in self.stable_rank[:4].tolist())
        dots = ", ..." if len(self.labels) > 4 else ""
        return (
            f"DetachedSpectra({len(self.labels)} maps {self.labels[0]!r} .. {self.labels[-1]!r}, {self.values.shape[1]} "
            f"values each, at position {self.position}; stable ranks {ranks}{dots})"
        )

    def _body(self) -> str:
        columns = {"map": self.labels, "stable_rank": self.stable_rank.tolist(), "explained": self.explained.tolist()}
        columns |= {f"value {i}": values.tolist() for i, values in enumerate(self.values.T[:4])}
        return dataframe_html(pd.DataFrame(columns), rows=len(self.labels))

    @property
    def labels(self) -> list[str]:
        """`embed > 3_pre`, aligned to the map axis."""
        return [f"{wrt} > {output}" for wrt, output in zip(self.wrt, self.outputs, strict=True)]

    @property
    def chance(self) -> float:
        """Mean overlap and explained share of as many random directions."""
        return self.left.shape[1] / self.left.shape[2]

    def projections(self, onto: int | str = -1) -> Float[Tensor, "map vector onto_vector"]:
        """Cosines of every map's left directions with those of the map `onto` (index or label); figure 4B."""
        return self.left @ self.left[self._index(onto)].T

    def projection_path(self, onto: int | str = -1, n: int = 2, tokenizer: Any = None) -> pd.DataFrame:
        """First n left directions of each map, projected on the first n of one map (the paper: n = 2, the last).

        Args:
            onto: Index or label of the map that is projected on; the last by default.
            n: Number of directions.
            tokenizer: Decodes the token that each direction raises most; None for the model's own.

        Returns:
            One row per map and vector: wrt, output, vector, onto_0, ..., onto_{n-1} (cosines), inside (sum of their
            squares), chance (that of a random direction), top_token (its id without a tokenizer; None in a loaded result).

        Raises:
            ValueError: No such map, or n is not in 1..k.

        Source: Golden, arXiv 2505.24293 (v3), section 3.5 and figure 4B; `inside` and `chance` are ours.
        """
        if not 1 <= n <= self.left.shape[1]:
            raise ValueError(f"n must lie in 1..{self.left.shape[1]}, the directions kept; got {n}.")
        cosines = self.projections(onto)[:, :n, :n].tolist()
        texts = self._texts(1, tokenizer)
        rows = []
        for i, (wrt, output) in enumerate(zip(self.wrt, self.outputs, strict=True)):
            for vector, along in enumerate(cosines[i]):
                row = {"wrt": wrt, "output": output, "vector": vector}
                row |= {f"onto_{j}": cosine for j, cosine in enumerate(along)}
                row |= {"inside": sum(cosine**2 for cosine in along), "chance": n / self.left.shape[2]}
                rows.append(row | {"top_token": texts and texts[i][vector][0]})
        return pd.DataFrame(rows)

    def overlap(self, onto: int | str = -1) -> Float[Tensor, " map"]:
        """Mean squared cosine of every map's k directions with those of one map: 1 for the same subspace."""
        return self.projections(onto).square().sum((1, 2)) / self.left.shape[1]

    @property
    def explained(self) -> Float[Tensor, " map"]:
        """Share of the final stream's squared length inside every map's k directions."""
        return (self.left @ self.final).square().sum(1) / self.final.square().sum()

    @property
    def explained_own(self) -> Float[Tensor, " map"]:
        """Share of the squared length of the model's own output inside the map's k directions."""
        inside = torch.einsum("mvd,md->mv", self.left, self.written).square().sum(1)
        return inside / self.written.square().sum(1)

    def top_tokens(self, k: int = 5) -> TopTokens:
        """The k tokens that every left direction raises most, through the final norm's linear part [map, vector, k]."""
        return self._directions.raised(self.left, k)

    @property
    def _directions(self) -> Directions:
        return Directions(of_model(self.trace, "Tokens of directions"), FINAL_STREAM)

    def _texts(self, k: int, tokenizer: Any) -> list[list[list[Any]]] | None:
        """The texts of `top_tokens(k)`; None in a loaded result."""
        return None if self.trace is None else self._directions.texts(self.top_tokens(k).indices, tokenizer)

    def with_model(self, model: Any, text_or_tokens: Any) -> DetachedSpectra:
        """A loaded result with its trace, so that directions decode; ValueError for another input or model."""
        trace = trace_of(ResidualNetwork.of(model), text_or_tokens)
        found = trace[FINAL_STREAM]
        check_same(self.tokens, self.final, trace, found[0, self.position] if self.position < found.shape[1] else found)
        return replace(self, trace=trace)

    def to_dataframe(self, tokenizer: Any = None, k: int = 5) -> pd.DataFrame:
        """One row per map and vector.

        Columns: wrt, output, vector, value, relative (to the map's largest), stable_rank, overlap (with the last map),
        explained, explained_own, chance, top_tokens (None in a loaded result).
        """
        texts = self._texts(k, tokenizer)
        by_map = {name: getattr(self, name).tolist() for name in ("stable_rank", "explained", "explained_own")} | {
            "overlap": self.overlap().tolist()
        }
        rows = []
        for i, (wrt, output) in enumerate(zip(self.wrt, self.outputs, strict=True)):
            for vector, value in enumerate(self.values[i].tolist()):
                row = {"wrt": wrt, "output": output, "vector": vector, "value": value}
                row["relative"] = value / max(float(self.values[i, 0]), 1e-300)
                row |= {name: values[i] for name, values in by_map.items()}
                rows.append(row | {"chance": self.chance, "top_tokens": texts and texts[i][vector]})
        return pd.DataFrame(rows)

    def _index(self, which: int | str) -> int:
        names = {name: i for i, name in enumerate(self.outputs)} | {name: i for i, name in enumerate(self.labels)}
        index = names.get(which, which) if isinstance(which, str) else which
        if isinstance(index, str) or not -len(self.outputs) <= index < len(self.outputs):
            raise ValueError(f"onto must be an index or a label among {self.labels}; got {which!r}.")
        return index


@one_look()
def detached_spectra(
    model: Any,
    text_or_tokens: Any,
    *,
    maps: Maps | Sequence[tuple[str, str]] = "cumulative",
    layers: int | Sequence[int] | None = None,
    k: int = 8,
    position: int = -1,
    pos: int | None = None,
    max_bytes: int | None = MAX_BYTES,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    progress: bool = True,
) -> DetachedSpectra:
    """A `DetachedSpectra`: singular values, stable ranks and leading output directions, layer by layer.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork`.
        text_or_tokens: One prompt, its token ids [1, pos], or a `Trace` of the network.
        maps: `"cumulative"`: from the embeddings to each layer's stream and writes. `"layers"`: of each layer alone, from its
            own input (the MLP's is the stream between). Or pairs of labels (wrt, output).
        layers: Layers whose maps are made, -1 the last; None for all. Only with `maps` by name.
        k: Number of singular values and vectors.
        position: Output position; -1 is the last.
        pos: Input position: the matrix J_t of this token alone. None: all of them side by side.
        max_bytes: Refuse to hold more at once (d_model^2 x pos numbers); None for no limit.
        attention_mask: Passed to the model (left padding needs it).
        cache: A ready `ActivationCache` of the same input.
        progress: Show a progress bar in a terminal.

    Raises:
        ValueError: More than one prompt, bad labels, layers, positions or k, or too large a prompt.

    Source: Golden, arXiv 2505.24293 (v3), section 3.5 and figure 4. Cost: see the module.
    """
    check_integers(1, k=k)
    with torch.inference_mode(False), torch.no_grad():
        trace = trace_of(ResidualNetwork.of(model), text_or_tokens, attention_mask, cache)
        pairs = _pairs(trace.network, maps, layers)
        sources = _sources(trace, k, pos, max_bytes)
        place = Rows.of(trace, position).columns("The position of a map")
        found = _accumulated(trace, pairs, sources, place, progress)
        decomposed = [_decomposed(*found[pair][:2], k) for pair in pairs]
        values, left, frobenius = map(torch.stack, zip(*decomposed, strict=True))
        dtype = trace[FINAL_STREAM].dtype
        return DetachedSpectra(
            wrt=[wrt for wrt, _ in pairs],
            outputs=[output for _, output in pairs],
            position=place[0],
            pos=None if pos is None else sources[0],
            tokens=trace.tokens,
            values=values.to(dtype),
            frobenius=frobenius.to(dtype),
            stable_rank=(frobenius / values[:, 0]).square().nan_to_num(0.0).to(dtype),
            left=left.to(dtype),
            written=torch.stack([found[pair][2] for pair in pairs]),
            final=trace[FINAL_STREAM][0, place[0]],
            model=model_mark(trace.network, trace.recording.hook_state),
            trace=trace,
        )


def _pairs(network: Structure, maps: Any, layers: Any) -> list[tuple[str, str]]:
    """The labels (wrt, output) of every map."""
    if isinstance(maps, Iterable) and not isinstance(maps, str):
        if layers is not None:
            raise ValueError(
                f"layers choose among maps by name; got pairs of labels and layers={layers!r}. Leave one out."
            )
        pairs = [tuple(pair) for pair in maps]
        if not pairs or any(len(pair) != 2 for pair in pairs) or len(set(pairs)) < len(pairs):
            raise ValueError(f"maps must be distinct pairs of labels (wrt, output), or {get_args(Maps)}; got {maps!r}.")
        if any(output in (LOGITS, DECODER_STEP) for _, output in pairs):
            raise ValueError(
                "Spectra are of maps to streams and writes; got 'logits' or 'ln_final'. Use detached_jacobian's svd."
            )
        return [(network.label(wrt), network.label(output)) for wrt, output in pairs]
    if maps not in get_args(Maps):
        raise ValueError(f"maps must be one of {get_args(Maps)} or pairs of labels; got {maps!r}.")
    fine, chosen = network.at("sublayer"), _layers(network, layers)
    pairs, first = [], fine.streams[0]
    for i, stage in enumerate(fine.stages):
        following = fine.streams[i + 1]
        start = fine.sources[0] if maps == "cumulative" else stage.stream
        is_chosen = stage.steps[0].layer in chosen
        pairs += [(start, step.write) for step in stage.steps if is_chosen]
        if not following.endswith("_mid"):
            pairs += [(start if maps == "cumulative" else first, following)] if is_chosen else []
            first = following
    if not pairs:
        raise ValueError(
            f"Spectra need a layer after {fine.streams[0]}, where the network starts; got layers={layers!r}."
        )
    return pairs


def _layers(network: Structure, layers: Any) -> set[int]:
    """The chosen layers; None for all."""
    count = network.n_layers
    wanted = list(range(count)) if layers is None else [layers] if isinstance(layers, int) else list(layers)
    if not wanted or not all(isinstance(layer, int) and -count <= layer < count for layer in wanted):
        raise ValueError(f"layers must be numbers of layers in {-count}..{count - 1}; got {layers!r}.")
    return {layer % count for layer in wanted}


def _sources(trace: Trace, k: int, pos: int | None, max_bytes: int | None) -> list[int]:
    """Check the options; return the input positions to evaluate."""
    (batch, length), d_model = trace.tokens.shape, trace[FINAL_STREAM].shape[-1]
    if batch != 1:
        raise ValueError(f"Spectra are of one prompt; got {batch}. Pass them one at a time.")
    if not 1 <= k <= d_model:
        raise ValueError(f"k must lie in 1..{d_model}; got {k}.")
    if pos is not None and not -length <= pos < length:
        raise ValueError(f"pos must lie in {-length}..{length - 1} for this input; got {pos}.")
    size = d_model**2 * length * trace[FINAL_STREAM].element_size()
    if max_bytes is not None and size > max_bytes:
        raise ValueError(
            f"What is held at once must take at most max_bytes = {size_text(max_bytes)}; d_model^2 x {length} positions "
            f"take {size_text(size)}. Use detached_jacobian(...).svd, a shorter prompt, or max_bytes=None."
        )
    return list(range(length)) if pos is None else [pos % length]


def _accumulated(
    trace: Trace, pairs: Sequence[tuple[str, str]], sources: Sequence[int], place: list[int], progress: bool
) -> dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]]:
    """By map: the lower triangle of J J', and J e, over some input positions, and the model's own value at the output."""
    compositions = {
        wrt: ComposedJacobian(trace, wrt, [output for start, output in pairs if start == wrt], place)
        for wrt in dict.fromkeys(wrt for wrt, _ in pairs)
    }
    found: dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]] = {}
    size = trace[FINAL_STREAM].numel() * trace[FINAL_STREAM].shape[-1] * trace[FINAL_STREAM].element_size()
    groups = list(slices(len(sources), max(1, GROUP_BYTES // size)))
    total = len(groups) * sum(len(composed.outputs) for composed in compositions.values())
    with tqdm(total=total, unit="map", delay=1, leave=False, disable=None if progress else True) as bar:
        for wrt, composed in compositions.items():
            point = composed.point[0].double()
            for group in groups:
                chosen = torch.tensor(sources[group], device=point.device)
                for output, parts in composed.on_the_way(_units(composed.point[0], sources[group])):
                    columns = torch.cat([part.mT for part in parts]).double()  # J_t', a row an input coordinate
                    image = point[chosen].flatten() @ columns
                    gram, earlier = found.get((wrt, output), (image.new_zeros(len(image), len(image)), 0))[:2]
                    add_gram(gram, columns.T)
                    found[wrt, output] = gram, image + earlier, composed.truth(output)[0, 0]
                    bar.update()
    return found


def _units(like: Tensor, sources: Sequence[int]) -> list[Span]:
    """Every coordinate at every source; zero from there to the last position."""
    length, d_model = like.shape
    spans = [Span(source, like.new_zeros(length - source, d_model, d_model)) for source in sources]
    for span in spans:
        span.vectors[0].fill_diagonal_(1)
    return spans


def _decomposed(gram: Tensor, image: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest singular values, their left vectors in the sign of J e, and the Frobenius norm."""
    squares, vectors = torch.linalg.eigh(gram)  # all, for LAPACK's way to some of them takes two to nine times as long
    left = vectors.T.flip(0)[:k]
    left = torch.where(left @ image < 0, -1.0, 1.0).to(left)[:, None] * left
    return squares.flip(0)[:k].clamp_min(0).sqrt(), left, gram.trace().sqrt()
