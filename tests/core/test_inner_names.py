"""Traces and caches under TransformerLens' names of what is inside a block, compared with `run_with_cache`."""

from __future__ import annotations

import re

import pytest
import torch
import zoo

import tl_jets as tj
from tl_jets.calculus import full_precision

KINDS = (
    "q|k|v|z|rot_q|rot_k|result|pattern|attn_scores|pre|post|mid|pre_linear|scale|normalized|attn_in|mlp_in|[qkv]_input"
)
NAME = re.compile(rf"blocks\.\d+\.([\w.]+\.)?hook_({KINDS})")
SPECS = zoo.available(["gptj", "bloom", "gpt2_attn_result", "llama_split_qkv"])


def same(found, wanted):
    torch.testing.assert_close(found, wanted.to(found), atol=1e-9, rtol=1e-9)


def own_cache(model, tokens):
    with torch.no_grad(), full_precision():
        return model.run_with_cache(tokens)[1]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_trace_has_what_transformer_lens_has(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    trace, own = tj.ResidualNetwork(model).trace(tokens), own_cache(model, tokens)
    names = [name for name in own if NAME.fullmatch(name) and name.startswith("blocks.1.")]
    assert {"blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern", "blocks.1.mlp.hook_post"} <= set(names)
    for name in names:
        same(trace[name], own[name])
        assert name in trace


@pytest.fixture(scope="module", params=zoo.available(["gpt2"]), ids=str)
def run(request):
    model = zoo.build(request.param)
    tokens = zoo.tokens(model)
    return model, tj.ResidualNetwork(model).trace(tokens), own_cache(model, tokens)


def test_short_names_mean_what_they_mean_there(run):
    _, trace, own = run
    for key in [
        ("z", 0, "attn"),
        ("z", -1),
        "q0",
        "pattern1",
        ("attn", 0),
        ("post", 1),
        ("scale", 1, "ln2"),
        "normalized0ln1",
    ]:
        same(trace[key], own[key])
        assert key in trace


def test_results_of_heads_are_z_through_the_output(run):
    model, trace, own = run
    wanted = torch.einsum("bphd,hdm->bphm", own["z", 1].double(), model.blocks[1].attn.W_O.double())
    same(trace["result", 1], wanted)


def test_a_users_hook_is_seen(run):
    model, _, own = run
    tokens = zoo.tokens(model)
    with model.hooks([("blocks.1.attn.hook_z", lambda z, hook: z * 2)]):
        trace = tj.ResidualNetwork(model).trace(tokens)
        same(trace["z", 1], own["z", 1] * 2)
    with pytest.raises(ValueError, match="hooks"):
        trace["z", 1]


@pytest.mark.parametrize("key", [("z", 9), ("nothing", 0), ("z",), "blocks.0.attn.hook_nothing", "z9"])
def test_other_names_are_refused(run, key):
    _, trace, _ = run
    assert key not in trace
    with pytest.raises(ValueError, match=r"z|label"):
        trace[key]


def test_an_activation_that_is_off_is_refused_by_name(run):
    _, trace, _ = run
    if "blocks.0.hook_q_input" not in trace:
        pytest.skip("this TransformerLens has the hook only with its option")
    with pytest.raises((NotImplementedError, ValueError), match="hook_q_input"):
        trace["blocks.0.hook_q_input"]


def test_terms_know_the_run_they_are_of(run):
    model, trace, own = run
    terms = tj.jet_expand(model, "1_mlp", centers=["embed"], order=0)(trace)
    same(terms["z", 0], own["z", 0])
    same(terms["blocks.0.attn.hook_pattern"], own["pattern", 0])
    same(terms["resid_post", 1], terms.stack().sum(0))
    same(terms["resid_mid", 1], trace["1_mid"])
    part = terms.apply_slice_to_batch_dim([1]).apply_slice_to_pos_dim([0, 4])
    same(part["z", 0], own["z", 0][1:2, [0, 4]])
    same(part["post", 0], own["post", 0][1:2, [0, 4]])
    with pytest.raises(ValueError, match=r"cache\.trace"):
        part["pattern", 0]
    with pytest.raises(KeyError, match="No term"):
        terms["z0"]
    with pytest.raises(ValueError, match="nothing"):
        terms["nothing", 0]
