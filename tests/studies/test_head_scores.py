"""Scores of heads against matrices of all pairs of tokens and attention, read from forward passes by hooks."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
import zoo

import tl_jets
from tl_jets.core.network import ResidualNetwork
from tl_jets.studies import HeadScores, head_scores

V = zoo.D_VOCAB
RAW = zoo.available(["gpt2", "pythia", "llama", "gemma2", "attn_only", "no_norm"])
RAW = [spec for spec in RAW if spec.processing == "raw"]
LENGTH = 5


class _StopError(Exception):
    pass


def activation(model, layer, streams, name, also=()):
    """One activation of a forward pass whose stream before a layer is overwritten."""
    box = []
    hooks = [(f"blocks.{layer}.hook_resid_pre", lambda own, hook: streams), *also]
    hooks.append((f"blocks.{layer}.{name}", lambda own, hook: box.append(own)))
    with torch.no_grad(), ResidualNetwork(model).view.precision(), model.hooks(hooks):
        model(torch.zeros(streams.shape[:2], dtype=torch.long))
    return box[0]


def embeddings(model, tokens):
    """Streams before the first block, and those without positions."""
    box = {}
    names = [name for name in ("blocks.0.hook_resid_pre", "hook_pos_embed") if name in model.hook_dict]
    hooks = [(name, lambda own, hook, name=name: box.__setitem__(name, own.clone())) for name in names]
    with torch.no_grad(), model.hooks(hooks):
        model(tokens, attention_mask=torch.ones_like(tokens))
    whole = box["blocks.0.hook_resid_pre"]
    return whole, whole - box.get("hook_pos_embed", torch.zeros(()))


def effective(model, stream):
    """A stream and what the first MLP writes for it."""
    if model.cfg.attn_only:
        return stream
    silent = [("blocks.0.hook_attn_out", lambda own, hook: own * 0)]
    return stream + activation(model, 0, stream, "hook_mlp_out", silent)


def prompt(seed=0, n_tokens=V, prompts=4):
    """The prompt of repeated tokens, and the permutation of the control."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(V, generator=draw)[:n_tokens]
    shuffle = torch.randperm(len(order), generator=draw)
    tokens = torch.randint(0, V, (prompts, LENGTH), generator=draw)
    return torch.cat([tokens, tokens], 1), order, shuffle


def matrix(model, layer, head, words):
    """Centered logits of what a head writes of each token [V, V]."""
    zero = activation(model, layer, torch.zeros_like(words[:1]), "attn.hook_z")
    z = activation(model, layer, words, "attn.hook_z") - zero
    write = z[:, 0, head] @ model.blocks[layer].attn.W_O[head]
    decoder = ResidualNetwork(model).decoder
    norms = [decoder.norm]
    post = ResidualNetwork(model).view.post_norm(layer)
    for norm in norms if post is None else [post, *norms]:
        write = norm(write) - (0 if norm.bias is None else norm.bias)
    logits = write @ decoder.W_U
    return (logits - logits.mean(1, keepdim=True)).double()


@pytest.mark.parametrize("stream", ["direct", "effective"])
@pytest.mark.parametrize("spec", RAW, ids=str)
def test_scores_are_those_of_all_pairs(spec, stream):
    model = zoo.build(spec)
    found = head_scores(model, stream=stream, observe=0, length=LENGTH, layers=[1], progress=False)
    tokens, order, shuffle = prompt()
    if getattr(ResidualNetwork(model).tokenizer, "bos_token_id", None) is not None:
        tokens = torch.cat([torch.full((4, 1), model.tokenizer.bos_token_id), tokens], 1)
    first = tokens.shape[1] - 2 * LENGTH
    _, words = embeddings(model, torch.arange(V)[:, None])
    context, _ = embeddings(model, tokens)
    if stream == "effective":
        words, context = effective(model, words), effective(model, context)
    pattern = activation(model, 1, context, "attn.hook_pattern")
    for head in range(model.cfg.n_heads):
        M = matrix(model, 1, head, words)[order][:, order]
        for wanted, copying, copied in (
            (M, found.copying, found.copied),
            (M[:, shuffle], found.copying_control, found.copied_control),
        ):
            values = torch.linalg.eigvals(wanted)
            np.testing.assert_allclose(copying[0, head], values.sum().real / values.abs().sum(), atol=1e-6)
            best = (wanted.argsort(1, descending=True)[:, :1] == torch.arange(V)[:, None]).any(1)
            assert float(copied[0, head]) == pytest.approx(float(best.double().mean()))
        before = [pattern[:, head, q, q - 1].mean() for q in range(first + 1, tokens.shape[1])]
        assert float(found.previous_token[0, head]) == pytest.approx(float(sum(before)) / len(before), abs=1e-9)
    uniform = np.mean([1 / (q + 1) for q in range(first + 1, tokens.shape[1])])
    assert found.previous_token_control == pytest.approx(uniform)


@pytest.mark.parametrize("spec", RAW[:3], ids=str)
def test_what_is_observed_is_in_the_models_cache(spec):
    model = zoo.build(spec)
    found = head_scores(model, observe=3, length=LENGTH, n_tokens=8, seed=4, progress=False)
    tokens, _, _ = prompt(4, 8, 3)
    bos = getattr(ResidualNetwork(model).tokenizer, "bos_token_id", None)
    tokens = tokens if bos is None else torch.cat([torch.full((3, 1), bos), tokens], 1)
    first = tokens.shape[1] - 2 * LENGTH
    with ResidualNetwork(model).view.precision():
        _, cache = model.run_with_cache(tokens, attention_mask=torch.ones_like(tokens))
    network = ResidualNetwork(model)
    decoder, final = network.decoder, cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
    centered = decoder.norm.center(final)
    for layer, head in ((0, 0), (1, 1)):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][:, head]
        second = range(first + LENGTH, first + 2 * LENGTH)
        induction = torch.stack([pattern[:, q, q - LENGTH + 1] for q in second]).mean()
        before = torch.stack([pattern[:, q, q - 1] for q in range(first + 1, tokens.shape[1])]).mean()
        assert float(found.observed["induction"][layer, head]) == pytest.approx(float(induction), abs=1e-9)
        assert float(found.observed["previous_token"][layer, head]) == pytest.approx(float(before), abs=1e-9)
        zero = activation(model, layer, torch.zeros_like(final), "attn.hook_z")
        write = (cache[f"blocks.{layer}.attn.hook_z"] - zero)[:, :, head] @ model.blocks[layer].attn.W_O[head]
        scale = (centered.square().mean(-1, keepdim=True) + decoder.norm.eps).rsqrt()
        logits = decoder.norm.scale(decoder.norm.center(write) * scale) @ decoder.W_U
        logits = logits - logits.mean(-1, keepdim=True)
        read = [
            sum(pattern[b, q, k] * logits[b, q, tokens[b, k]] for k in range(1, q + 1))
            for b in range(3)
            for q in second
        ]
        assert float(found.observed["copying"][layer, head]) == pytest.approx(float(sum(read)) / len(read), abs=1e-7)


def test_a_head_that_copies_scores_one_and_its_negative_minus_one():
    spec = next(spec for spec in RAW if spec.name == "attn_only")
    model = zoo.fresh(spec)
    embed, out = model.embed.W_E.detach(), ResidualNetwork(model).decoder
    for sign in (1.0, -1.0):
        block = model.blocks[1].attn
        d_head = block.W_V.shape[-1]
        with torch.no_grad():
            # OV through the directions that raise a token's own logit.
            right = torch.linalg.svd(embed.double() - embed.double().mean(0), full_matrices=False).Vh[:d_head]
            gram = right @ (embed.T.double() @ (out.W_U - out.W_U.mean(1, keepdim=True)).T.double())
            block.W_V[0].copy_(right.T)
            block.W_O[0].copy_(sign * gram)
        found = head_scores(model, stream="direct", layers=[1], length=LENGTH, progress=False)
        assert sign * float(found.copying[0, 0]) > 0.5
        assert abs(float(found.copying_control[0, 0])) < 0.5
    assert float(found.copied[0, 0]) == 0


def test_agreement_is_spearmans_beside_shuffles():
    draw = torch.Generator().manual_seed(0)
    grid = lambda: torch.randn(6, 5, generator=draw, dtype=torch.float64)  # noqa: E731
    depth = torch.arange(6.0, dtype=torch.float64)[:, None]
    same = grid()
    seen = {"copying": depth + 0.01 * grid(), "induction": same, "previous_token": same}
    found = HeadScores(list(range(6)), depth + 0.01 * grid(), same, -same, same, same, 0.1, seen)
    table = found.agreement(200).set_index(["from weights", "observed"])
    for (score, name), row in table.iterrows():
        wanted = scipy.stats.spearmanr(getattr(found, score).flatten(), seen[name].flatten()).statistic
        assert row["correlation"] == pytest.approx(wanted)
    by_depth = table.loc["copying", "copying"]
    assert by_depth["correlation"] > by_depth["shuffled_high"] and not by_depth["above"]  # depth alone explains it
    assert table.loc["copied", "induction"]["above"]
    assert not table.loc["previous_token", "previous_token"]["above"]
    assert found.top("copied", 3)["head"].tolist() == [found.labels[i] for i in same.flatten().topk(3).indices]


def test_head_scores_refuse(as_users_run_it, tmp_path):
    model = zoo.build(RAW[0])
    for options, message in (
        ({"stream": "mlp"}, "stream must be"),
        ({"layers": [7]}, "layers must be some of 0..1"),
        ({"layers": []}, "layers must be"),
        ({"length": 10**6}, "fit into the context"),
        ({"observe": -1}, "observe"),
        ({"n_tokens": 1}, "n_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            head_scores(model, progress=False, **options)
    found = head_scores(model, length=LENGTH, n_tokens=8, layers=[1], progress=False)
    with pytest.raises(ValueError, match="none was observed"):
        found.agreement()
    with pytest.raises(ValueError, match="score must be"):
        found.top("size")
    loaded = tl_jets.load(found.save(tmp_path / "scores.safetensors"))
    assert loaded.to_dataframe().equals(found.to_dataframe()) and repr(loaded) == repr(found)
