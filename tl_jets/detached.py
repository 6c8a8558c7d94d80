r"""The detached map: a language model as an exact linear map of its input embeddings, at one input.

Freeze every norm scale, attention pattern and gate at the running forward pass (see `tl_jets.calculus.frozen` for which
those are). The network is then affine in the embeddings e_1 .. e_T and still has the same output:

.. math::
    \text{output} = \sum_t J_t e_t + \text{bias}.

The bias is the frozen map at zero: biases, learned positions and edits of streams by hooks, carried to the output. It is
computed by a second pass through the frozen network, never as output - J e, so that `reconstruction_error` measures
something. The ordinary Jacobian of the same model, which reconstructs nothing, stands beside it.

`detached(model)` is the mechanism alone: a context in which the model's own forward pass is frozen, for derivatives of
your own.

======================  ==========================================================
symbol                  name here
======================  ==========================================================
e, the input            `wrt`, its value `point` [batch, pos, d_model]
output                  `value` [batch, out_pos, width], before a final softcap or logit scale
J u, J' v               `apply`, `apply_transpose`
J_t e_t                 `contributions` [batch, pos, out_pos, width]
======================  ==========================================================

Source: Golden, *Equivalent Linear Mappings of Large Language Models* (arXiv 2505.24293). Cost: a trace, a forward pass
under autograd whose graph is kept, and a forward pass for the bias. J' v costs a backward pass, J u two; many vectors
run as one batch. J itself costs a backward pass for each of its d_model rows (for logits, too: the unembedding is a
product with the rest).

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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.calculus import frozen, full_precision
from tl_jets.lenses.selection import Rows, trace_of
from tl_jets.linear_map import CHUNK_SIZE, MAX_BYTES, LinearMap, SingularVectors, size_text
from tl_jets.network import CallableModel, ResidualNetwork
from tl_jets.readout import TopTokens, top_tokens
from tl_jets.stages import DECODER_STEP, FINAL_STREAM, Stage, some
from tl_jets.tokens import decode, token_names, visible
from tl_jets.trace import Trace

LOGITS = "logits"


# The context --------------------------------------------------------------------------------------------------------


@contextmanager
def detached(model: Any) -> Iterator[None]:
    """Freeze norm scales, attention patterns and gates of the model's own forward pass, for derivatives taken of it.

    Outputs are bit-equal with and without. Gradients, `torch.func` transforms and hooks see an affine function of the
    residual stream, up to the model's output, whose softcap is frozen as a factor, too. The user's hooks stay in force.
    Every PyTorch computation of the block is frozen, that of the hooks included; derivatives may be taken after it.

    On entry a forward pass on four tokens, without the user's hooks, checks that the model comes out affine: the
    derivative times the first stream, plus the frozen map at zero, must be the output.

    Args:
        model: A `TransformerBridge`, a `HookedTransformer`, or a `ResidualNetwork` of one; a network of plain callables is
            frozen without the check.

    Raises:
        NotImplementedError: The model does not come out affine (or is of a kind that is not supported).
        TypeError: The model is of no known kind.
        ValueError: The model is in training mode.

    Source:
        Golden, arXiv 2505.24293, section 3.
    """
    inner = model.view if isinstance(model, ResidualNetwork) else model
    if not isinstance(inner, CallableModel):
        _check_affine(getattr(inner, "model", inner) if isinstance(model, ResidualNetwork) else inner)
    with frozen():
        yield


def _check_affine(model: Any) -> None:
    """A random projection v of the output: v'output = (J'v)'x + v'bias, with x the first stream."""
    from tl_jets.adapters.reading import refuse_unsupported

    if not hasattr(model, "hook_dict") or not hasattr(model, "blocks"):
        raise TypeError(
            f"A model must be a TransformerLens TransformerBridge or HookedTransformer, a tl_jets.CallableModel or a "
            f"tl_jets.ResidualNetwork; got {type(model).__module__}.{type(model).__qualname__}."
        )
    refuse_unsupported(model)
    generator = torch.Generator().manual_seed(0)
    length = min(4, getattr(model.cfg, "n_ctx", None) or 4)
    tokens = torch.randint(model.cfg.d_vocab, (1, length), generator=generator).to(next(model.parameters()).device)
    tape: list[tuple[str, Any]] = []
    first: list[Tensor] = []

    def output(change: Callable[[Tensor], Tensor]) -> Tensor:
        with model.hooks([("blocks.0.hook_resid_pre", lambda stream, hook: change(stream))]):
            return model(tokens, return_type="logits")

    def leaf(stream: Tensor) -> Tensor:
        first.append(stream.detach().clone().requires_grad_())
        return first[-1]

    with torch.inference_mode(False), _without_hooks(model), full_precision():
        with torch.enable_grad(), frozen(record=tape):
            found = output(leaf)
        probe = torch.randn(found.shape, generator=generator, dtype=torch.float64).to(found)
        (gradient,) = torch.autograd.grad(found, first[-1], probe)
        # Last, so that what the model's components keep of it holds no graph.
        with torch.no_grad(), frozen(replay=tape):
            bias = output(torch.zeros_like)
    parts = [gradient * first[-1].detach(), probe * bias, -probe * found.detach()]
    size = sum(float(part.double().square().sum()) for part in parts) ** 0.5
    error = abs(sum(float(part.double().sum()) for part in parts)) / size
    if not error <= _accuracy(found.dtype):
        raise NotImplementedError(_not_affine(model, error))


def _accuracy(dtype: torch.dtype) -> float:
    """Relative error that rounding explains."""
    return 1e-10 if dtype is torch.float64 else 1e-4


def _not_affine(model: Any, error: float) -> str:
    cfg = getattr(model, "cfg", None)
    names = [getattr(cfg, name, None) for name in ("model_name", "original_architecture", "architecture")]
    called = ", ".join(str(name) for name in names if name) or getattr(model, "name", "a custom model")
    return (
        f"A model must come out affine with its norm scales, attention patterns and gates frozen; {type(model).__name__} "
        f"({called}) is off by {error:.1e} (relative), so something in it multiplies what depends on the input and is none "
        f"of the three, or differentiates itself (torch.autograd.Function). It cannot be detached; please report its name."
    )


@contextmanager
def _without_hooks(model: Any) -> Iterator[None]:
    """The model without the user's hooks, which may expect their own input or count their calls."""
    points = list({id(point): point for point in model.hook_dict.values()}.values())
    kept = [(point, name, getattr(point, name)) for point in points for name in ("_forward_hooks", "_backward_hooks")]
    try:
        for point, name, hooks in kept:
            setattr(point, name, type(hooks)())
        yield
    finally:
        for point, name, hooks in kept:
            setattr(point, name, hooks)


# The map of a model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class DetachedJacobian:
    """A model as an exact linear map at one input: value = sum_t J_t e_t + bias.

    Attributes:
        output: What was mapped to: `final_post`, `logits`, or another label.
        wrt: What it is a map of: `embed`, or another source or stream.
        positions: Output positions in the prompt, aligned to the out_pos axis.
        tokens: The prompts [batch, pos].
        value: The model's own output there, before a final softcap or logit scale [batch, out_pos, width].
        bias: The frozen map at zero, by a pass of its own [batch, out_pos, width].
        map: J: `apply`, `apply_transpose`, `materialize`.
        ordinary: The model's ordinary Jacobian, with the same methods; None if it was left out.
        reconstruction_error: |J e + bias - value| / |value|.
        ordinary_error: The same for the ordinary Jacobian; None if it was left out.
        trace: The input that it was taken at.
    """

    output: str
    wrt: str
    positions: list[int]
    tokens: Int[Tensor, "batch pos"]
    value: Float[Tensor, "batch out_pos width"]
    bias: Float[Tensor, "batch out_pos width"]
    map: LinearMap
    ordinary: LinearMap | None
    reconstruction_error: float
    ordinary_error: float | None
    trace: Trace = field(repr=False)

    def __repr__(self) -> str:
        ordinary = "" if self.ordinary_error is None else f" (ordinary Jacobian: {self.ordinary_error:.1e})"
        return (
            f"DetachedJacobian({self.wrt} {list(self.map.in_shape)} -> {self.output} {list(self.map.out_shape)}, "
            f"positions {self.positions}; reconstruction error {self.reconstruction_error:.1e}{ordinary}; "
            f"{size_text(self.map.n_bytes)} as a matrix)"
        )

    @property
    def labels(self) -> list[str]:
        """The input positions with the first prompt's tokens, aligned to the pos axis: `0 Once`, `1 ·upon`."""
        names = token_names(self.trace.network.tokenizer, [self.tokens])
        return [f"{pos} {visible(names[token])}" for pos, token in enumerate(self.tokens[0].tolist())]

    def apply(
        self, vectors: Float[Tensor, "*many batch pos d_model"], *, chunk_size: int = CHUNK_SIZE
    ) -> Float[Tensor, "*many batch out_pos width"]:
        """J u, `LinearMap.apply`."""
        return self.map.apply(vectors, chunk_size=chunk_size)

    def apply_transpose(
        self, vectors: Float[Tensor, "*many batch out_pos width"], *, chunk_size: int = CHUNK_SIZE
    ) -> Float[Tensor, "*many batch pos d_model"]:
        """J' v, `LinearMap.apply_transpose`."""
        return self.map.apply_transpose(vectors, chunk_size=chunk_size)

    def materialize(
        self, *, max_bytes: int | None = MAX_BYTES, chunk_size: int = CHUNK_SIZE
    ) -> Float[Tensor, "batch out_pos width pos d_model"]:
        """J as a matrix, `LinearMap.materialize`."""
        return self.map.materialize(max_bytes=max_bytes, chunk_size=chunk_size)

    @cached_property
    def _contributions(self) -> Tensor:
        """J_t e_t before the readout [pos, batch, out_pos, rows]."""
        point = self.map.point.detach()
        batch, pos, d_model = point.shape
        found = self.map.value.new_empty(pos, *self.map.value.shape)
        for start in range(0, pos, CHUNK_SIZE):
            index = torch.arange(start, min(start + CHUNK_SIZE, pos), device=point.device)
            alone = point.new_zeros(len(index), batch, pos, d_model)
            alone[index - start, :, index] = point[:, index].transpose(0, 1)
            found[index] = self.map._apply(alone, CHUNK_SIZE)
        return found

    @property
    def contributions(self) -> Float[Tensor, "batch pos out_pos width"]:
        """J_t e_t: what every input position gives to the output; with `bias` they sum to it.

        Computed on first use, at two backward passes a position (in chunks).
        """
        return self.map._read(self._contributions).transpose(0, 1)

    def top_tokens(self, k: int = 5) -> TopTokens:
        """The k tokens that every input position raises most [batch, pos, out_pos, k]: additive logits and ids.

        A contribution to a stream is read through the frozen final norm and the unembedding, without their biases: with
        the bias they sum to the logits if the stream is `final_post`.
        """
        decoder = self.trace.network.decoder
        rows = self._contributions.transpose(0, 1)
        if self.output not in (LOGITS, DECODER_STEP):
            rows = decoder.norm.scale(decoder.norm.center(rows)) * self._final_scale
        return top_tokens(decoder, rows, bias_weight=0.0, k=k)

    def svd(self, k: int, *, prompt: int = 0, seed: int = 0) -> SingularVectors:
        """The k largest singular values of one prompt's matrix and their vectors, `LinearMap.svd`."""
        return self.map.svd(k, prompt=prompt, seed=seed)

    def decode_left(self, vectors: SingularVectors, k: int = 5) -> TopTokens:
        """The k tokens that every left singular vector raises most [vector, out_pos, k].

        Directions of a stream go through the linear part of the final norm (centering, gain) and the unembedding.
        """
        decoder = self.trace.network.decoder
        if self.output == LOGITS:
            best = vectors.left.topk(k)
            return TopTokens(best.values, best.indices)
        rows = vectors.left
        if self.output != DECODER_STEP:
            rows = decoder.norm.scale(decoder.norm.center(rows))
        return top_tokens(decoder, rows, bias_weight=0.0, k=k)

    def decode_right(self, vectors: SingularVectors, k: int = 5) -> TopTokens:
        """The k tokens whose embeddings have the largest product with every right singular vector [vector, pos, k].

        Raises:
            ValueError: The model has no embedding matrix (plain callables).
        """
        W_E = getattr(getattr(self.trace.network.view, "model", None), "W_E", None)
        if W_E is None:
            raise ValueError("Right vectors are read through W_E; a network of plain callables has none.")
        best = (vectors.right @ W_E.detach().to(vectors.right).T).topk(k)
        return TopTokens(best.values, best.indices)

    @property
    def _final_scale(self) -> Tensor:
        """The final norm's scale at the output positions [batch, 1, out_pos, 1]."""
        norm, final = self.trace.network.decoder.norm, self.trace[FINAL_STREAM][:, None, self.positions]
        if norm.kind == "none":
            return torch.ones_like(final[..., :1])
        return torch.rsqrt(norm.center(final).pow(2).mean(-1, keepdim=True) + norm.eps)

    def to_dataframe(self, tokenizer: Any = None, k: int = 3) -> pd.DataFrame:
        """One row a prompt, output position and input position, and one for the bias (its `pos` is None).

        Columns: batch, out_pos, pos, token, norm (length of the contribution), share (of the output: its projection on it
        over the squared length; the shares sum to 1), top_tokens (what it raises most, decoded; ids without a tokenizer).
        """
        tokenizer = tokenizer or self.trace.network.tokenizer
        names = token_names(tokenizer, [self.tokens])
        best = self.top_tokens(k).indices
        best = best.tolist() if tokenizer is None else decode(tokenizer, best)
        contributions, valid = self.contributions, self.trace.valid.tolist()
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
                        rows.append(here | {"pos": t, "token": names[token]} | numbers | {"top_tokens": best[b][t][o]})
                numbers = {"norm": bias_lengths[b][o], "share": bias_shares[b][o]}
                rows.append(here | {"pos": None, "token": "bias"} | numbers | {"top_tokens": None})
        return pd.DataFrame(rows)


def detached_jacobian(
    model: Any,
    text_or_tokens: Any,
    *,
    output: str = FINAL_STREAM,
    positions: int | Sequence[int] | None = -1,
    wrt: str = "embed",
    ordinary: bool = True,
    attention_mask: Tensor | None = None,
    cache: Any = None,
) -> DetachedJacobian:
    """A model as an exact linear map of its embeddings (or of a later stream), at one input.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork`.
        text_or_tokens: A prompt, a list of prompts, token ids [batch, pos], or a `Trace` of the network.
        output: `"final_post"`, `"logits"` (additive: before a final softcap or logit scale), `"ln_final"` (what the
            unembedding reads), another stream (`"3_pre"`) or a write (`"3_attn_out"`, `"L3H2_out"`).
        positions: Output positions; None for all. Negative ones count from the end of the padded row. All must be real
            tokens in every prompt.
        wrt: `"embed"`, `"pos_embed"`, or a stream: with `output="3_mlp_out"`, `wrt="3_mid"` the map of one MLP.
        ordinary: Also keep the model's ordinary Jacobian, and measure it: a second graph.
        attention_mask: Passed to the model (left padding needs it).
        cache: A ready `ActivationCache` of the same input.

    Returns:
        A `DetachedJacobian`. It holds the graph of the forward pass: delete it to free the memory. Hooks that were active
        are part of it; they need not be when it is applied.

    Raises:
        ValueError: Bad labels, positions or input; the message says what must hold.
        NotImplementedError: The model does not come out affine.

    Source:
        Golden, arXiv 2505.24293, sections 3 and 4.

    Cost:
        Four forward passes (trace, graph, bias, ordinary graph) and one product with each Jacobian.
    """
    network = model if isinstance(model, ResidualNetwork) else ResidualNetwork(model)
    with torch.inference_mode(False):
        trace = trace_of(network, text_or_tokens, attention_mask, cache)
        rows = Rows.of(trace, positions)
        if not bool(rows.keep.all()):
            raise ValueError(
                f"positions must be real tokens in every prompt; {rows.positions} are padding in prompts "
                f"{(~rows.keep).any(1).nonzero().flatten().tolist()}. Pass these one at a time, or padded on the left "
                f"with an attention_mask."
            )
        chain = _Chain.between(trace, wrt, output, rows.positions)
        readout = network.decoder.W_U.to(chain.point) if output == LOGITS else None
        tape: list[tuple[str, Any]] = []
        with torch.enable_grad():
            point = chain.point.detach().clone().requires_grad_()
            with frozen(record=tape):
                frozen_map = LinearMap(point, chain(point), readout)
            ordinary_map = LinearMap(point, chain(point), readout) if ordinary else None
        with torch.no_grad():
            with frozen(replay=tape):
                bias = chain(torch.zeros_like(point))
            bias = bias if readout is None else network.decoder.logits(bias)
            value = chain.truth()
            error = _error(frozen_map, bias, value)
            ordinary_error = None if ordinary_map is None else _error(ordinary_map, bias, value)
    if not error <= max(_accuracy(value.dtype), 10 * trace.recording.accuracy):
        raise NotImplementedError(_not_affine(getattr(network.view, "model", network.view), error))
    return DetachedJacobian(
        output=output,
        wrt=wrt,
        positions=rows.positions,
        tokens=trace.tokens,
        value=value,
        bias=bias,
        map=frozen_map,
        ordinary=ordinary_map,
        reconstruction_error=error,
        ordinary_error=ordinary_error,
        trace=trace,
    )


def _error(linear: LinearMap, bias: Tensor, value: Tensor) -> float:
    found = linear.apply(linear.point.detach()) + bias
    return float((found - value).norm() / value.norm())


@dataclass(frozen=True, eq=False)
class _Chain:
    """The part of a network from one label to another, as a function of the first.

    Attributes:
        trace: The input.
        point: The value of the first label.
        offset: What the first stream holds beside it (other sources, edits).
        stages: The stages on the way, with their gammas.
        output: The last label.
        positions: Output positions.
    """

    trace: Trace
    point: Tensor
    offset: Tensor | None
    stages: list[tuple[Stage, Callable[[Tensor], Tensor]]]
    output: str
    positions: list[int]

    @classmethod
    def between(cls, trace: Trace, wrt: str, output: str, positions: list[int]) -> _Chain:
        """The chain from `wrt` to `output`, at the first granularity that has both."""
        own = trace.network
        for network in (own, own.at("sublayer"), own.at("head")):
            streams = network.streams
            start = 0 if wrt in network.sources else streams.index(wrt) if wrt in streams else None
            stop = _place(network, output)
            if start is not None and stop is not None:
                break
        else:
            ends = (LOGITS, DECODER_STEP)
            raise ValueError(
                f"wrt must be a source or stream and output a stream, a write, or one of {ends}; got wrt={wrt!r}, "
                f"output={output!r}. Labels are {some(own.at('head').labels, 24)}."
            )
        stages = network.stages[start:stop]
        if stop < start or (not stages and output in (step.write for stage in network.stages for step in stage.steps)):
            raise ValueError(f"output must come after wrt in the network; {output!r} does not follow {wrt!r}.")
        trace = Trace(network, trace.recording)
        functions = [(stage, trace.stage_function(stage)) for stage in stages]
        for stage, gamma in functions:
            # What a view computes once per input (heads at zero) must not be computed under `frozen`.
            if any(step.kind == "head" for step in stage.steps):
                with torch.no_grad():
                    gamma(trace[stage.stream])
        point = trace[wrt]
        offset = trace[streams[0]] - point if wrt in network.sources else None
        return cls(trace, point, offset, functions, output, positions)

    def __call__(self, point: Tensor) -> Tensor:
        """[batch, pos, d_model] -> [batch, out_pos, rows]."""
        trace, network = self.trace, self.trace.network
        stream = point if self.offset is None else point + self.offset
        for stage, gamma in self.stages:
            writes = gamma(stream)
            for step, write in zip(stage.steps, writes, strict=True):
                if step.write == self.output:
                    return write[:, self.positions]
            edits = trace.edits(network.next_stream(stage)).values()
            stream = stream + writes.sum(0) + sum(edits)
        stream = stream[:, self.positions]
        return network.decoder.norm(stream) if self.output in (LOGITS, DECODER_STEP) else stream

    def truth(self) -> Tensor:
        """The model's own output [batch, out_pos, width]."""
        trace, decoder = self.trace, self.trace.network.decoder
        if self.output not in (LOGITS, DECODER_STEP):
            return trace[self.output][:, self.positions]
        if self.output == LOGITS and decoder.transform is None and trace.logits is not None:
            return trace.logits[:, self.positions].to(self.point.dtype)
        normed = decoder.norm(trace[FINAL_STREAM][:, self.positions])
        return normed if self.output == DECODER_STEP else decoder.logits(normed)


def _place(network: ResidualNetwork, output: str) -> int | None:
    """How many stages lead to a label; None if the network has no such label."""
    if output in (LOGITS, DECODER_STEP):
        return len(network.stages)
    if output in network.streams:
        return network.streams.index(output)
    places = [i + 1 for i, stage in enumerate(network.stages) if output in (step.write for step in stage.steps)]
    return places[0] if places else None
