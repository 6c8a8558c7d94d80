r"""The detached map: a language model as an exact linear map of its input embeddings, at one input.

With all norm scales, attention patterns and gates frozen at the running forward pass (see `tl_jets.calculus.frozen`),
the network is affine in the embeddings e_1 .. e_T and still has the same output:

.. math::
    \text{output} = \sum_t J_t e_t + \text{bias}.

The bias is the frozen map at zero: biases, learned positions and hook edits of streams, carried to the output. It is
computed by a second pass, never as output - J e, so `reconstruction_error` is a measurement.

======================  ==========================================================
symbol                  name here
======================  ==========================================================
e, the input            `wrt`, its value `point` [batch, pos, d_model]
output                  `value` [batch, out_pos, width], before a final softcap
J u, J' v               `apply`, `apply_transpose`
J_t e_t                 `contributions` [batch, pos, out_pos, width]
======================  ==========================================================

Source: Golden, *Equivalent Linear Mappings of Large Language Models* (arXiv 2505.24293, v3), sections 2.2 and 3. Cost:
a trace, a forward pass under autograd and one for the bias. J' v costs a backward pass, J u two; many vectors run as
one batch. The matrix costs d_model vectors through all stages (`tl_jets.core.factors`), for logits, too.

Example:
    >>> import torch
    >>> from tl_jets import CallableModel, Decoder, Norm
    >>> _ = torch.manual_seed(0)
    >>> W = torch.randn(2, 4, 4, dtype=torch.float64)
    >>> model = CallableModel(
    ...     embed=torch.nn.Embedding(5, 4, dtype=torch.float64),
    ...     stages=[{"0_mlp": lambda x: torch.nn.functional.silu(x @ W[0]) * (x @ W[1])}],
    ...     decoder=Decoder(Norm("RMS"), torch.randn(4, 7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)),
    ... )
    >>> J = detached_jacobian(model, torch.tensor([[0, 3, 1]]), output="logits")
    >>> J.reconstruction_error < 1e-14, J.ordinary_error > 1e-2
    (True, True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_jets.core.changes import one_look
from tl_jets.core.frozen_network import not_affine, rounding
from tl_jets.core.labels import LabelInput
from tl_jets.core.linear_map import CHUNK_SIZE, MAX_BYTES, LinearMap, SingularVectors
from tl_jets.core.logit_reader import TopTokens
from tl_jets.core.markup import text
from tl_jets.core.model_marks import model_mark
from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.notebook import dataframe_html
from tl_jets.core.numerals import size_text
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.results import Result, handle
from tl_jets.core.selection import Rows
from tl_jets.core.tokens import token_names, visible
from tl_jets.core.trace import Trace
from tl_jets.detached_map.block_norms import BlockNorms, block_norms
from tl_jets.detached_map.composed_jacobian import LOGITS, ComposedJacobian, ComposedMap
from tl_jets.detached_map.decoding import Directions, check_same, of_model


@dataclass(frozen=True, eq=False, repr=False)
class DetachedJacobian(Result):
    """A model as an exact linear map at one input: value = sum_t J_t e_t + bias.

    A loaded one has numbers only; `map`, `ordinary` and `trace`, with which it multiplies and decodes, come `with_model`.

    Attributes:
        positions: Output positions in the prompt, aligned to the out_pos axis.
        value: The model's own output there, before a final softcap.
        bias: The frozen map at zero, computed by a pass of its own.
        reconstruction_error: |J e + bias - value| / |value|; `ordinary_error` is that of the ordinary Jacobian.
        token_names: Texts of the ids in `tokens`.
        parts: The contributions of a loaded result; None before.
        model: Name of the model and a digest of its weights; None: not known.
        map: J: `apply`, `apply_transpose`, `materialize`, `block`, `svd`.
        ordinary: The model's ordinary Jacobian, with the same methods, made anew at each product; None if left out.
        trace: The trace of the input.
    """

    output: str
    wrt: str
    positions: list[int]
    tokens: Int[Tensor, "batch pos"]
    valid: Bool[Tensor, "batch pos"]
    value: Float[Tensor, "batch out_pos width"]
    bias: Float[Tensor, "batch out_pos width"]
    reconstruction_error: float
    ordinary_error: float | None
    token_names: dict[int, str]
    parts: Float[Tensor, "batch pos out_pos width"] | None = None
    model: str | None = None
    map: Any = handle()
    ordinary: Any = handle()
    trace: Any = handle()

    def __repr__(self) -> str:
        ordinary = "" if self.ordinary_error is None else f" (ordinary Jacobian: {self.ordinary_error:.1e})"
        size = "loaded" if self.map is None else f"{size_text(self.map.n_bytes)} as a matrix"
        shape = list(self.tokens.shape if self.map is None else self.map.in_shape)
        return (
            f"DetachedJacobian({self.wrt} {shape} -> {self.output} {list(self.value.shape)}, "
            f"positions {self.positions}; reconstruction error {self.reconstruction_error:.1e}{ordinary}; {size})"
        )

    def _body(self) -> str:
        if "_contributions" in self.__dict__ or self.parts is not None:
            return dataframe_html(self.to_dataframe())
        say = "What each token gives: to_dataframe(), or tl_jets.views.detached_tokens; two backward passes a position, once."
        return f"<p>{text(say)}</p>"

    @property
    def labels(self) -> list[str]:
        """The input positions with the first prompt's tokens, aligned to the pos axis: `0 Once`, `1 ·upon`."""
        return [f"{pos} {visible(self.token_names[token])}" for pos, token in enumerate(self.tokens[0].tolist())]

    def apply(
        self, vectors: Float[Tensor, "*many batch pos d_model"], *, chunk_size: int = CHUNK_SIZE
    ) -> Float[Tensor, "*many batch out_pos width"]:
        """J u, see `LinearMap.apply`."""
        return self._map.apply(vectors, chunk_size=chunk_size)

    def apply_transpose(
        self, vectors: Float[Tensor, "*many batch out_pos width"], *, chunk_size: int = CHUNK_SIZE
    ) -> Float[Tensor, "*many batch pos d_model"]:
        """J' v, see `LinearMap.apply_transpose`."""
        return self._map.apply_transpose(vectors, chunk_size=chunk_size)

    def materialize(
        self, *, max_bytes: int | None = MAX_BYTES, chunk_size: int | None = None
    ) -> Float[Tensor, "batch out_pos width pos d_model"]:
        """J as a matrix, see `LinearMap.materialize`."""
        return self._map.materialize(max_bytes=max_bytes, chunk_size=chunk_size)

    @property
    def _map(self) -> ComposedMap:
        return of_model(self.map, "Products with the map")

    @cached_property
    def _contributions(self) -> Tensor:
        """J_t e_t before the readout [pos, batch, out_pos, rows]."""
        linear = self._map
        point = linear.point.detach()
        batch, pos, d_model = point.shape
        found = linear.value.new_empty(pos, *linear.value.shape)
        for start in range(0, pos, CHUNK_SIZE):
            index = torch.arange(start, min(start + CHUNK_SIZE, pos), device=point.device)
            alone = point.new_zeros(len(index), batch, pos, d_model)
            alone[index - start, :, index] = point[:, index].transpose(0, 1)
            found[index] = linear.apply_rows(alone)
        return found

    @property
    def contributions(self) -> Float[Tensor, "batch pos out_pos width"]:
        """J_t e_t; with `bias` they sum to the output. Costs two backward passes per position, once."""
        if self.parts is not None:
            return self.parts
        return self._map.read(self._contributions).transpose(0, 1).to(self.value)

    def save(self, file: str | Path) -> Path:
        """Save the numbers, contributions included, to one safetensors file, see `Result.save`."""
        return Result.save(replace(self, parts=self.contributions), file)

    def __getstate__(self) -> dict[str, Any]:
        """What `pickle` takes: the same numbers as a file."""
        return {**super().__getstate__(), "parts": self.contributions}

    def with_model(self, model: Any, text_or_tokens: Any, **options: Any) -> DetachedJacobian:
        """A loaded result made again by `detached_jacobian` with this model, input and further options.

        Raises:
            ValueError: The input or the model is another.
        """
        places = self.valid.cumsum(1)[:, self.positions] - 1
        if not bool((places == places[0]).all()):  # padded on the left: count from the end
            places = places - self.valid.sum(1, keepdim=True)
        options |= {"output": self.output, "wrt": self.wrt, "positions": places[0].tolist()}
        found = detached_jacobian(model, text_or_tokens, **options)
        check_same(self.tokens, self.value, found.trace, found.value)
        return found

    def top_tokens(self, k: int = 5) -> TopTokens:
        """The k tokens that every input position raises most [batch, pos, out_pos, k]: additive logits and ids.

        Streams are decoded through the frozen final norm and the unembedding, without biases.
        """
        scale = self.directions.scale(self.positions)[:, None]
        return self.directions.raised(self._contributions.transpose(0, 1) * scale, k)

    @property
    def directions(self) -> Directions:
        """Decodes directions of the output and of the input as tokens."""
        return Directions(of_model(self.trace, "Tokens of directions"), self.output)

    def svd(self, k: int, *, prompt: int = 0, pos: int | None = None, seed: int = 0) -> SingularVectors:
        """The k largest singular values and vectors of a prompt's matrix or an input position's, see `LinearMap.svd`."""
        return self._map.svd(k, prompt=prompt, pos=pos, seed=seed)

    def decode_left(self, vectors: SingularVectors, k: int = 5) -> TopTokens:
        """The k tokens that every left singular vector raises most [vector, out_pos, k]."""
        return self.directions.raised(vectors.left, k)

    def decode_right(self, vectors: SingularVectors, k: int = 5) -> TopTokens:
        """The k tokens whose embeddings have the largest cosine with every right singular vector [vector, pos, k].

        Raises:
            ValueError: The model has no embedding matrix (plain callables), or normalizes its embeddings.
        """
        return self.directions.nearest(vectors.right, k)

    def block_norms(self, *, pos: int = -1, out_pos: int = -1, prompt: int = 0, centered: bool = True) -> BlockNorms:
        """Norms of the rows and columns of the map from one position to another, by coordinate and by token.

        Args:
            pos: Input position in the padded row.
            out_pos: Output position in the padded row, one of `positions`.
            prompt: Index of the prompt.
            centered: Subtract the mean over the vocabulary from logits.

        Raises:
            ValueError: There is no such position.

        Source: Golden, arXiv 2505.24293, section 3.2.
        """
        length = self.tokens.shape[1]
        if not -length <= pos < length or out_pos % length not in self.positions or not 0 <= prompt < len(self.tokens):
            raise ValueError(
                f"pos must lie in {-length}..{length - 1}, out_pos among {self.positions}, prompt in "
                f"0..{len(self.tokens) - 1}; got {pos}, {out_pos}, {prompt}."
            )
        pos, out_pos = pos % length, out_pos % length
        index = self.positions.index(out_pos)
        return block_norms(
            self._map,
            self.directions,
            self.wrt,
            prompt=prompt,
            pos=pos,
            out_pos=out_pos,
            index=index,
            centered=centered,
        )

    def to_dataframe(self, tokenizer: Any = None, k: int = 3) -> pd.DataFrame:
        """One row per prompt, output position and input position, and one for the bias (its `pos` is None).

        Columns: batch, out_pos, pos, token, norm (length of the contribution), share (its projection on the output,
        over the squared length; shares sum to 1), top_tokens (what it raises most; None in a loaded result).
        """
        names = token_names(tokenizer, [self.tokens]) if tokenizer else self.token_names
        best = None if self.trace is None else self.directions.texts(self.top_tokens(k).indices, tokenizer)
        contributions, valid = self.contributions, self.valid.tolist()
        squared = self.value.square().sum(-1)
        lengths = contributions.norm(dim=-1).tolist()
        shares = ((contributions * self.value[:, None]).sum(-1) / squared[:, None]).tolist()
        bias_lengths = self.bias.norm(dim=-1).tolist()
        bias_shares = ((self.bias * self.value).sum(-1) / squared).tolist()
        rows = []
        for b, prompt in enumerate(self.tokens.tolist()):
            for o, out_pos in enumerate(self.positions):
                here = {"batch": b, "out_pos": out_pos}
                for t, token in enumerate(prompt):
                    if valid[b][t]:
                        numbers = {"norm": lengths[b][t][o], "share": shares[b][t][o]}
                        rows.append(
                            here | {"pos": t, "token": names[token]} | numbers | {"top_tokens": best and best[b][t][o]}
                        )
                numbers = {"norm": bias_lengths[b][o], "share": bias_shares[b][o]}
                rows.append(here | {"pos": None, "token": "bias"} | numbers | {"top_tokens": None})
        return pd.DataFrame(rows)


@one_look()
def detached_jacobian(
    model: Any,
    text_or_tokens: Any,
    *,
    output: LabelInput = FINAL_STREAM,
    positions: int | Sequence[int] | None = -1,
    wrt: LabelInput = "embed",
    ordinary: bool = True,
    keep_graph: bool | None = None,
    attention_mask: Tensor | None = None,
    cache: Any = None,
) -> DetachedJacobian:
    """A model as an exact linear map of its embeddings (or of a later stream), at one input.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork`.
        text_or_tokens: A prompt, a list of prompts, token ids [batch, pos], or a `Trace` of the network.
        output: `"final_post"`, `"logits"` (before a final softcap), `"ln_final"` (input of the unembedding), another
            stream (`"3_pre"`) or a write (`"3_attn_out"`, `"L3H2_out"`).
        positions: Output positions, counted among each prompt's real tokens; None for all. They must be the same
            in the padded rows of all prompts, as in those of the result.
        wrt: `"embed"`, `"pos_embed"`, or a stream: with `output="3_mlp_out"`, `wrt="3_mid"` the map of one MLP.
        ordinary: Also compute the model's ordinary Jacobian.
        keep_graph: Keep the graph (True), or one stage's at a time and pay a forward pass per product (False). None
            keeps graphs of at most 64 MiB or a hundredth of the matrix.
        attention_mask: Passed to the model (left padding needs it).
        cache: A ready `ActivationCache` of the same input.

    Returns:
        A `DetachedJacobian`. Hooks are part of it: they must still be active when `ordinary`, or a map without a kept
        graph, is applied.

    Raises:
        ValueError: Bad labels, positions or input.
        NotImplementedError: The model does not come out affine.

    Source: Golden, arXiv 2505.24293 (v3), sections 2.2, 3.1 and 3.3. Cost: four forward passes (trace, graph, bias,
    ordinary graph) and a product with each Jacobian.
    """
    network = ResidualNetwork.of(model)
    output, wrt = network.label(output), network.label(wrt)
    with torch.inference_mode(False):
        trace = trace_of(network, text_or_tokens, attention_mask, cache)
        places = Rows.of(trace, positions).columns("positions of a map")
        composed = ComposedJacobian(trace, wrt, [output], places)
        (linear, bias), *_ = composed.maps(keep_graph)
        with torch.no_grad():
            bias = trace.decoder.logits(bias) if output == LOGITS else bias
            return _measured(trace, output, wrt, places, linear, bias, composed.truth(output), ordinary)


def _measured(
    trace: Trace,
    output: str,
    wrt: str,
    positions: list[int],
    linear: ComposedMap,
    bias: Tensor,
    value: Tensor,
    ordinary: bool,
) -> DetachedJacobian:
    """The result for a map, after a check that the model is affine."""
    network, error = trace.network, _error(linear, bias, value)
    ordinary_map = linear.ordinary() if ordinary else None
    ordinary_error = None if ordinary_map is None else _error(ordinary_map, bias, value)
    if not error <= max(rounding(value.dtype), 10 * trace.recording.accuracy):
        raise NotImplementedError(not_affine(network.view.name, getattr(network.view, "model", None), error))
    return DetachedJacobian(
        output=output,
        wrt=wrt,
        positions=positions,
        tokens=trace.tokens,
        valid=trace.valid,
        value=value,
        bias=bias,
        reconstruction_error=error,
        ordinary_error=ordinary_error,
        token_names=token_names(network.tokenizer, [trace.tokens]),
        model=model_mark(network, trace.recording.hook_state),
        map=linear,
        ordinary=ordinary_map,
        trace=trace,
    )


def _error(linear: LinearMap, bias: Tensor, value: Tensor) -> float:
    found = linear.apply(linear.point.detach()) + bias
    return float((found - value).norm() / value.norm())
