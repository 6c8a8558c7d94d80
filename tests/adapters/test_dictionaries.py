"""Features of dictionaries as steps: numbers by hand, exact sums with the rest, and every tool that takes steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

import tl_jets as tj
from tl_jets.circuits.contrast import parts_of_cut
from tl_jets.circuits.pairs import Pair
from tl_jets.core.network import trace_of

SPECS = [spec for spec in zoo.available(["gpt2", "llama"]) if spec.processing == "raw"]
PROMPTS = ["w3 w4 w5 w9", "w6 w7 w8"]
FEATURES = [2, 7, 5]


def sae(model: Any, kind: str = "relu", size: int = 9) -> Any:
    """A random dictionary with a bias of the encoder and, left to the rest, of the decoder."""
    draw = torch.Generator().manual_seed(0)
    d_model = model.cfg.d_model
    W_enc, W_dec = (torch.randn(size, d_model, generator=draw, dtype=torch.float64) for _ in range(2))
    b_enc, b_dec = (torch.randn(n, generator=draw, dtype=torch.float64) for n in (size, d_model))

    def encode(x: Tensor) -> Tensor:
        before = (x - b_dec) @ W_enc.T + b_enc
        if kind == "topk":
            kept = torch.zeros_like(before).scatter(-1, before.topk(4).indices, 1.0)
            return torch.relu(before) * kept
        return torch.relu(before) if kind == "relu" else before * (before > 1)

    return SimpleNamespace(encode=encode, W_dec=W_dec, b_dec=b_dec)


@pytest.mark.parametrize("write", ["0_mlp_out", "1_attn_out"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_features_are_those_by_hand_and_the_rest_is_what_they_leave(spec, write):
    model = zoo.build(spec)
    own = sae(model)
    network = tj.with_dictionary(model, write, own, FEATURES)
    trace, plain = network.trace(PROMPTS), tj.ResidualNetwork(model).trace(PROMPTS)
    step = write.removesuffix("_out")
    labels = [*(f"{step}_F{feature}_out" for feature in FEATURES), f"{step}_rest_out"]
    assert [label for label in network.components if label.startswith(step)] == labels
    activations = own.encode(plain[write])
    wanted = [activations[..., feature, None] * own.W_dec[feature] for feature in FEATURES]
    wanted.append(plain[write] - sum(wanted))
    for label, value in zip(labels, wanted, strict=True):
        torch.testing.assert_close(trace[label][plain.valid], value[plain.valid], rtol=0, atol=1e-10)
    assert wanted[0].abs().max() > 0.1 < wanted[-1].abs().max()
    # Direct attribution: each feature's row through the frozen final norm, at its activation.
    joint = tj.joint_jet_lens(network, trace, linearize="detached", targets=["w40", "w17"], positions=-1)
    whole = tj.joint_jet_lens(model, plain, linearize="detached", targets=["w40", "w17"], positions=-1)
    parts = torch.stack([joint[label] for label in labels])
    torch.testing.assert_close(parts.sum(0), whole[write], rtol=0, atol=1e-9)
    torch.testing.assert_close(joint.effects.sum(0), whole.effects.sum(0), rtol=0, atol=1e-9)
    decoder = network.decoder
    last = plain.valid.sum(1) - 1
    final = plain["final_post"][range(2), last]
    x = decoder.norm.center(final)
    scale = (x.square().mean(-1) + decoder.norm.eps).rsqrt()
    row = decoder.norm.scale(decoder.norm.center(own.W_dec[FEATURES[0]]))
    logits = (activations[range(2), last, FEATURES[0]] * scale)[:, None] * (row @ decoder.W_U)
    by_hand = logits[:, joint.target_ids[0, 0]] - logits.mean(-1, keepdim=True)
    torch.testing.assert_close(joint[labels[0]][:, 0], by_hand, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["relu", "jump", "topk"])
def test_paths_through_features_are_conserved(kind):
    model = zoo.build(SPECS[0])
    network = tj.with_dictionary(model, ("mlp_out", 0), sae(model, kind), FEATURES)
    trace = network.trace(PROMPTS)
    paths = tj.exponential_expansion(network, linearize="detached")(trace)
    assert paths.relative_remainder < 1e-10
    assert "embed > 0_mlp_F7 > 1_attn > ln_final" in paths.labels and "embed > 0_mlp_rest > ln_final" in paths.labels
    plain = tj.exponential_expansion(tj.ResidualNetwork(model), linearize="detached")(PROMPTS)
    parts = [f"embed > 0_mlp_{part} > 1_attn > ln_final" for part in ("F2", "F7", "F5", "rest")]
    whole = plain["embed > 0_mlp > 1_attn > ln_final"]
    torch.testing.assert_close(sum(paths[part] for part in parts), whole, rtol=0, atol=1e-9)
    sums, before = tj.path_sums(network, trace), tj.path_sums(model, PROMPTS)
    own = [sums.labels.index(part) for part in ("0_mlp_F2", "0_mlp_F7", "0_mlp_F5", "0_mlp_rest")]
    torch.testing.assert_close(
        sums.effects[own].sum(0), before.effects[before.labels.index("0_mlp")], rtol=0, atol=1e-9, equal_nan=True
    )
    torch.testing.assert_close(
        tj.path_sums(network, trace, by="source").effects.sum(0),
        before.effects[0] * 0 + tj.path_sums(model, PROMPTS, by="source").effects.sum(0),
        rtol=0,
        atol=1e-9,
        equal_nan=True,
    )
    avoiding = tj.path_lengths(network, trace, avoiding="mlp")
    torch.testing.assert_close(
        avoiding.effects,
        tj.path_lengths(model, PROMPTS, avoiding="mlp").effects[: len(avoiding.labels)],
        rtol=0,
        atol=1e-9,
        equal_nan=True,
    )


def test_jets_flows_and_contrasts_take_features():
    model = zoo.build(SPECS[0])
    network = tj.with_dictionary(model, "0_mlp_out", sae(model), FEATURES)
    trace = network.trace(PROMPTS)
    cache = tj.jet_expand(network, "1_mlp", centers=["0_mlp_F2_out", "0_mlp_rest_out"], linearize="detached")(trace)
    assert cache.check().passed
    found = tj.flow(network, trace, tj.ablation_hooks(model, "0_attn"))
    plain = tj.flow(model, PROMPTS, tj.ablation_hooks(model, "0_attn"))
    own = [i for i, label in enumerate(found.labels) if label.startswith("0_mlp_")]
    assert len(own) >= 3  # a feature that is off in both runs does not change
    torch.testing.assert_close(found.effect, plain.effect)
    torch.testing.assert_close(
        found.flow[own].sum(0),
        plain.flow[plain.labels.index("0_mlp_out")],
        rtol=0,
        atol=0.02 * float(plain.effect.abs().max()),
    )
    pair = Pair.of(network, PROMPTS[:1], ["w3 w8 w5 w9"], ["w40", "w17"], -1)
    parts = parts_of_cut(pair, "1_pre", True)
    total = sum(values[0] - values[1] for values in parts.values())
    ends = pair.ends()
    torch.testing.assert_close(total, ends["clean"] - ends["corrupted"], rtol=0, atol=1e-9)
    assert any(label.startswith("0_mlp_F7_out @ 2") for label in parts)
    with pytest.raises(NotImplementedError, match="0_mlp_F2 is what no hook point carries alone; edit 0_mlp instead"):
        tj.ablation_effect(network, trace, "0_mlp_F2")
    assert tj.ablation_effect(network, trace).labels == ["0_attn", "1_attn", "1_mlp"]


def test_a_transcoder_reads_the_stream():
    model = zoo.build(SPECS[0])
    own = sae(model)
    network = tj.with_dictionary(model, "1_mlp_out", own, [0, 3], encodes="stream")
    trace = network.trace(PROMPTS)
    wanted = own.encode(trace["1_mid"])[..., 3, None] * own.W_dec[3]
    torch.testing.assert_close(trace["1_mlp_F3_out"], wanted, rtol=0, atol=1e-10)
    assert tj.exponential_expansion(network, linearize="detached")(trace).relative_remainder < 1e-10


@pytest.mark.parametrize("stream", ["1_pre", "final_post"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_features_of_a_stream_are_its_sources(spec, stream):
    """Their values by hand; their effects through all later layers by the detached map of the undivided model."""
    model = zoo.build(spec)
    own, plain = sae(model), tj.ResidualNetwork(model).trace(PROMPTS)
    network = tj.with_dictionary(model, stream, own, FEATURES)
    trace = network.trace(PROMPTS)
    labels = [*(f"{stream}_F{feature}" for feature in FEATURES), f"{stream}_rest"]
    assert network.sources == tuple(labels) and network.streams[0] == stream
    activations = own.encode(plain[stream])
    for feature in FEATURES:
        wanted = activations[..., feature, None] * own.W_dec[feature]
        torch.testing.assert_close(trace[f"{stream}_F{feature}"], wanted, rtol=0, atol=1e-10)
    parts = torch.stack([trace[label] for label in labels])
    assert parts[:-1, plain.valid].abs().max() > 0.1 < parts[-1, plain.valid].abs().max()
    torch.testing.assert_close(parts.sum(0), plain[stream], rtol=0, atol=1e-10)
    options: Any = {"targets": ["w40", "w17"], "positions": -1}
    joint = tj.joint_jet_lens(network, trace, linearize="detached", **options)
    whole = tj.joint_jet_lens(model, plain, linearize="detached", **options)
    before = len(whole.labels) - len(joint.labels) + len(labels)  # the components that the stream is the sum of
    assert whole.labels[before:] == joint.labels[len(labels) :]
    torch.testing.assert_close(joint.effects[len(labels) :], whole.effects[before:], rtol=0, atol=1e-9)
    torch.testing.assert_close(joint.effects[: len(labels)].sum(0), whole.effects[:before].sum(0), rtol=0, atol=1e-9)
    sums = tj.path_sums(network, trace, by="source", **options)
    for row, prompt in enumerate(PROMPTS):
        at = plain.valid[row].sum()
        jacobian = tj.detached_jacobian(model, prompt, wrt=stream, output="logits")
        found = jacobian.apply(parts[:, row : row + 1, :at])
        logits = (found - found.mean(-1, keepdim=True))[:, 0, 0][:, joint.target_ids[row, 0]]
        torch.testing.assert_close(sums.effects[: len(labels), row, 0], logits, rtol=1e-8, atol=1e-8)
        assert float(logits[:-1].abs().max()) > 1e-3
    paths = tj.exponential_expansion(network, linearize="detached")(trace)
    assert paths.relative_remainder < 1e-10 and f"{stream}_F7 > ln_final" in paths.labels


def test_patches_and_flows_of_features_of_a_stream_are_those_of_hooks():
    """Activation patching of a source by a hook on the stream, and flow that leaves nothing out."""
    model = zoo.build(SPECS[0])
    network = tj.with_dictionary(model, ("resid_post", 0), sae(model), FEATURES)
    clean, corrupted = network.trace(PROMPTS[0]), network.trace("w3 w8 w5 w9")
    found = tj.compare_patching(network, clean, corrupted, ["1_pre_F7", "1_pre_rest"], targets=["w40", "w17"], order=1)
    ids = [int(model.tokenizer.encode(word)[-1]) for word in ("w40", "w17")]

    def difference(change: Tensor | float) -> Tensor:
        hooks: Any = [("blocks.1.hook_resid_pre", lambda stream, hook: stream + change)]
        logits = model.run_with_hooks(corrupted.tokens, fwd_hooks=hooks)[0, -1]
        return logits[ids[0]] - logits[ids[1]]

    for i, label in enumerate(found.sites):
        wanted = difference(clean[label] - corrupted[label]) - difference(0.0)
        torch.testing.assert_close(found.change[0, i, 0], wanted, rtol=1e-8, atol=1e-8)
        assert abs(wanted) > 1e-3
    flow = tj.flow(network, clean, tj.ablation_hooks(model, "0_attn"))
    assert {"1_pre_F2", "1_pre_rest", "1_mlp_out"} <= set(flow.labels) and "0_mlp_out" not in flow.labels
    torch.testing.assert_close(flow.effect, tj.flow(model, PROMPTS[0], tj.ablation_hooks(model, "0_attn")).effect)
    assert tj.flow(
        tj.with_dictionary(model, "final_post", sae(model), 2), PROMPTS[0], tj.ablation_hooks(model, "0_attn")
    )


def test_a_hook_on_a_divided_stream_is_a_source_beside_the_rest():
    model = zoo.build(SPECS[0])
    network = tj.with_dictionary(model, "1_pre", sae(model), FEATURES)
    edit = "blocks.1.hook_resid_pre"
    with network.view.model.hooks(fwd_hooks=[(edit, lambda stream, hook: 1.5 * stream)]):
        trace = network.trace(PROMPTS)
        parts = [trace[label] for label in (*network.sources, f"edit:{edit}")]
        torch.testing.assert_close(sum(parts), trace["1_pre"], rtol=0, atol=1e-10)
        torch.testing.assert_close(parts[-1], trace["1_pre"] / 3, rtol=0, atol=1e-10)
        assert tj.exponential_expansion(network, linearize="detached")(trace).relative_remainder < 1e-10
        assert tj.exponential_expansion(model, linearize="detached")(trace).relative_remainder < 1e-10


def test_dictionaries_go_together_and_their_traces_hold_the_whole_model():
    model = zoo.build(SPECS[0])
    own, other = sae(model), sae(model, "jump")
    network = tj.with_dictionary(model, "1_mlp_out", own, [1, 2])
    network = tj.with_dictionary(tj.with_dictionary(network, "1_pre", own, [3]), "1_attn_out", other, 0)
    parts = [
        "1_pre_F3",
        "1_pre_rest",
        "1_attn_F0_out",
        "1_attn_rest_out",
        "1_mlp_F1_out",
        "1_mlp_F2_out",
        "1_mlp_rest_out",
    ]
    assert network.components == tuple(parts)
    plain, trace = tj.ResidualNetwork(model).trace(PROMPTS), network.trace(PROMPTS)
    torch.testing.assert_close(sum(trace[part] for part in parts), plain["final_post"], rtol=0, atol=1e-10)
    assert tj.exponential_expansion(network, linearize="detached")(trace).relative_remainder < 1e-10
    for cache in (tj.to_activation_cache(trace), tj.to_activation_cache(trace.freeze())):
        wanted = tj.to_activation_cache(plain)
        assert set(cache.keys()) == set(wanted.keys())
        assert all(torch.equal(cache[name], wanted[name]) for name in wanted)
    torch.testing.assert_close(trace["post", 1], plain["post", 1])
    with pytest.raises(
        NotImplementedError, match=r"blocks\.0\.attn.hook_z is before the stream at which this network starts"
    ):
        trace["z", 0]
    # A trace serves the model, and other networks of these dictionaries only: features of others have the same labels.
    trace_of(tj.ResidualNetwork(model), trace), trace_of(network.at("head"), trace)
    same = tj.with_dictionary(tj.with_dictionary(model, "1_pre", own, [3]), "1_mlp_out", own, [1, 2])
    for wrong in (plain, same.trace(PROMPTS)):
        with pytest.raises(ValueError, match="of the same model and dictionaries; this one is of others"):
            tj.joint_jet_lens(network, wrong)
    with pytest.raises(ValueError, match="A network starts at one stream, 1_pre here; got 'final_post'"):
        tj.with_dictionary(network, "final_post", own, 2)
    with pytest.raises(ValueError, match=r"starts at 1_pre has nothing before it; \['0_mlp_F2', '0_mlp_rest'\] are"):
        tj.with_dictionary(tj.with_dictionary(model, "0_mlp_out", own, 2), "1_pre", own, 2)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_dictionary_is_refused():
    model = zoo.build(SPECS[0])
    own = sae(model)
    for wrong in ([], [2, 2], [9], [-1]):
        with pytest.raises(ValueError, match=r"different rows of W_dec \[feature, 24\]; got .* of \[9, 24\]"):
            tj.with_dictionary(model, "0_mlp_out", own, wrong)
    with pytest.raises(
        ValueError, match=r"the write of an attention or MLP, .*, or a stream, '0_pre', .*; got 'embed'"
    ):
        tj.with_dictionary(model, "embed", own, 2)
    with pytest.raises(NotImplementedError, match="of hook_resid_pre or hook_resid_post; got '1_mid', inside a block"):
        tj.with_dictionary(model, "1_mid", own, 2)
    with pytest.raises(TypeError, match="must have encode and W_dec; got Tensor"):
        tj.with_dictionary(model, "0_mlp_out", own.W_dec, 2)
    with pytest.raises(ValueError, match="no chosen neurons"):
        tj.with_dictionary(tj.ResidualNetwork(model, neurons="L0N3"), "0_mlp_out", own, 2)
    with pytest.raises(ValueError, match="At granularity 'head' 0_attn_out is no single write"):
        tj.with_dictionary(tj.ResidualNetwork(model, "head"), "0_attn_out", own, 2)
    short = SimpleNamespace(encode=lambda x: x[..., :3], W_dec=own.W_dec)
    with pytest.raises(
        ValueError, match=r"an activation for each of the 9 rows of W_dec, \[2, 5, 9\] here; got \[2, 5, 3\]"
    ):
        tj.with_dictionary(model, "0_mlp_out", short, 2).trace(PROMPTS)["0_mlp_F2_out"]
