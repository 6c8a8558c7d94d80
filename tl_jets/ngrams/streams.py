r"""Vocabulary streams: the residual stream of every token of the vocabulary along a path that does not mix positions.

A bi-gram path is a function of one token, evaluated on the whole vocabulary without a corpus and without positional
embeddings (Chen et al., footnote 4):

=====================  =============================================================  ====================
path                   stream of token z, decoded by the model's own decoder          label
=====================  =============================================================  ====================
`"direct"`             W_E[z]                                                         `direct`
`["3_mlp"]`            gamma_3_mlp(W_E[z])                                            `3_mlp`
`["1_mlp", "3_mlp"]`   gamma_3_mlp(gamma_1_mlp(W_E[z]))                               `1_mlp > 3_mlp`
`"mlps"`               x := x + gamma_l_mlp(x) from x = W_E[z], over all MLPs         `mlps`
=====================  =============================================================  ====================

W_E[z] is the model's `embed` source, with any scale or norm before the first block. The MLPs are the model's own
modules, replayed with their hooks (`tl_jets.adapters`); attention is not evaluated.
Cost: an embedding and the path's MLPs per token, and forward passes on one-token prompts for the self-check.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.adapters.callables import CallableModel
from tl_jets.core.logit_reader import slices
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.path import ARROW
from tl_jets.core.protocol import Stage, relative_error, some
from tl_jets.core.trace import Trace
from tl_jets.ngrams.float32 import full_float32

DIRECT, MLPS = "direct", "mlps"
# Rows per call of the MLPs, which are wide, and prompts of the self-check.
STREAM_ROWS, PROMPTS = 512, 2

PathInput = str | Sequence[str]
TokenIds = Sequence[int | str] | Int[Tensor, " token"]


class VocabularyStreams:
    """The streams of single tokens along one or several paths of a network.

    Args:
        model: A model or a `ResidualNetwork`.
        paths: Paths as in the table above: lists of steps, or labels.
        prompts: Number of one-token prompts in the forward pass of the self-check.

    Attributes:
        network: The network at sublayer granularity.
        paths: Steps of each path by label.
        n_tokens: Number of tokens that the model embeds.
        state: State of the model's weights and hooks; None for plain functions.
        trace: A run on `prompts` prompts of one token, for the arguments of replays.
        device: Device of the streams.
        dtype: Dtype of `states`: float32, or float64 for float64 models.

    Raises:
        ValueError: A path has a step that mixes positions, does not exist or is out of order; a hook edits a stream; or
            the network's self-check fails.
    """

    @full_float32()
    def __init__(self, model: Any, paths: Sequence[PathInput], *, prompts: int = PROMPTS):
        self.network = ResidualNetwork(model).at("sublayer")
        self.paths = dict(_read_path(self.network, path) for path in paths)
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
    def stream(self, embed: Float[Tensor, "token d_model"], label: str) -> Float[Tensor, "token d_model"]:
        """The streams at the end of a path, before the final norm, of tokens with these embeddings."""
        stream = embed
        for step in self.paths[label]:
            write = self._write(step, stream)
            stream = stream + write if label == MLPS else write
        return stream

    def states(self, embed: Float[Tensor, "token d_model"], label: str) -> Float[Tensor, "token d_model"]:
        """Inputs of the unembedding (`stream` after the final norm), in float32, or float64 for float64 models."""
        decoder, parts = self.network.decoder, slices(len(embed), STREAM_ROWS)
        state = torch.cat([decoder.norm(self.stream(embed[part], label)) for part in parts])
        return state.to(decoder.compute_dtype(state))

    def _write(self, step: str, stream: Tensor) -> Tensor:
        return self.network.view.writes(self.trace.recording, self.alone(step), stream.unsqueeze(1))[0, :, 0]

    def alone(self, label: str) -> Stage:
        """The stage of one step, without other steps that read the same stream (attention, in a parallel block)."""
        stage = self.network.stage(label)
        return Stage(stage.stream, tuple(step for step in stage.steps if step.label == label))

    def _check(self, ids: Int[Tensor, " token"], checked: set[str]) -> None:
        """Check that no hook edits a stream, and that embedding and MLPs are functions of one token; adds to those `checked`."""
        if any(self.trace.recording.edits.values()):
            raise ValueError(
                "A path's streams are those of the model without edits; a hook edits "
                f"{some(self.trace.recording.edits)}. Take the hook on the stream away; hooks inside steps are kept."
            )
        steps = {step for steps in self.paths.values() for step in steps} - checked
        if "embed" in checked and not steps:
            return
        found = self.embed(torch.cat([ids, torch.arange(min(self.n_tokens, 5), device="cpu")]))
        self._agree("embed", found[:2], self.trace["embed"][:2, 0])
        for step in steps:
            self.trace.stage_function(self.network.stage(step))  # compares the replay with what the model wrote
            self._agree(step, self._write(step, found)[:2], self._write(step, found[:2]))
        checked |= steps | {"embed"}

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


def _read_path(network: ResidualNetwork, path: PathInput) -> tuple[str, list[str]]:
    """A path's label and steps."""
    known = mlp_steps(network)
    if path == MLPS:
        whole = [step.label for step in network.steps if step.kind == "block"]
        if whole:
            raise NotImplementedError(
                f'"{MLPS}" takes every MLP of the model; {some(whole)} of {network.view.name} are one write each, and their '
                f'MLPs not at all. Use "{DIRECT}", or name MLPs of other blocks.'
            )
        if not known:
            raise ValueError(
                f'"{MLPS}" needs a model with MLPs; this one has none. Its only bi-gram path is "{DIRECT}".'
            )
        return MLPS, known
    if isinstance(path, str):  # a label
        steps = [] if path == DIRECT else [step.strip() for step in path.split(ARROW.strip())]
    else:
        steps = list(path)
    for step in steps:
        if step not in known and ("attn" in step or step.startswith("L") or step.endswith("_block")):
            raise ValueError(
                f"A bi-gram path must be a function of one token; {step!r} holds attention, which reads other tokens, too. "
                f"Use MLPs ({some(known)}), or the skip-trigrams of its heads."
            )
        if step not in known:
            raise ValueError(
                f'A path must be "{DIRECT}", "{MLPS}" or steps such as "1_mlp{ARROW}3_mlp", each one of {some(known)}; got '
                f"the step {step!r} in {path!r}."
            )
    order = [known.index(step) for step in steps]
    if order != sorted(set(order)):
        raise ValueError(f"A path must pass its steps in the order of the network, each once; got {steps}.")
    return ARROW.join(steps) or DIRECT, steps


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
        ids = [_id_of(name, token, tokenizer) if isinstance(token, str) else token for token in ids]
    found = torch.as_tensor(ids, device=device)
    if found.ndim != 1 or not len(found) or found.is_floating_point() or found.dtype is torch.bool:
        raise ValueError(f"{name} must be a list of token ids, at least one; got {ids!r}. Pass None for all.")
    if int(found.min()) < 0 or int(found.max()) >= size:
        raise ValueError(f"{name} must be ids in 0..{size - 1}; got {int(found.min())}..{int(found.max())}.")
    return found.long().unique()


def _id_of(name: str, text: str, tokenizer: Any) -> int:
    """The id of a text of one token."""
    if tokenizer is None:
        raise ValueError(f"{name} must be token ids, for the model has no tokenizer; got {text!r}.")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"A text in {name} must be one token; {text!r} is {len(ids)}: {list(ids)[:6]}. Mind the leading space, or give ids."
        )
    return int(ids[0])


def described(ids: Tensor | None, given: Any) -> str | dict[str, Any]:
    """A short description of a subset of tokens: their number and hash, or "all"."""
    if given is None or ids is None:
        return "all"
    return {"count": len(ids), "sha256": hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()}
