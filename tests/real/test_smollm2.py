"""Every tool on SmolLM2-135M: right against Hugging Face's own run of it, and of use on a model of thirty layers.

`tox -e real` runs it, or `pytest -m real` with the model's folder in TL_JETS_SMOLLM2.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from get_model import ROOT
from torch.func import jvp

import tl_jets as tj
from tl_jets.core.divergence import DivergenceWarning
from tl_jets.core.sinks import OUTLYING
from tl_jets.interventions.hooks import ablation_hooks, patch_hooks
from tl_jets.ngrams import jet_bigrams, jet_trigrams, trigram_scores
from tl_jets.paths.statistics import path_sums

pytestmark = pytest.mark.real


def kl(truth: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(truth || logits) over the last axis, nats."""
    p, q = truth.log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def near(found, expected, rel=1e-3, abs=1e-3):
    torch.testing.assert_close(torch.as_tensor(found).double(), torch.as_tensor(expected).double(), rtol=rel, atol=abs)


def beyond_mean(logits: torch.Tensor, token: int) -> torch.Tensor:
    return logits[..., token] - logits.mean(-1)


def test_lenses_are_the_series_of_its_own_norm(network, trace, reference):
    streams, logits = reference.run(trace.tokens)
    lens = tj.iterative_jet_lens(network, trace, order=1, layers=[1, 5, 20, 29, -1])
    final = streams[-1]
    for i, layer in enumerate((1, 5, 20, 29, 30)):
        x = streams[layer]
        value, slope = jvp(reference.normed, (x,), (final - x,))
        for k, states in enumerate((value, value + slope)):
            near(lens.kl[i, k, 0], kl(logits, states @ reference.W_U), rel=5e-3, abs=2e-3)
        near(lens.rho[i, 0], (final - x).norm(dim=-1) / x.norm(dim=-1))
    assert lens.model_top_ids[0].tolist() == logits.argmax(-1).tolist()


def test_the_sink_is_at_the_start_and_averages_are_sane_without_it(network, many, reference):
    lens = tj.iterative_jet_lens(network, many, order=1)
    for row in range(len(many.tokens)):
        tokens = many.tokens[row : row + 1, many.valid[row]]
        lengths = torch.stack(reference.run(tokens)[0]).norm(dim=-1)
        outlying = (lengths > OUTLYING * lengths.median(1, keepdim=True).values).any(0)
        assert outlying.nonzero().flatten().tolist() == [0]
        assert lengths[15, 0] > 100 * lengths[15, 1:].max()
        assert lens.sinks.outlying[row].nonzero().flatten().tolist() == [0]
    assert torch.equal(lens.sinks.bos, lens.sinks.mask)  # <|im_start|> begins every prompt
    without, with_sinks = (lens.average(include_sinks=every).set_index(["layer", "order"]) for every in (False, True))
    # With the sink order 1 seems to beat its control at 1_pre.
    kept = lens.valid & ~lens.sinks.mask
    near(without.kl["1_pre", 1], lens.kl[1, 1][kept].mean())
    assert with_sinks.kl["12_pre", 0] != without.kl["12_pre", 0]
    table = lens.average(spread=True, group_by=["a", "b", "a"])
    assert table.kl_median.notna().all() and len(table) == 2 * len(lens.labels) * 2
    rows, kl = table.set_index(["group", "layer", "order"]), lens.kl[20, 1]
    alone = kl[1][kept[1]]
    near(rows.kl["b", "20_pre", 1], alone.mean())
    near(rows.kl_median["b", "20_pre", 1], alone.quantile(0.5))
    both, row = [float(kl[i][kept[i]].mean()) for i in (0, 2)], rows.loc["a", "20_pre", 1]
    near(row.kl_median, torch.cat([kl[0][kept[0]], kl[2][kept[2]]]).quantile(0.5))
    assert min(both) - 1e-4 <= row.kl_low < row.kl < row.kl_high <= max(both) + 1e-4, "the interval is over prompts"
    assert rows.kl_low["b", "20_pre", 1] != rows.kl_low["b", "20_pre", 1], "one prompt has none"


def test_the_page_on_sinks_holds_what_its_demo_prints(folder):
    done = subprocess.run([sys.executable, ROOT / "demos/attention_sinks.py", folder], capture_output=True, text=True)
    (shown,) = re.findall(r"```text\n(.*?)```", (ROOT / "docs/pages/sinks.md").read_text(), re.DOTALL)
    numbers = re.compile(r"(?<![\w.])\d[\d,]*\.?\d*(?![\w.])")
    values = [[float(x.replace(",", "")) for x in numbers.findall(text)] for text in (done.stdout, shown)]
    assert len(values[0]) > 100 and values[0] == pytest.approx(values[1], rel=0.03, abs=0.1)
    assert numbers.sub("#", "".join(done.stdout.split())) == numbers.sub("#", "".join(shown.split()))


def test_the_verdict_names_the_layers(network, trace):
    """What was measured by hand with twelve draws: no layer says anything of its own, 28 of 30 series diverge."""
    lens = tj.iterative_jet_lens(network, trace, order=1)
    verdict = lens.verdict()
    diverging = (lens.rho[:-1, 0, 1:].quantile(0.5, -1) >= 1).tolist()
    assert diverging == [True] * 28 + [False] * 2
    assert verdict.lines[0] == (
        "Order 1 says nothing of its own at any layer: the control is as good; its series diverges at 28 of 30 layers "
        "(0_pre..27_pre)."
    )
    counting = tj.iterative_jet_lens(network, "1, 2, 3, 4,", order=0)
    assert counting.verdict().own[1:13].any(), "a prompt that repeats is found early by the logit lens"


def test_direct_attribution_is_exact(network, trace, reference):
    writes = {}
    hooks = [
        (reference.layers[23].self_attn, lambda _, __, out: writes.__setitem__("23_attn_out", out[0][0].double())),
        (reference.layers[29].mlp, lambda _, __, out: writes.__setitem__("29_mlp_out", out[0].double())),
    ]
    streams, logits = reference.run(trace.tokens, hooks)
    joint = tj.joint_jet_lens(network, trace, linearize="detached", positions=-1)
    answer = int(logits[-1].argmax())
    assert reference.tokenizer.decode([answer]) == " Paris"
    near(joint.effects[:, 0, 0, 0].sum(), beyond_mean(logits[-1], answer))
    scale = torch.rsqrt(streams[-1][-1].square().mean() + reference.eps)
    for label, write in (*writes.items(), ("embed", streams[0])):
        by_hand = beyond_mean(write[-1] * scale * reference.gain @ reference.W_U, answer)
        near(joint.effects[joint.labels.index(label), 0, 0, 0], by_hand)
    # Of use: the city is given by the late layers, not by the embedding.
    largest = joint.effects[:, 0, 0, 0].abs().argsort(descending=True)[:3].tolist()
    assert {joint.labels[i] for i in largest} == {"29_mlp_out", "23_attn_out", "24_mlp_out"}


def test_joint_lens_has_no_better_weights(network, trace):
    joint = tj.joint_jet_lens(network, trace, positions=-1)
    assert float(joint.gap.max()) < 1e-6 and float(joint.weights.sum()) == pytest.approx(1)
    assert float(joint.centered_cosine) > float(joint.uniform.centered_cosine)


def test_paths_sum_to_the_model(network, trace, reference):
    _, logits = reference.run(trace.tokens)
    answer = int(logits[-1].argmax())
    sources = path_sums(network, trace, by="source", positions=-1)
    near(sources.effect.sum(), beyond_mean(logits[-1], answer))
    components = path_sums(network, trace, positions=-1)
    direct = tj.joint_jet_lens(network, trace, linearize="detached", positions=-1)
    last = components.labels.index("29_mlp")
    near(components.effect[last, 0, 0], direct.effects[direct.labels.index("29_mlp_out"), 0, 0, 0])
    top = tj.exponential_expansion(network, linearize="detached", top=5, rank="effect", max_length=2)(
        trace, positions=-1
    )
    effects = top.statistics().effect[:, 0, 0]
    assert len(top.labels) == 5 and bool((effects.abs()[:-1] >= effects.abs()[1:] - 1e-6).all())


def test_ablations_are_those_of_hugging_face(network, trace, reference):
    _, clean = reference.run(trace.tokens)
    answer = int(clean[-1].argmax())
    zero = [(reference.layers[23].self_attn, lambda _, __, out: (torch.zeros_like(out[0]), *out[1:]))]
    _, ablated = reference.run(trace.tokens, zero)

    def at_the_end(_, __, out):
        changed = out[0].clone()
        changed[:, -1] = 0
        return (changed, *out[1:])

    _, local = reference.run(trace.tokens, [(reference.layers[23].self_attn, at_the_end)])
    everywhere = tj.ablation_effect(network, trace, ["23_attn", "5_attn"])
    last = tj.ablation_effect(network, trace, "23_attn", ablated_positions=-1)
    for effect, logits in ((everywhere, ablated), (last, local)):
        near(effect.logit[0, 0, 0, 0], (logits - clean)[-1, answer])
        near(effect.kl[0, 0, 0], kl(clean[-1], logits[-1]), rel=5e-3)
    assert float(everywhere.logit[0]) < -1 < float(everywhere.logit[1]), (
        "the layer that moves the city matters, another does not"
    )


def test_patches_move_the_answer(network, trace, reference):
    model = network.view.model
    other = model.to_tokens("The Colosseum is in the city of")
    rome, paris = (reference.tokenizer(city)["input_ids"][0] for city in (" Rome", " Paris"))
    hooks = (
        patch_hooks(model, ["23_attn", "27_attn"], network.trace(other), positions=-1)
        if other.shape == trace.tokens.shape
        else None
    )
    if hooks is None:  # the prompts differ in length: patch the other way, through tensors
        source = network.trace(other)
        given = {
            step: source[f"{step}_out"][:, -1:].expand(-1, trace.tokens.shape[1], -1) for step in ("23_attn", "27_attn")
        }
        hooks = patch_hooks(model, list(given), given, positions=-1)
    with torch.no_grad():
        clean, patched = model(trace.tokens)[0, -1], model.run_with_hooks(trace.tokens, fwd_hooks=hooks)[0, -1]
    assert float((patched - clean)[rome] - (patched - clean)[paris]) > 1
    zeroed = model.run_with_hooks(trace.tokens, fwd_hooks=ablation_hooks(model, "L23H1"))[0, -1]
    assert torch.isfinite(zeroed).all() and float((zeroed - clean).abs().max()) > 1e-3


def test_the_detached_map_is_the_model(network, trace, reference):
    _, logits = reference.run(trace.tokens)
    J = tj.detached_jacobian(network, trace, output="logits", positions=-1)
    assert float(J.reconstruction_error) < 1e-3 < 0.1 < float(J.ordinary_error)
    near(J.apply(J.map.point)[0, 0] + J.bias[0, 0], logits[-1], rel=1e-3, abs=1e-2)
    shares = J.to_dataframe().query("out_pos == 9").share
    assert float(shares.sum()) == pytest.approx(1, abs=1e-3)


def test_jets_of_blocks(network, trace):
    centers = ["28_mlp_out", "29_attn_out"]
    assert tj.jet_expand(network, "29_mlp", centers=centers, linearize="detached")(trace).check().passed
    with pytest.warns(DivergenceWarning):  # from a component alone the series of a block is no use, and says so
        jets = tj.jet_expand(network, "29_mlp", centers=centers, order=1)(trace)
    assert jets.check().passed


def test_bigrams_of_tied_embeddings_are_lookups_of_the_unembedding(network, reference):
    rows = reference.tokenizer(" Paris city of")["input_ids"]
    table = jet_bigrams(network, "direct", rows=rows, per="row", top_k=3, progress=False)
    embedding = reference.hf.model.embed_tokens.weight.detach().double()
    scores = (reference.normed(embedding[rows]) @ reference.W_U).log_softmax(-1)
    found = {
        (int(first), int(second)): float(score) for (first, second), score in zip(table.ids, table.scores, strict=True)
    }
    best = scores.topk(3)
    assert set(found) == {(row, token) for row, own in zip(rows, best.indices.tolist(), strict=True) for token in own}
    for (first, second), score in found.items():
        assert score == pytest.approx(float(scores[rows.index(first), second]), rel=1e-4, abs=1e-3)
    # Tied: a token is its own likeliest successor, unless a token of a longer embedding beats it.
    assert best.indices[1:, 0].tolist() == rows[1:] and embedding[best.indices[0, 0]].norm() > embedding[rows[0]].norm()


def test_skip_trigrams_of_a_head(network, reference):
    rows = reference.tokenizer(" Paris city of")["input_ids"]
    table = jet_trigrams(network, 0, 0, top_k=5, rows=rows, progress=False, normalize="pair")
    again = trigram_scores(network, 0, 0, table.ids, normalize="pair")
    near(again, table.scores)
    assert bool((table.scores[:-1] >= table.scores[1:]).all()) and len(table) == 5


def test_the_command_answers_on_one_screen(folder):
    command = [sys.executable, "-m", "tl_jets", "lens", "--model", str(folder)]
    command += ["--prompt", "The Eiffel Tower is in the city of"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    spoken = " ".join(" ".join(lines[:4]).split())
    assert "of its own at any layer: " in spoken and re.search(r"diverges at \d+ of 30 layers", spoken)
    assert any(line.startswith("answer  ·Paris") for line in lines)
    assert any(re.match(r"29_mlp_out\s+\+3\.\d", line) for line in lines)


def test_its_cache_is_that_of_transformer_lens(network, trace):
    """Every hook, what TransformerLens computes of it, and the model with terms in place of a stream, by its own hooks."""
    model = network.view.model
    logits, own = model.run_with_cache(trace.tokens)
    cache = tj.to_activation_cache(trace)
    for name, value in cache.items():
        torch.testing.assert_close(value, own[name], rtol=1e-5, atol=1e-4)
    for found, wanted in (
        (cache.accumulated_resid(5, apply_ln=True), own.accumulated_resid(5, apply_ln=True)),
        (cache.decompose_resid(-1), own.decompose_resid(-1)),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    terms = tj.jet_expand(network, "29_mlp", centers=["29_pre", "29_attn_out"], linearize="detached")(trace)
    put = tj.to_activation_cache(terms)
    said = model.run_with_hooks(
        trace.tokens, fwd_hooks=[("blocks.29.hook_resid_post", lambda stream, hook: put[hook.name])]
    )
    torch.testing.assert_close(said, logits, rtol=1e-3, atol=1e-2)  # all terms are the model


def test_features_of_a_stream_and_their_rest_are_its_answer(network, trace):
    """An SAE on the residual stream: direct and all paths of its features, and of what they leave over, sum to the logit."""
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(64, network.decoder.d_model, generator=draw) / 24
    sae = SimpleNamespace(encode=lambda stream: torch.relu(stream @ W.T), W_dec=W)
    features = tj.with_dictionary(network, ("resid_post", 19), sae, [3, 17, 40])
    prompt = features.trace(trace.tokens)
    sums = tj.path_sums(features, prompt, by="source", positions=-1)
    logits = trace.logits[0, -1].double()
    assert sums.labels[:4] == ["20_pre_F3", "20_pre_F17", "20_pre_F40", "20_pre_rest"]
    assert abs(float(sums.effects.sum()) - float(logits.max() - logits.mean())) < 1e-2
