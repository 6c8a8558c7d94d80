r"""The query-key and output-value maps of attention heads on the vocabulary, read from the model's own modules.

The score of query token z2 for key token z1, `distance` places earlier, and the head's write of z1 are

.. math::
    s(z_2, z_1) = \tau\bigl(q(z_2)^\top M_{\text{distance}} \, k(z_1)\bigr), \qquad
    w(z_1) = \bigl(v(z_1) - v(0)\bigr) W_O .

q, k and v are outputs of the layer's modules (pre-norm, biases, query and key norms, clipping, hooks) for a single
token at position 0, without positional embedding. v(0) is the value of the zero stream, so a head's write has no
constant (`tl_jets.adapters.parts`). M is the rotary embedding times the attention scale; tau is the softcap, if any.

| symbol | variable |
|---|---|
| q, k, v - v(0) | `HeadVectors.query`, `key`, `value` |
| M k; M at distance 0 times k | `QKScores.keys(k)`; `QKScores.own_keys(k)` |
| tau | `QKScores.cap` |
| W_O, then norms, then W_U | `decoded_writes` |

Cost: the layer's attention on every token (4 d_model^2 a token), and about 50 (distance + 1) tokens of forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.adapters.callables import CallableModel
from tl_jets.adapters.parts import check_heads
from tl_jets.calculus import full_precision
from tl_jets.core.logit_reader import slices
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.protocol import Step, relative_error, tolerance
from tl_jets.ngrams.float32 import full_float32
from tl_jets.ngrams.low_rank_logits import LowRankLogits
from tl_jets.ngrams.qk_scores import QKSample, QKScores, rotations
from tl_jets.ngrams.streams import DIRECT, VocabularyStreams, head_rows

# Hook points of queries and keys, closest to their product first.
_POINTS = (("hook_rot_q", "hook_rot_k"), ("hook_q_normed", "hook_k_normed"), ("hook_q", "hook_k"))
# Attention weights of the fit held at once.
FITTED_WEIGHTS = 2**24
# Tolerance of the fit: error of log-ratios in float64, relative to the largest.
FIT_ERROR = 1e-9


class HeadVectors(NamedTuple):
    """Queries, keys and values of some heads on some tokens; grouped keys are repeated for each head."""

    query: Float[Tensor, "head token d_head"]
    key: Float[Tensor, "head token d_head"]
    value: Float[Tensor, "head token d_head"]


class HeadReader:
    """Queries, keys and values of one attention layer on single tokens, and the layer's score map.

    `streams` of another reader of the model save a forward pass.

    Raises:
        ValueError: The layer does not exist, a hook edits a stream, or the network's self-check fails.
        NotImplementedError: The model consists of plain functions, or adds positions to queries and keys.
    """

    @full_float32()
    def __init__(self, model: Any, layer: int, streams: VocabularyStreams | None = None):
        self.network = ResidualNetwork(model).at("sublayer") if streams is None else streams.network
        view: Any = self.network.view
        if isinstance(view, CallableModel):
            raise NotImplementedError("Skip-trigrams are of attention heads; plain functions have none. Pass a model.")
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < view.n_layers:
            raise ValueError(f"layer must be one of 0..{view.n_layers - 1}; got {layer!r}.")
        if getattr(view.cfg, "positional_embedding_type", None) == "shortformer":
            raise NotImplementedError(
                "Queries and keys must be functions of their token; shortformer attention adds positions to them."
            )
        self.view, self.layer, self.n_heads = view, layer, int(view.cfg.n_heads)
        step = f"{layer}_attn"
        view.refuse(Step(step, layer, "attn"))
        self.streams = streams or VocabularyStreams(self.network, [DIRECT], prompts=head_rows(self.network))
        # Batch size of replays, which is that of the recorded forward pass.
        self._rows = len(self.streams.trace.tokens)
        self.n_tokens, self.device = self.streams.n_tokens, self.streams.device
        trace, self._attention = self.streams.trace, self.streams.alone(step)
        self._recording = trace.recording
        trace.gamma(step)  # compares the replay with what the model wrote
        with torch.no_grad(), view.replaying(layer):
            check_heads(view, self._recording, view.calls_of(self._recording), layer)
        self._zero_value = self._read(torch.zeros_like(trace["embed"][:1, 0]))[2]

    @full_float32()
    def vectors(
        self, tokens: Int[Tensor, " token"], heads: Sequence[int], paths: Mapping[str, str] | None = None
    ) -> HeadVectors:
        """Queries, keys and values (minus those of the zero stream) of some heads, in working precision.

        `paths` are labels of paths to a head of the layer, whose streams the `query`, `key` or `value` reads; the embedding
        where there is none.
        """
        labels = [(paths or {}).get(name) for name in HeadVectors._fields]
        kept: list[Tensor] = []
        for part in slices(len(tokens), self._rows):
            embed = self.streams.embed(tokens[part])
            read = {label: self._read(self._stream(embed, label)) for label in dict.fromkeys(labels)}
            found = [read[label][place] for place, label in enumerate(labels)]
            found[2] = found[2] - self._zero_value
            found = [x[:, list(heads)].transpose(0, 1) for x in found]
            kept = kept or [x.new_empty(len(heads), len(tokens), x.shape[-1]) for x in found]
            for into, vectors in zip(kept, found, strict=True):
                into[:, part] = vectors
        return HeadVectors(*kept)

    def _stream(self, embed: Float[Tensor, "token d_model"], label: str | None) -> Float[Tensor, "token d_model"]:
        """The stream that the layer reads at the end of a path to one of its heads."""
        if label is None:
            return embed
        last = next(step for step in self.streams.paths[label].nested if step.startswith(f"L{self.layer}H"))
        return self.streams.stream(embed, label, before=last)

    def values(self, streams: Float[Tensor, "token d_model"]) -> Float[Tensor, "token head d_head"]:
        """Values (minus those of the zero stream) of any streams, each alone at position 0."""
        return self.streams.values(self.layer, streams)

    @torch.no_grad()
    def _read(self, stream: Float[Tensor, "token d_model"]) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [token, head, d_head] of streams, each alone at position 0."""
        found: dict[str, Tensor] = {}
        padded = stream.new_zeros(self._rows, 1, stream.shape[1])
        padded[: len(stream), 0] = stream
        with self.view.hooks(self._savers(found, "hook_z")):
            self.network.view.writes(self._recording, self._attention, padded)
        query, key = self._query_and_key(found)
        value = found["hook_z"]
        if value.ndim == 3:
            value = rearrange(value, "batch pos (head d_head) -> batch pos head d_head", head=self.n_heads)
        return query[: len(stream), 0], key[: len(stream), 0], value[: len(stream), 0]

    def _savers(self, found: dict[str, Tensor], *more: str) -> list[tuple[str, Callable[..., None]]]:
        """Hooks that save queries, keys and the activations `more` of the layer's attention, where the model has them."""

        def save(tensor: Tensor, hook: Any, name: str) -> None:
            found[name] = tensor.detach().to(self.device)

        prefix, names = f"blocks.{self.layer}.attn.", [name for pair in _POINTS for name in pair] + list(more)
        return [(prefix + name, partial(save, name=name)) for name in names if prefix + name in self.view.hook_dict]

    def _query_and_key(self, found: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys [batch, pos, head, d_head], grouped keys repeated."""
        names = next((pair for pair in _POINTS if pair[0] in found and pair[1] in found), None)
        if names is None:
            raise NotImplementedError(
                f"Skip-trigrams need queries and keys of layer {self.layer}; none of {[q for q, _ in _POINTS]} fired. "
                "Please report the architecture."
            )
        query, key = found[names[0]], found[names[1]]
        if query.ndim == 3:
            query = rearrange(query, "batch pos (head d_head) -> batch pos head d_head", head=self.n_heads)
            key = rearrange(key, "batch pos (head d_head) -> batch pos head d_head", d_head=query.shape[-1])
        return query, repeat(
            key, "batch pos head d_head -> batch pos (head copy) d_head", copy=query.shape[2] // key.shape[2]
        )

    @cached_property
    def constant(self) -> Float[Tensor, " d_vocab"] | None:
        """Logits from the final norm's bias and b_U; None if they are 0."""
        decoder = self.network.decoder
        dtype = decoder.compute_dtype(torch.empty(0, dtype=self.view.dtype, device="cpu"))
        with full_float32():
            constant = decoder.constant(decoder.norm.bias, dtype)
        return constant if bool(constant.any()) else None

    # The score map

    @torch.no_grad()
    @full_float32()
    def scores(self, distance: int) -> QKScores:
        """The score map for a key `distance` places before the query; refuses attention that no rotation reproduces."""
        n_ctx = int(getattr(self.view.cfg, "n_ctx", 0) or 2**31)
        if isinstance(distance, bool) or not isinstance(distance, int) or not 1 <= distance < n_ctx:
            raise ValueError(f"distance must be in 1..{n_ctx - 1}, places between key and query; got {distance!r}.")
        data = self._sample(distance)
        for cap in (None, *self._caps()):
            if cap is not None and data.shown is None:
                continue
            for pairs, rotation in rotations(data.query.shape[-1], getattr(self.view.cfg, "rotary_dim", None)):
                found = data.fit(pairs, cap, rotation)
                if data.error(found) <= max(FIT_ERROR, tolerance(self.view.native_dtype) / 16):
                    return found
        raise NotImplementedError(
            f"Attention weights of layer {self.layer} must follow from queries and keys, a rotation and a scale; none "
            "reproduces the model's own. A hook edits them, or the architecture does something else (a softcap whose "
            "scores are not shown, for one). Please report its name."
        )

    def _caps(self) -> list[float]:
        """Attention softcaps in the configuration."""
        own = getattr(self.view.blocks[self.layer].attn, "original_component", None)
        names = ("attn_scores_soft_cap", "attn_logit_softcapping")
        values = (getattr(source, name, None) for source in (self.view.cfg, own) for name in names)
        return sorted({float(value) for value in values if isinstance(value, (int, float)) and value > 0})

    def _sample(self, distance: int) -> QKSample:
        """Queries and keys of random streams, and the model's attention weights between them."""
        # Four equations an unknown.
        half = max(24, -(-4 * (2 * int(self.view.cfg.d_head) + self.n_heads) // self.n_heads))
        streams = self._random_streams(2 * half)
        query, key = (x[:, 0].double() for x in self._query_and_key(self._attend(streams[:, None])))
        x, y = slice(0, half), slice(half, None)
        between = self._random_streams(half * (distance - 1), seed=1) if distance > 1 else streams[:0]
        between = between.view(half, distance - 1, streams.shape[1])
        prompts = torch.cat([streams[y, None], between, streams[x, None]], dim=1)
        weights, scores = [], []
        size = max(1, FITTED_WEIGHTS // (self.n_heads * (distance + 1) ** 2))
        for part in prompts.split(size):
            found = self._attend(part)
            last = [found[name][:, :, -1].double() for name in ("hook_pattern", "hook_attn_scores") if name in found]
            weights.append(last[0])
            scores.append(last[-1])
        weight, score = torch.cat(weights), torch.cat(scores)
        if not bool(weight[..., 0].any()):
            raise ValueError(
                f"distance must be inside of the attention window of layer {self.layer}; {distance} is not, all weights are 0."
            )
        if relative_error(weight.sum(-1), torch.ones_like(weight[..., 0])) > 1e-3:
            raise NotImplementedError(
                "Attention weights of a query must sum to 1; these do not (attention sinks, or a hook that edits them)."
            )
        true = relative_error(score.softmax(-1), weight) < 1e-6
        ends = torch.tensor([0, -1], device=weight.device)
        return QKSample(query[x], key[y], key[x], weight[..., ends].log(), score[..., ends] if true else None)

    def _random_streams(self, count: int, seed: int = 0) -> Float[Tensor, "token d_model"]:
        """Random token embeddings plus noise of the same size, in float64."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, self.n_tokens, (count,), generator=generator, device="cpu")
        embed = torch.cat([self.streams.embed(part) for part in tokens.split(self._rows)]).double()
        noise = torch.randn(embed.shape, generator=generator, dtype=torch.float64, device="cpu").to(embed.device)
        return embed + embed.pow(2).mean().sqrt() * noise

    def _attend(self, streams: Float[Tensor, "batch pos d_model"]) -> dict[str, Tensor]:
        """Attention activations of the layer in the model's forward pass on the streams, in float64."""
        found: dict[str, Tensor] = {}
        tokens = torch.zeros(streams.shape[:2], dtype=torch.long, device=streams.device)
        prefix = f"blocks.{self.layer}."

        moved = streams.to(self.view.device_of(self.layer))
        hooks = [(prefix + "hook_resid_pre", lambda tensor, hook: moved)]
        hooks += self._savers(found, "hook_attn_scores", "hook_pattern")
        try:
            with full_precision():
                # Run the whole block: some attention modules call these hooks after their output.
                self.view.run_until(prefix + "hook_resid_post", tokens, hooks)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a float32 model need not run on streams in float64
            raise NotImplementedError(
                f"Skip-trigrams need the attention of layer {self.layer} of {self.view.name} in float64, which fails: {error}. Its "
                f"heads are not supported."
            ) from error
        finally:
            self.view.forget_replay(self.layer)
        return found


@full_float32()
def decoded_writes(reader: HeadReader, head: int, value: Float[Tensor, "token d_head"]) -> LowRankLogits:
    """The logits of a head's writes of tokens with these values, by factors [token, d_head] and [d_head, d_vocab].

    The norms divide by the root mean square of the (centered) write, a quadratic form mean((v A)^2) = v (A A' /
    d_model) v', so writes are never computed. A post-norm (Gemma-2, OLMo-2) is applied to the head's write alone: its
    weight counts, the final norm undoes its scale (up to eps), and its bias is a constant, which belongs to no head.
    """
    view, decoder = reader.view, reader.network.decoder
    block, post = view.blocks[reader.layer], view.post_norm(reader.layer)
    dtype = decoder.compute_dtype(torch.empty(0, dtype=view.dtype, device="cpu"))
    W_O = block.attn.W_O[head].detach().to(decoder.W_U.device, dtype)
    branch = float(getattr(block, "residual_contribution_scale", 1.0))
    wide = value.double()
    size = torch.ones(len(value), 1, dtype=torch.float64, device=value.device)
    for norm, factor in ([] if post is None else [(post, 1.0)]) + [(decoder.norm, branch)]:
        W_O = W_O * factor
        if norm.kind != "none":
            W_O = norm.center(W_O)
            scaled, gram = wide * size, W_O.double() @ W_O.double().T / W_O.shape[1]
            size = size * torch.rsqrt((scaled @ gram * scaled).sum(-1, keepdim=True).clamp_min(0) + norm.eps)
        W_O = W_O if norm.weight is None else W_O * norm.weight.to(W_O)
    columns = torch.empty(len(W_O), decoder.d_vocab, dtype=dtype, device=W_O.device)
    decoder.project(W_O, columns)
    coordinates = (wide * size).to(torch.promote_types(value.dtype, dtype))
    return LowRankLogits(coordinates, columns, reader.constant, decoder.transform)
