"""TransformerLens' names of streams, writes and sources, wherever a label is taken."""

from __future__ import annotations

import pytest
import torch
import zoo

import tl_jets as tj
from tl_jets.core.labels import is_label, read_label

TOKENS = torch.tensor([[5, 9, 30, 12]])
LAST = zoo.build(zoo.available(["gpt2"])[0]).cfg.n_layers - 1
NAMES = [
    ("hook_embed", "embed"),
    (("embed",), "embed"),
    ("hook_pos_embed", "pos_embed"),
    ("blocks.1.hook_resid_pre", "1_pre"),
    ("blocks.0.hook_resid_mid", "0_mid"),
    ("blocks.0.hook_resid_post", "1_pre"),
    (("resid_post", 0), "1_pre"),
    (("resid_post", -1), "final_post"),
    (("attn_out", 1, None), "1_attn_out"),
    (("mlp_out", -1), f"{LAST}_mlp_out"),
    ("blocks.0.hook_mlp_out", "0_mlp_out"),
]


@pytest.mark.parametrize("spec", zoo.available(["gpt2"]), ids=str)
def test_a_trace_gives_what_a_cache_of_transformer_lens_gives(spec):
    model = zoo.build(spec)
    trace = tj.ResidualNetwork(model).trace(TOKENS)
    _, cache = model.run_with_cache(TOKENS)
    for name, label in NAMES:
        assert torch.equal(trace[name], trace[label]), name
        key = name if isinstance(name, str) else ("embed",) if name[0] == "embed" else name[:2]
        own = cache["hook_embed"] if key == ("embed",) else cache[key]
        assert torch.allclose(trace[name].to(own), own.expand_as(trace[name]), atol=1e-5), name
        assert name in trace


@pytest.mark.parametrize("spec", zoo.available(["gpt2"]), ids=str)
def test_every_function_takes_them(spec):
    network = tj.ResidualNetwork(zoo.build(spec))
    trace = network.trace(TOKENS)
    assert network.stage(("attn_out", 0)) == network.stage("0_attn") == network.stage("blocks.0.hook_resid_pre")
    assert torch.equal(trace.gamma(("mlp_out", 0))(trace["0_mid"]), trace.gamma("0_mlp")(trace["0_mid"]))

    lens = tj.iterative_jet_lens(network, trace, layers=[("resid_mid", 0), ("resid_post", -1), 1])
    assert lens.labels == ["0_mid", "final_post", "1_pre"]
    assert tj.iterative_jet_lens(network, trace, layers=("resid_post", 0)).labels == ["1_pre"]

    jets = tj.jet_expand(network, ("mlp_out", 1), centers=["hook_embed", ("mlp_out", 0)], order=0)
    own = tj.jet_expand(network, "1_mlp", centers=["embed", "0_mlp_out"], order=0)
    assert list(jets(trace)) == list(own(trace))
    assert [str(c.path) for c in tj.jet_expand(network, "ln_final", centers=("mlp_out", 0)).centers] == ["0_mlp_out"]

    hooks = tj.ablation_hooks(network, [("mlp_out", 0), "blocks.1.hook_attn_out"])
    assert [name for name, _ in hooks] == ["blocks.0.hook_mlp_out", "blocks.1.hook_attn_out"]
    named = tj.ablation_effect(network, trace, ("mlp_out", 0))
    assert named.labels == ["0_mlp_out"]
    assert torch.equal(named.logit, tj.ablation_effect(network, trace, "0_mlp").logit)

    jacobian = tj.detached_jacobian(network, trace, output=("mlp_out", 0), wrt="hook_embed")
    assert (jacobian.output, jacobian.wrt) == ("0_mlp_out", "embed")


@pytest.mark.parametrize(
    "name",
    ["blocks.9.attn.hook_z", "blocks.9.hook_mlp_out", "hook_tokens", ("z", 9, "attn"), ("mlp_out", 9), ("mlp_out",)],
)
def test_what_names_no_label_is_refused_with_what_does(name):
    network = tj.ResidualNetwork(zoo.build(zoo.available(["gpt2"])[0]))
    trace = network.trace(TOKENS)
    assert name not in trace
    for read in (network.stage, trace.__getitem__, trace.gamma):
        with pytest.raises(ValueError, match=r"hook_resid_pre.*\('resid_post', -1\)"):
            read(name)


@pytest.mark.parametrize("name", ["blocks.0.attn.hook_z", ("z", 0, "attn")])
def test_what_is_inside_a_block_is_no_stage(name):
    network = tj.ResidualNetwork(zoo.build(zoo.available(["gpt2"])[0]))
    for read in (network.stage, network.trace(TOKENS).gamma):
        with pytest.raises(ValueError, match=r"hook_resid_pre.*\('z', 0\).*Trace"):
            read(name)


def test_a_tuple_of_labels_is_no_label():
    assert not is_label(("0_pre", 3)) and not is_label(("embed", "0_mlp_out")) and is_label(("resid_pre", 3))
    with pytest.raises(TypeError):
        read_label(["mlp_out", 3], 4)  # type: ignore[arg-type]
