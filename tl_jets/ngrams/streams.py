r"""Vocabulary streams: the residual stream of every token of the vocabulary along a path that does not mix positions.

A path is a function of one token, evaluated on the whole vocabulary without a corpus and without positional embeddings
(Chen et al., footnote 4):

=====================  =============================================================  ====================
path                   stream of token z, decoded by the model's own decoder          label
=====================  =============================================================  ====================
`"direct"`             W_E[z]                                                         `direct`
`"effective"`          x := x + gamma_l_mlp(x) from x = W_E[z], of the first MLP      `effective`
`"mlps"`               x := x + gamma_l_mlp(x) from x = W_E[z], over all MLPs         `mlps`
`["3_mlp"]`            gamma_3_mlp(W_E[z])                                            `3_mlp`
`["1_mlp", "3_mlp"]`   gamma_3_mlp(gamma_1_mlp(W_E[z]))                               `1_mlp > 3_mlp`
`["L0H1", "L2H3"]`     OV_L2H3(OV_L0H1(W_E[z])), a virtual attention head             `L0H1 > L2H3`
`["mlps", "L2H3"]`     OV_L2H3(x), x over the MLPs before the head                    `mlps > L2H3`
=====================  =============================================================  ====================

W_E[z] is the model's `embed` source, with any scale or norm before the first block. A path begins with `direct` (not written),
`effective` or `mlps` (of the MLPs before its first step), then nests MLPs and heads. The MLPs are the model's own modules, replayed
with their hooks (`tl_jets.adapters`). A head reads the stream before it alone, through its layer's own norm and values, as if its
attention to that token were 1; its write has no constant (`tl_jets.adapters.parts`). Every norm is at its own scale for the
stream that the path brings; what other components write there is left out.
Cost: an embedding and the path's MLPs and attention layers per token, and forward passes on one-token prompts for the self-check.
Source of virtual attention heads: Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits*; of effective
embeddings: Gould et al. 2023, arXiv 2312.09230.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.adapters.callables import CallableModel
from tl_jets.adapters.parts import check_heads, z_name
from tl_jets.core.logit_reader import slices
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.path import ARROW
from tl_jets.core.protocol import Stage, relative_error, some
from tl_jets.core.trace import Trace
from tl_jets.ngrams.float32 import full_float32

DIRECT, EFFECTIVE, MLPS = "direct", "effective", "mlps"
# Rows per call of the MLPs, which are wide, and prompts of the self-check.
STREAM_ROWS, PROMPTS = 512, 2
# Prompts of the recorded pass where heads are replayed, whose batch they share, and logits of that pass held at once.
HEAD_ROWS, RECORDED_LOGITS = (16, 512), 2**24
HEAD = re.compile(r"L(\d+)H(\d+)")

PathInput = str | Sequence[str]
TokenIds = Sequence[int | str] | Int[Tensor, " token"]
Tokenize = Callable[[str], Sequence[int]]


class TokenPath(NamedTuple):
    """A path: MLPs whose writes are added to the embedding, then steps nested in each other."""

    label: str
    added: tuple[str, ...]
    nested: tuple[str, ...]


class VocabularyStreams:
    """The streams of single tokens along one or several paths of a network.

    Args:
        model: A model or a `ResidualNetwork`.
        paths: Paths as in the table above: lists of steps, or labels.
        prompts: Number of one-token prompts in the forward pass of the self-check; None for as many as the paths need.

    Attributes:
        network: The network at sublayer granularity.
        paths: The paths by label.
        n_tokens: Number of tokens that the model embeds.
        state: State of the model's weights and hooks; None for plain functions.
        trace: A run on `prompts` prompts of one token, for the arguments of replays.
        device: Device of the streams.
        dtype: Dtype of `states`: float32, or float64 for float64 models.

    Raises:
        ValueError: A path has a step that mixes positions, does not exist or is out of order; a hook edits a stream; or
            the network's self-check fails.
        NotImplementedError: A path passes a head of a layer whose attention is not the sum of its heads.
    """

    @full_float32()
    def __init__(self, model: Any, paths: Sequence[PathInput], *, prompts: int | None = None):
        self.network = ResidualNetwork(model).at("sublayer")
        found = [_read_path(self.network, path) for path in paths]
        self.paths = {path.label: path for path in found}
        self._zero_values: dict[int, Tensor] = {}
        if prompts is None:
            has_heads = any(HEAD.fullmatch(step) for path in found for step in path.nested)
            prompts = head_rows(self.network) if has_heads else PROMPTS
        self.n_tokens = _count_tokens(self.network)
        view: Any = self.network.view
        # A model whose weights and hooks are as before is neither run nor checked again.
        self.state = view.hook_state() if hasattr(view, "memo") else None
        known = None if self.state is None else view.memo.get("vocabulary")
        if known is None or known[0] != self.state or len(known[1].tokens) != prompts:
            known = self.state, self._run(prompts), set()
        self.trace, checked = known[1:]
        embed = self.trace["embed"]
        self.device, self.dtype = embed.device, self.network.decoder.compute_dtype(embed)
        self._check(self.trace.tokens[:2, 0].cpu(), checked)
        if self.state is not None and prompts == PROMPTS:
            view.memo["vocabulary"] = known

    def _run(self, prompts: int) -> Trace:
        """A run on prompts of one token: the first and the last."""
        first = torch.zeros(prompts, 1, dtype=torch.long, device="cpu")
        first[1:] = self.n_tokens - 1
        # Every id is a token here, those of padding too.
        mask = None if isinstance(self.network.view, CallableModel) else torch.ones_like(first)
        return self.network.trace(first, attention_mask=mask)

    @torch.no_grad()
    @full_float32()
    def embed(self, tokens: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
        """The `embed` source of single tokens, as in a trace."""
        view: Any = self.network.view
        if isinstance(view, CallableModel):
            return view.embeds["embed"](tokens.to(self.trace.tokens.device).unsqueeze(1))[:, 0]
        return view.embed(tokens)

    @torch.no_grad()
    @full_float32()
    def stream(
        self, embed: Float[Tensor, "token d_model"], label: str, *, before: str | None = None
    ) -> Float[Tensor, "token d_model"]:
        """The streams at the end of a path (or those that its step `before` reads) of tokens with these embeddings."""
        stream, path = embed, self.paths[label]
        for step in path.added:
            stream = stream + self._write(step, stream)
        for step in path.nested:
            if step == before:
                break
            stream = self._write(step, stream)
        return stream

    def states(self, embed: Float[Tensor, "token d_model"], label: str) -> Float[Tensor, "token d_model"]:
        """Inputs of the unembedding (`stream` after the final norm), in float32, or float64 for float64 models."""
        decoder, parts = self.network.decoder, slices(len(embed), STREAM_ROWS)
        state = torch.cat([decoder.norm(self.stream(embed[part], label)) for part in parts])
        return state.to(decoder.compute_dtype(state))

    def _write(self, step: str, stream: Tensor) -> Tensor:
        view: Any = self.network.view
        head = HEAD.fullmatch(step)
        if head is None:
            return view.writes(self.trace.recording, self.alone(step), stream.unsqueeze(1))[0, :, 0]
        layer, index = map(int, head.groups())
        W_O = view.blocks[layer].attn.W_O[index].detach().to(stream)
        write = self.values(layer, stream)[:, index] @ W_O
        return view.shares(layer, "attn", write, write)

    @torch.no_grad()
    @full_float32()
    def values(self, layer: int, stream: Float[Tensor, "token d_model"]) -> Float[Tensor, "token head d_head"]:
        """Values of a layer's heads (minus those of the zero stream) of any streams, each alone at position 0."""
        if layer not in self._zero_values:
            self._zero_values[layer] = self._values(layer, torch.zeros_like(stream[:1]))
        rows = len(self.trace.tokens)
        return torch.cat([self._values(layer, part) for part in stream.split(rows)]) - self._zero_values[layer]

    def _values(self, layer: int, stream: Tensor) -> Tensor:
        view: Any = self.network.view
        # The batch of a replay is that of the recorded pass.
        padded = stream.new_zeros(len(self.trace.tokens), 1, stream.shape[1])
        padded[: len(stream), 0] = stream
        stage = self.alone(f"{layer}_attn")
        return view.inner(self.trace.recording, z_name(layer), stage, padded)[: len(stream), 0].to(stream)

    def alone(self, label: str) -> Stage:
        """The stage of one step, without other steps that read the same stream (attention, in a parallel block)."""
        stage = self.network.stage(label)
        return Stage(stage.stream, tuple(step for step in stage.steps if step.label == label))

    def _check(self, ids: Int[Tensor, " token"], checked: set[str]) -> None:
        """Check that no hook edits a stream, and that all steps are functions of one token; adds to those `checked`."""
        if any(self.trace.recording.edits.values()):
            raise ValueError(
                "A path's streams are those of the model without edits; a hook edits "
                f"{some(self.trace.recording.edits)}. Take the hook on the stream away; hooks inside steps are kept."
            )
        steps = {step for path in self.paths.values() for step in (*path.added, *path.nested)} - checked
        if "embed" in checked and not steps:
            return
        found = self.embed(torch.cat([ids, torch.arange(min(self.n_tokens, 5), device="cpu")]))
        self._agree("embed", found[:2], self.trace["embed"][:2, 0])
        for step in steps:
            head = HEAD.fullmatch(step)
            # Compares the replay with what the model wrote.
            self.trace.stage_function(self.network.stage(f"{head[1]}_attn" if head else step))
            if head:
                self._check_head(int(head[1]))
            self._agree(step, self._write(step, found)[:2], self._write(step, found[:2]))
        checked |= steps | {"embed"}

    def _check_head(self, layer: int) -> None:
        """Check that the layer's attention is its heads, and that a token alone gets all of it."""
        view: Any = self.network.view
        with torch.no_grad(), view.replaying(layer):
            check_heads(view, self.trace.recording, view.calls_of(self.trace.recording), layer)
        hook, stage = f"blocks.{layer}.attn.hook_pattern", self.alone(f"{layer}_attn")
        pattern = view.inner(self.trace.recording, hook, stage, self.trace["embed"]) if hook in view.hook_dict else None
        if pattern is not None and relative_error(pattern.double(), torch.ones_like(pattern.double())) > 1e-3:
            raise NotImplementedError(
                f"Attention of a token to itself alone must be 1 where a path passes a head; in layer {layer} of {view.name} it is "
                "not (attention sinks, or a hook that edits it). Leave its heads out of the path."
            )

    def _agree(self, name: str, found: Tensor, wanted: Tensor) -> None:
        error = relative_error(found, wanted)
        if not error <= self.trace.recording.accuracy:
            raise ValueError(
                f"{name} of a token must not depend on the tokens evaluated beside it; it differs by {error:.1e} "
                "(relative). A hook or the architecture mixes positions or prompts, so that it has no bi-grams."
            )


def mlp_steps(network: ResidualNetwork) -> list[str]:
    """Labels of the MLPs, the steps that do not mix positions, in order."""
    steps = network.at("sublayer").steps
    return [x.label for x in steps if x.kind == "mlp" or (x.kind == "callable" and x.label.endswith("_mlp"))]


def head_rows(network: ResidualNetwork) -> int:
    """Number of prompts recorded for replays of attention."""
    least, most = HEAD_ROWS
    return max(least, min(most, RECORDED_LOGITS // network.decoder.d_vocab))


def head_steps(network: ResidualNetwork) -> list[str]:
    """Labels of the attention heads, in order; none if the model consists of plain functions."""
    view: Any = network.view
    attn = [step.layer for step in network.at("sublayer").steps if step.kind == "attn"]
    return [f"L{layer}H{head}" for layer in attn for head in range(int(view.cfg.n_heads))]


def path_label(path: PathInput) -> str:
    """The label of a path; the steps may not be those of a model."""
    given = [step.strip() for step in path.split(ARROW.strip())] if isinstance(path, str) else [*path]
    return ARROW.join(given[given[:1] == [DIRECT] :]) or DIRECT


def _read_path(network: ResidualNetwork, path: PathInput) -> TokenPath:
    """A path; ValueError unless it is one."""
    label = path_label(path)
    given = label.split(ARROW)
    start = given.pop(0) if given[0] in (DIRECT, EFFECTIVE, MLPS) else DIRECT
    mlps, heads = mlp_steps(network), head_steps(network)
    for step in given:
        if step not in mlps + heads and ("attn" in step or step.endswith("_block")):
            raise ValueError(
                f"A path must be a function of one token; {step!r} holds attention, which reads other tokens, too. Use MLPs "
                f"({some(mlps)}), heads ({some(heads)}) as if they attended to that token alone, or skip-trigrams."
            )
        if step not in mlps + heads:
            raise ValueError(
                f'A path must be "{DIRECT}", "{MLPS}" or steps such as "1_mlp{ARROW}3_mlp", each one of {some(mlps)}'
                f"{f', or heads such as {heads[0]!r}' if heads else ''}; got the step {step!r} in {path!r}."
            )
    order = [_place(network, step) for step in given]
    if order != sorted(set(order)):
        raise ValueError(f"A path must pass its steps in the order of the network, each once; got {given}.")
    if start == DIRECT:
        return TokenPath(label, (), tuple(given))
    before = [step for step in mlps if not order or _place(network, step) < order[0]]
    _check_added(network, start, mlps, order)
    return TokenPath(label, tuple(before if start == MLPS else before[:1]), tuple(given))


def _place(network: ResidualNetwork, step: str) -> int:
    """The number of the stage that a step is in."""
    head = HEAD.fullmatch(step)
    return network.stages.index(network.stage(f"{head[1]}_attn" if head else step))


def _check_added(network: ResidualNetwork, start: str, mlps: list[str], order: list[int]) -> None:
    """Raise unless every MLP whose write a start adds is there."""
    places = {step.label: place for place, stage in enumerate(network.stages) for step in stage.steps}
    whole = [step.label for step in network.steps if step.kind == "block"]
    whole = [label for label in whole if not order or places[label] < order[0]]
    if whole:
        raise NotImplementedError(
            f'"{start}" takes every MLP of the model; {some(whole)} of {network.view.name} are one write each, and their '
            f'MLPs not at all. Use "{DIRECT}", or name MLPs of other blocks.'
        )
    if not mlps and not order:
        raise ValueError(f'"{start}" needs a model with MLPs; this one has none. Its only bi-gram path is "{DIRECT}".')


def _count_tokens(network: ResidualNetwork) -> int:
    view: Any = network.view
    if not isinstance(view, CallableModel):
        return int(view.cfg.d_vocab)
    if "embed" not in view.embeds:
        raise ValueError(f'A network of callables must name its token embedding "embed"; it has {list(view.embeds)}.')
    return int(getattr(view.embeds["embed"], "num_embeddings", network.decoder.d_vocab))


def read_tokens(
    name: str, ids: TokenIds | None, size: int, device: torch.device | str = "cpu", tokenizer: Any = None
) -> Int[Tensor, " token"]:
    """Sorted, distinct token ids, None for all; ValueError, with `name`, unless they are ids below `size`, or their texts."""
    if ids is None:
        return torch.arange(size, device=device)
    if isinstance(ids, str):
        raise ValueError(
            f"{name} must be a list of ids or of texts of one token; got the text {ids!r}. Pass [{ids!r}]."
        )
    if not isinstance(ids, Tensor):
        tokenize = tokenizing(tokenizer)
        ids = [one_token(name, token, tokenize) if isinstance(token, str) else token for token in ids]
    found = torch.as_tensor(ids, device=device)
    if found.ndim != 1 or not len(found) or found.is_floating_point() or found.dtype is torch.bool:
        raise ValueError(f"{name} must be a list of token ids, at least one; got {ids!r}. Pass None for all.")
    if int(found.min()) < 0 or int(found.max()) >= size:
        raise ValueError(f"{name} must be ids in 0..{size - 1}; got {int(found.min())}..{int(found.max())}.")
    return found.long().unique()


def tokenizing(tokenizer: Any) -> Tokenize:
    """A tokenizer as a function from a text to its ids without special tokens; ValueError for a text without a tokenizer."""

    def tokenize(text: str) -> Sequence[int]:
        if tokenizer is None:
            raise ValueError(f"A text needs a tokenizer; the model has none. Give the ids of {text!r}.")
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return tokenize


def one_token(name: str, text: str, tokenize: Tokenize) -> int:
    """The id of a text of one token; ValueError, with `name`, for others."""
    ids = list(tokenize(text))
    if len(ids) != 1:
        raise ValueError(
            f"A text in {name} must be one token; {text!r} is {len(ids)}: {ids[:6]}. Mind the leading space, or give ids."
        )
    return int(ids[0])


def described(ids: Tensor | None, given: Any) -> str | dict[str, Any]:
    """A short description of a subset of tokens: their number and hash, or "all"."""
    if given is None or ids is None:
        return "all"
    return {"count": len(ids), "sha256": hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()}
