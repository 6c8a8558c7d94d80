"""Neurons against activations by hand, weights of the Hugging Face checkpoint, overwritten streams and edited weights."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
import zoo
from torch import Tensor

from tl_jets import CallableModel, Decoder, Norm, ResidualNetwork, Stage, exponential_expansion, jet_expand
from tl_jets.calculus import full_precision, jet
from tl_jets.core.frozen_network import FrozenNetwork
from tl_jets.core.selection import Rows
from tl_jets.interventions.ablation_effects import ablation_effect
from tl_jets.interventions.hooks import ablation_hooks, patch_hooks, without_path
from tl_jets.paths.component_interactions import interactions
from tl_jets.paths.reorganized import reorganized_expansion

TOLERANCE = 1e-10
FAMILIES = [
    spec
    for spec in zoo.available(zoo.CORE) + [s for s in zoo.available(zoo.EXTRA) if s.processing == "raw"]
    if spec.name != "attn_only" and (spec.world, spec.name) != ("bridge", "opt")
]
RAW = [spec for spec in FAMILIES if spec.processing == "raw"]
# Gains of norms after the MLP.
POST_NORMS = {
    "gemma2": lambda layer: 1 + layer.post_feedforward_layernorm.weight,
    "gemma3": lambda layer: 1 + layer.post_feedforward_layernorm.weight,
    "olmo2": lambda layer: layer.post_feedforward_layernorm.weight,
}


def named(*names: str) -> list[zoo.ModelSpec]:
    return [spec for spec in RAW if spec.name in names]


def activations(model: Any, tokens: Tensor, layer: int = 1, stream: str = "", value: Tensor | None = None) -> Tensor:
    """What reaches W_out, as a user reads it; with a stream overwritten if one is given."""
    found: list[Tensor] = []
    hooks: list = [(f"blocks.{layer}.mlp.hook_post", lambda tensor, hook: found.append(tensor))]
    if value is not None:
        hooks.append((f"blocks.{layer}.hook_resid_{stream}", lambda tensor, hook: value))
    with torch.no_grad(), full_precision(), model.hooks(hooks):
        model(tokens)
    return found[-1]


@pytest.mark.parametrize("spec", FAMILIES, ids=str)
def test_all_neurons_and_the_bias_sum_to_the_mlps_write(spec):
    """Left-padded where the model takes that in float64. The bias is not made from the sum (see the next tests)."""
    model = zoo.build(spec)
    tokens, mask = zoo.padded(model)
    padded = (spec.world, spec.name) not in {(s.world, s.name) for s in zoo.NAN_UNDER_LEFT_PADDING}
    network = ResidualNetwork(model)
    trace = network.trace(tokens, attention_mask=mask if padded else None)
    keep = trace.valid
    for layer in (0, 1):
        labels = [f"L{layer}N{i}" for i in range(len(model.blocks[layer].mlp.W_out))]
        steps = [network.view.fine_step(label) for label in [*labels, f"{layer}_mlp_bias"]]
        writes = trace.writes(Stage(network.stage(f"{layer}_mlp").stream, tuple(steps)))
        assert oracles.relative_error(writes.sum(0)[keep], trace[f"{layer}_mlp_out"][keep]) < TOLERANCE
        assert torch.equal(writes[17][keep], trace[f"L{layer}N17_out"][keep])
        assert torch.equal(writes[-1][keep], trace[f"{layer}_mlp_bias"][keep])
        assert float(writes[:-1, keep].norm(dim=-1).mean(1).median()) > 1e-2, "neurons write something"


@pytest.mark.parametrize("spec", RAW, ids=str)
def test_a_neuron_is_its_activation_times_its_row(spec):
    """By hand from what a user reads at hook_post, with the post-norm's scale taken of the whole output."""
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    trace = ResidualNetwork(model).trace(tokens)
    mlp = model.blocks[1].mlp
    post, W_out = activations(model, tokens), mlp.W_out
    b_out = getattr(mlp, "b_out", None)
    b_out = torch.zeros_like(W_out[0]) if b_out is None else b_out
    share = lambda part: part  # noqa: E731
    if spec.name in POST_NORMS or spec.name == "sandwich":
        if spec.world == "hooked" and spec.name != "olmo2":  # which rounds Gemma's 1 + w to float32
            gain, eps = model.blocks[1].ln2_post.w, 1e-3 if spec.name == "sandwich" else model.cfg.eps
        else:
            gain = POST_NORMS[spec.name](zoo.hf_model(spec.name).model.layers[1])
            eps = zoo.HF_CONFIGS[spec.name][1].get("rms_norm_eps", 1e-6)
        out = post @ W_out + b_out
        share = lambda part: part / torch.sqrt((out * out).mean(-1, keepdim=True) + eps) * gain  # noqa: E731
    if spec.name == "granite":
        share = lambda part: 0.6 * part  # noqa: E731
    for n in (0, 17, 51):
        wanted = share(post[..., n, None] * W_out[n])
        assert oracles.relative_error(trace[f"L1N{n}_out"], wanted) < TOLERANCE
    bias = trace["1_mlp_bias"]
    wanted = share(b_out.expand(*tokens.shape, -1))
    assert oracles.relative_error(bias, wanted) < TOLERANCE
    assert (float(bias.abs().max()) > 0.01) == bool(b_out.any())


@pytest.mark.parametrize("world", sorted({spec.world for spec in RAW}))
def test_the_bias_is_the_checkpoints(world):
    hf = zoo.hf_model("gpt2")
    trace = ResidualNetwork(zoo.build(zoo.ModelSpec("gpt2", world, "raw"))).trace(torch.tensor([[4, 5]]))
    wanted = hf.transformer.h[1].mlp.c_proj.bias.expand(1, 2, -1)
    assert oracles.relative_error(trace["1_mlp_bias"], wanted) < TOLERANCE


@pytest.mark.skipif(zoo.HookedTransformer is None, reason="the bridge has no such family to put a LayerNorm into")
def test_the_bias_of_a_norm_after_the_mlp_belongs_to_the_mlps():
    from transformer_lens.components import LayerNorm

    model = zoo.fresh(zoo.ModelSpec("sandwich", "hooked", "raw"))
    for block in model.blocks:
        block.ln2_post = LayerNorm(model.cfg).eval()
    zoo.randomize(model)
    model.setup()
    model.requires_grad_(False)
    trace = ResidualNetwork(model).trace(zoo.tokens(model))
    post, mlp, norm = activations(model, trace.tokens), model.blocks[1].mlp, model.blocks[1].ln2_post
    out = post @ mlp.W_out + mlp.b_out
    deviation = out - out.mean(-1, keepdim=True)
    scale = torch.sqrt(deviation.pow(2).mean(-1, keepdim=True) + model.cfg.eps)
    wanted = (mlp.b_out - mlp.b_out.mean()) / scale * norm.w + norm.b
    assert oracles.relative_error(trace["1_mlp_bias"], wanted) < TOLERANCE
    part = post[..., 17, None] * mlp.W_out[17]
    wanted = (part - part.mean(-1, keepdim=True)) / scale * norm.w
    assert oracles.relative_error(trace["L1N17_out"], wanted) < TOLERANCE


def test_neurons_are_known_and_not_listed(monkeypatch):
    model = zoo.build(zoo.ModelSpec("gpt2", "bridge", "raw"))
    network = ResidualNetwork(model)
    trace = network.trace(zoo.tokens(model))
    assert not any("N" in label for label in network.labels) and "L1N3_out" in network and "1_mlp_bias" in network
    assert "L1N52_out" not in network and "L1N52_out" not in trace
    assert "L1N3_out" in trace and "L1N3" not in trace and "L7N3_out" not in trace and "nonsense" not in trace
    calls = []
    view = network.view
    whole = view.call_mlp
    monkeypatch.setattr(view, "call_mlp", lambda *args: calls.append(args[1]) or whole(*args))
    assert trace["L1N3_out"] is not None and set(calls) == {1}
    n_calls = len(calls)
    assert trace["L1N3_out"].shape == trace["1_mlp_out"].shape and len(calls) == n_calls, "evaluated once"
    assert trace["L1N4_out"] is not None and len(calls) == n_calls + 1, "checked once"


@pytest.mark.parametrize("spec", named("gpt2", "pythia", "llama", "gemma2", "olmo2", "solu_ln"), ids=str)
def test_a_neuron_elsewhere_and_its_jets(spec):
    """Another stream by overwriting it in a run of the whole model; jets by nested differentiation."""
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=2, pos=4)
    network = ResidualNetwork(model)
    trace = network.trace(tokens)
    stream = network.stage("1_mlp").stream
    center, variate = trace["0_pre"], trace[stream]
    gamma = trace.gamma("L1N5")
    if spec.name not in ("gemma2", "olmo2"):  # whose share has the post-norm's scale
        kind = stream.split("_")[1]
        post = activations(model, tokens, 1, kind, 2 * center)
        assert oracles.relative_error(gamma(2 * center), post[..., 5, None] * model.blocks[1].mlp.W_out[5]) < TOLERANCE
    found = jet(gamma, center, variate, 2).coefficients
    with full_precision():
        wanted = oracles.nested_jvp_coefficients(gamma, center, variate - center, 2)
    assert oracles.relative_error(found, wanted) < TOLERANCE and float(found[2].abs().max()) > 1e-6


# Neurons as steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", named("gpt2", "pythia", "llama", "gemma2", "olmo2", "phi3", "granite"), ids=str)
def test_chosen_neurons_are_steps_of_exact_paths(spec):
    """All detached paths sum to the model; those through a neuron of the last MLP, to what it wrote, decoded."""
    model = zoo.build(spec)
    last = len(model.blocks) - 1
    chosen = [f"L{last}N5", "L0N3", f"L{last}N50"]
    network = ResidualNetwork(model, neurons=chosen)
    trace = network.trace(zoo.tokens(model, batch=2, pos=5))
    total = sum(trace[label] for label in network.components)
    assert oracles.relative_error(total, trace["final_post"]) < TOLERANCE
    rest = trace[f"{last}_mlp_rest_out"] + trace[f"L{last}N5_out"] + trace[f"L{last}N50_out"]
    assert oracles.relative_error(rest, trace[f"{last}_mlp_out"]) < TOLERANCE
    assert oracles.relative_error(trace["L0N3_out"], ResidualNetwork(model).trace(trace.tokens)["L0N3_out"]) < 1e-12
    every = exponential_expansion(network, linearize="detached", max_paths=20000)
    paths = every(trace, positions=[-1])
    assert paths.check().sum_error < TOLERANCE
    step = f"L{last}N5"
    through = sum(term for label, term in paths.items() if f"> {step} >" in label or label.startswith(f"{step}_bias"))
    wanted = FrozenNetwork.of(trace).decode(trace[f"{step}_out"][None], Rows.of(trace, [-1]))[0]
    assert oracles.relative_error(through, wanted) < TOLERANCE
    only = exponential_expansion(network, linearize="detached", through=["L0N3", step], sources="embed")
    assert all("> L0N3 >" in str(path) and f"> {step} >" in str(path) for path in only) and only.count > 0


def test_labels_granularities_and_repr_with_neurons():
    model = zoo.build(zoo.ModelSpec("pythia", "bridge", "raw"))
    network = ResidualNetwork(model, "head", neurons=["L1N7", "L1N2", "L1N7"])
    labels = [step.label for step in network.stages[1].steps]
    assert labels == ["L1H0", "L1H1", "L1H2", "L1H3", "1_attn_bias", "L1N7", "L1N2", "1_mlp_rest"]
    assert "L1N7_out" in network.labels and "1_mlp_rest_out" in network.components
    sublayer = network.at("sublayer")
    assert [step.label for step in sublayer.stages[1].steps] == ["1_attn", "L1N7", "L1N2", "1_mlp_rest"]
    assert network.at("block").neurons == () and sublayer.stage("L1N2_out") is sublayer.stages[1]
    trace = network.trace(zoo.tokens(model))
    assert oracles.relative_error(trace["L1N2_out"], sublayer.trace(trace.tokens)["L1N2_out"]) < 1e-12
    assert oracles.relative_error(trace["L0N2_out"], sublayer.trace(trace.tokens)["L0N2_out"]) < 1e-12


@pytest.mark.parametrize("spec", named("gpt2", "llama"), ids=str)
def test_neurons_are_centers(spec):
    model = zoo.build(spec)
    network = ResidualNetwork(model)
    trace = network.trace(zoo.tokens(model))
    neuron = "L0N5_out"
    terms = jet_expand(network, "1_mlp", centers=["embed", neuron], order=1)(trace)
    post, h = activations(model, trace.tokens, layer=0), trace["1_mid"]
    center = post[..., 5, None] * model.blocks[0].mlp.W_out[5]
    wanted = jet(trace.gamma("1_mlp"), center, h, 1).value / 2
    assert oracles.relative_error(terms["L0N5_out > 1_mlp"], wanted) < TOLERANCE
    found = reorganized_expansion(network, "1_mlp", centers=["embed", neuron])(trace)
    assert found.check().passed and "L0N5_out > 1_mlp" in found
    pairs = interactions(network, trace, centers=["embed", neuron, "1_mlp_bias"])
    assert pairs.labels == ["embed", "L0N5_out", "1_mlp_bias", "rest"]
    # Chosen neurons are components by themselves.
    chosen = ResidualNetwork(network, neurons="L0N5")
    every = interactions(chosen, trace.tokens)
    assert every.labels[-1] == "rest" and "L0N5_out" in every.labels and "0_mlp_rest_out" in every.labels
    assert float(every.matrix[-1].abs().max()) < 1e-9
    assert reorganized_expansion(chosen, "1_attn")(trace.tokens).check().passed


# Interventions ---------------------------------------------------------------------------------------------------------


def edited(name: str, hf: Any, layer: int, neuron: int) -> None:
    if name == "gpt2":
        hf.transformer.h[layer].mlp.c_proj.weight[neuron] = 0
    elif name == "pythia":
        hf.gpt_neox.layers[layer].mlp.dense_4h_to_h.weight[:, neuron] = 0
    else:
        hf.model.layers[layer].mlp.down_proj.weight[:, neuron] = 0


def logits(model: Any, tokens: Tensor, hooks: Any = ()) -> Tensor:
    with full_precision():
        return model.run_with_hooks(tokens, fwd_hooks=list(hooks))


@pytest.mark.parametrize("spec", named("gpt2", "pythia", "llama", "gemma2", "olmo2", "phi3"), ids=str)
def test_zero_ablation_is_the_checkpoint_without_the_neurons_row(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    hf = zoo.hf_model(spec.name)
    edited(spec.name, hf, 1, 17)
    edited(spec.name, hf, 0, 3)
    with full_precision():
        wanted = hf(tokens).logits
    found = logits(model, tokens, ablation_hooks(model, ["L1N17", "L0N3_out"]))
    # HookedTransformer's rotary tables are float32: its clean logits are as far from the checkpoint's.
    rotary = spec.world == "hooked" and spec.name != "gpt2"
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6 if rotary else 1e-10)
    clean = logits(model, tokens)
    assert float((found - clean).abs().max()) > 1e-3
    effect = ablation_effect(model, tokens, ["L1N17"])
    one = logits(model, tokens, ablation_hooks(model, "L1N17"))
    best = clean[:, -1].argmax(-1, keepdim=True)
    cap = getattr(hf.config, "final_logit_softcapping", None)
    if cap is not None:  # effects are in logits before the softcap
        one, clean = (cap * torch.atanh(x / cap) for x in (one, clean))
    wanted = (one - clean)[:, -1].gather(-1, best)
    torch.testing.assert_close(effect.logit[0, :, 0], wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("spec", named("gpt2", "llama"), ids=str)
def test_mean_resample_and_patch_by_hand(spec):
    model = zoo.build(spec)
    tokens, other = zoo.tokens(model), zoo.tokens(model, seed=9)
    there = activations(model, other)[..., 17]
    point = "blocks.1.mlp.hook_post"

    def put(value: Tensor) -> Any:
        def hook(tensor: Tensor, hook: Any) -> Tensor:
            tensor = tensor.clone()
            tensor[..., 17] = value
            return tensor

        return [(point, hook)]

    cases = {
        "mean": (ablation_hooks(model, "L1N17", mode="mean", reference=other), put(there.mean())),
        "patch": (patch_hooks(model, "L1N17", other), put(there)),
    }
    for name, (hooks, by_hand) in cases.items():
        assert oracles.relative_error(logits(model, tokens, hooks), logits(model, tokens, by_hand)) < 1e-12, name
    rows = torch.randint(3, (3,), generator=torch.Generator().manual_seed(4))
    found = logits(model, tokens, ablation_hooks(model, "L1N17", mode="resample", reference=other, seed=4))
    assert oracles.relative_error(found, logits(model, tokens, put(there[rows]))) < 1e-12
    trace = ResidualNetwork(model).trace(other)
    some = logits(model, tokens, patch_hooks(model, ["L1N17", "L1N2"], trace, positions=[-1]))
    assert torch.equal(some[:, :-1], logits(model, tokens)[:, :-1]) and not torch.equal(some, logits(model, tokens))


def test_a_path_through_a_neuron_is_removed_where_it_arrives():
    model = zoo.build(zoo.ModelSpec("llama", "bridge", "raw"))
    tokens = zoo.tokens(model)
    path = "embed > L0H1 > L1N17"
    hooks = without_path(model, tokens, path)
    network = ResidualNetwork(model, "head", neurons="L1N17")
    term = exponential_expansion(
        network, linearize="detached", through=["L0H1", "L1N17"], max_length=2, sources="embed"
    )
    vector = term(tokens)[f"{path} > ln_final"]
    trace = network.trace(tokens)
    scale = torch.rsqrt(trace["final_post"].pow(2).mean(-1, keepdim=True) + 1e-3) * network.decoder.norm.weight
    last = torch.randn(trace["final_post"].shape, dtype=torch.float64)
    assert oracles.relative_error((last - hooks[0][1](last)) * scale, vector) < TOLERANCE


# What is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_refused():
    spec = zoo.ModelSpec("gpt2", "bridge", "raw")
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    trace = ResidualNetwork(model).trace(tokens)
    with pytest.raises(ValueError, match=r"Neurons of layer 1 are numbered 0\.\.51; got 'L1N52_out'"):
        trace["L1N52_out"]
    with pytest.raises(ValueError, match="A label must be one of"):
        trace["L1N3"]
    for neurons, granularity in (
        ("1_mlp", "sublayer"),
        ("L1N3", "block"),
        ("L1N3_out", "head"),
        ("1_mlp_bias", "head"),
    ):
        with pytest.raises(ValueError, match="neurons must be labels such as"):
            ResidualNetwork(model, granularity, neurons)
    with pytest.raises(NotImplementedError, match="1_mlp_bias is what no hook point carries alone; edit 1_mlp"):
        ablation_hooks(model, "1_mlp_bias")
    with pytest.raises(NotImplementedError, match="1_mlp_rest is what no hook point"):
        ablation_hooks(ResidualNetwork(model, neurons="L1N3"), "1_mlp_rest")
    with pytest.raises(NotImplementedError, match="a neuron's one"):
        patch_hooks(model, "L1N3", {"L1N3": torch.zeros(3, 7, 24)})
    with pytest.raises(ValueError, match="A label must be one of"):
        ResidualNetwork(zoo.build(zoo.ModelSpec("attn_only", "bridge", "raw"))).trace(tokens)["L1N3_out"]
    decoder = Decoder(Norm("RMS"), torch.randn(4, 7), torch.zeros(7))
    with pytest.raises(ValueError, match="neurons must be labels"):
        ResidualNetwork(CallableModel(torch.nn.Embedding(5, 4), [{"0_mlp": torch.tanh}], decoder), neurons="L0N1")


def test_neurons_that_do_not_sum_to_the_write_are_refused(monkeypatch):
    """A hook on the MLP's output, an MLP without the hook point, one without W_out: each by name."""
    model = zoo.fresh(zoo.ModelSpec("gpt2", "bridge", "raw"))
    tokens = zoo.tokens(model)
    network = ResidualNetwork(model)
    with model.hooks([("blocks.1.hook_mlp_out", lambda tensor, hook: tensor * 1.01)]):
        trace = network.trace(tokens)
        with pytest.raises(
            NotImplementedError, match=r"block 1 of .* all neurons and b_out are off .* Take the whole MLP"
        ):
            trace["L1N3_out"]
        assert float(trace["L0N3_out"].norm()) > 0
    assert float(network.trace(tokens)["L1N3_out"].norm()) > 0
    other = ResidualNetwork(model)
    trace = other.trace(tokens)
    monkeypatch.setattr(model, "hooks", lambda hooks: full_precision())
    with pytest.raises(NotImplementedError, match=r"blocks\.1\.mlp\.hook_post never fired"):
        trace["L1N3_out"]
    monkeypatch.undo()
    monkeypatch.setattr(type(model.blocks[0].mlp), "W_out", None, raising=False)
    with pytest.raises(NotImplementedError, match="has no W_out"):
        trace["L1N3_out"]


def test_half_precision_and_left_padding():
    spec = zoo.ModelSpec("llama", "bridge", "raw")
    exact, model = zoo.build(spec, torch.float32), zoo.fresh(spec, torch.bfloat16)
    ids, mask = zoo.padded(model)
    fine = ResidualNetwork(exact).trace(ids, attention_mask=mask)
    rough = ResidualNetwork(model).trace(ids, attention_mask=mask)
    keep = fine.valid
    assert rough["L1N17_out"].dtype is torch.float32
    assert oracles.relative_error(rough["L1N17_out"][keep], fine["L1N17_out"][keep]) < 0.05
    row = ids[1][mask[1].bool()][None]
    alone = ResidualNetwork(exact).trace(row)
    assert oracles.relative_error(alone["L1N17_out"][0], fine["L1N17_out"][1][keep[1]]) < 1e-5
