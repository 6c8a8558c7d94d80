"""Heads' attention and writes of single tokens, read from forward passes by hooks: what a user would do by hand."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import zoo
from torch import Tensor

from tl_jets.calculus import full_precision

V = zoo.D_VOCAB


class _StopError(Exception):
    pass


def activation(model: Any, layer: int, streams: Tensor, name: str) -> Tensor:
    """One activation of a whole forward pass whose stream before a layer is overwritten: what a user would do by hand."""
    box: list[Tensor] = []
    tokens = torch.zeros(streams.shape[:2], dtype=torch.long)
    hooks = [
        (f"blocks.{layer}.hook_resid_pre", lambda own, hook: streams),
        (f"blocks.{layer}.attn.{name}", lambda own, hook: box.append(own)),
        (f"blocks.{layer}.hook_resid_post", lambda own, hook: (_ for _ in ()).throw(_StopError())),
    ]
    with torch.no_grad(), full_precision(), model.hooks(hooks), contextlib.suppress(_StopError):
        model(tokens)
    return box[-1]


def embeddings(model: Any) -> Tensor:
    """Every token's stream without positions: that at position 0, less the positional embedding where there is one."""
    box: dict[str, Tensor] = {}
    names = ["blocks.0.hook_resid_pre", "hook_pos_embed"]
    learned = getattr(model.cfg, "positional_embedding_type", "standard") == "standard"

    def save(name: str) -> Any:
        return lambda own, hook: box.__setitem__(name, own)

    with torch.no_grad(), full_precision(), model.hooks([(n, save(n)) for n in names if n in model.hook_dict]):
        model(torch.arange(V)[:, None])
    stream = box["blocks.0.hook_resid_pre"][:, 0]
    return stream - box["hook_pos_embed"][:, 0] if learned and "hook_pos_embed" in box else stream


def log_ratios(model: Any, layer: int, head: int, distance: int, queries: Tensor | None, keys: Tensor | None) -> Tensor:
    """log of (attention of z2 to z1, `distance` places before it) / (attention of z2 to itself): [z2, z1], from patterns."""
    embed = embeddings(model)
    queries, keys = (embed if x is None else x for x in (queries, keys))
    filler = torch.randn(distance - 1, embed.shape[1], dtype=embed.dtype, generator=torch.Generator().manual_seed(5))
    rows = []
    for query in range(V):
        middle = filler.expand(V, -1, -1)
        streams = torch.cat([keys[:, None], middle, queries[query].expand(V, 1, -1)], dim=1)
        pattern = activation(model, layer, streams, "hook_pattern")[:, head, -1]
        rows.append(pattern[:, 0].log() - pattern[:, -1].log())
    return torch.stack(rows)


def raw_scores(model: Any, layer: int, head: int, distance: int) -> Tensor | None:
    """Scores [z2, z1] as the model shows them before the softmax."""
    embed = embeddings(model)
    rows = []
    for query in range(V):
        streams = torch.cat([embed[:, None].expand(-1, distance, -1), embed[query].expand(V, 1, -1)], dim=1)
        rows.append(activation(model, layer, streams, "hook_attn_scores")[:, head, -1, 0])
    return torch.stack(rows)


def attention_table(
    model: Any,
    layer: int,
    head: int,
    distance: int,
    normalize: str = "vocab",
    *,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """A(z1 | z2) as [z2, z1]. A ratio of weights is exp(s(z2, z1)) times what depends on z2 only."""
    if normalize == "none":
        return raw_scores(model, layer, head, distance)
    ratios = log_ratios(model, layer, head, distance, queries, keys)
    if normalize == "pair":
        return -torch.log1p(torch.exp(-ratios))
    return ratios - ratios.exp().sum(1, keepdim=True).log()


def write_table(model: Any, layer: int, head: int, streams: Tensor | None = None) -> Tensor:
    """What the head writes of each token, or of each stream: through W_O and any post-norm written out."""
    streams, spec = embeddings(model) if streams is None else streams, model.cfg
    value = activation(model, layer, streams[:, None], "hook_z")[:, 0]
    nothing = activation(model, layer, torch.zeros_like(streams[:1, None]), "hook_z")[:, 0]
    value, nothing = (x.unflatten(-1, (spec.n_heads, -1)) if x.ndim == 2 else x for x in (value, nothing))
    block = model.blocks[layer]
    write = (value - nothing)[:, head] @ block.attn.W_O[head].double()
    post = post_norm(model, block)
    if post is not None:  # without its bias, that of the zero write
        with full_precision():
            write = post(write[:, None])[:, 0] - post(torch.zeros_like(write[:1, None]))[:, 0]
    return write.detach() * getattr(block, "residual_contribution_scale", 1.0)


def mlp_table(model: Any, layer: int, streams: Tensor | None = None) -> Tensor:
    """What an MLP writes of each token, or of each stream, which is put where the MLP reads."""
    streams, box = embeddings(model) if streams is None else streams, {}
    points = [f"blocks.{layer}.hook_resid_{place}" for place in ("pre", "mid")]
    hooks = [(name, lambda own, hook: streams[:, None]) for name in points if name in model.hook_dict]
    hooks.append((f"blocks.{layer}.hook_mlp_out", lambda own, hook: box.__setitem__("write", own)))
    with torch.no_grad(), full_precision(), model.hooks(hooks):
        model(torch.zeros(len(streams), 1, dtype=torch.long))
    return box["write"][:, 0]


def decoded(model: Any, write: Tensor) -> Tensor:
    """Log-probabilities of streams, through the final norm and unembedding written out."""
    spec = model.cfg
    with torch.no_grad(), full_precision():
        final = getattr(model, "ln_final", None) if getattr(spec, "normalization_type", 1) is not None else None
        logits = model.unembed(write[:, None] if final is None else final(write[:, None]))[:, 0]
        cap = getattr(spec, "output_logits_soft_cap", None) or 0
        if hasattr(model, "adapter"):
            logits = model.adapter.apply_output_logits_transform(logits[:, None])[:, 0]
        elif cap > 0:
            logits = cap * torch.tanh(logits / cap)
    return logits - logits.exp().sum(1, keepdim=True).log() if logits.abs().max() < 600 else logits.log_softmax(1)


def output_table(model: Any, layer: int, head: int, streams: Tensor | None = None) -> Tensor:
    """log P(z3 | z1) as [z1, z3]: the head alone, through W_O, norms and unembedding written out."""
    return decoded(model, write_table(model, layer, head, streams))


def post_norm(model: Any, block: Any) -> Any:
    if type(model).__name__ == "HookedTransformer":
        if model.cfg.use_normalization_before_and_after:
            return block.ln1_post
        return block.ln1 if model.cfg.original_architecture == "Olmo2ForCausalLM" else None
    name = block.hook_aliases.get("hook_attn_out", "attn.hook_out").split(".")[0]
    return None if name == "attn" else block._modules[name]
