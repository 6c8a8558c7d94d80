"""Tools inside `torch.inference_mode()`, of texts and of traces made there: the same numbers as outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo

import tl_jets as tj

OTHER = zoo.tokens(zoo.build(zoo.available(["llama"])[0]), 2, 6, seed=4)
TOOLS: dict[str, Callable[[Any, Any], Any]] = {
    "lens": lambda net, x: tj.iterative_jet_lens(net, x).measures.kl,
    "joint lens": lambda net, x: tj.joint_jet_lens(net, x, linearize="detached").effects,
    "paths": lambda net, x: tj.exponential_expansion(net, linearize="detached")(x, positions=-1).logit_attrs(targets=3),
    "sums": lambda net, x: tj.path_sums(net, x, targets=3).effects,
    "flow": lambda net, x: tj.flow(net, x, tj.ablation_hooks(net, "0_mlp"), targets=3).flow,
    "edges": lambda net, x: tj.flow(net, x, tj.ablation_hooks(net, "0_mlp"), targets=3, edges=True).edge_flow,
    "joint flow": lambda net, x: tj.joint_flow(net, x, ["0_mlp", "0_attn"], targets=3, controls=0).share,
    "ablations": lambda net, x: tj.ablation_effect(net, x, order=2, targets=3).coefficients,
    "first order": lambda net, x: tj.first_order_effects(net, x, targets=3).effect,
    "map": lambda net, x: tj.detached_jacobian(net, x).contributions,
    "spectra": lambda net, x: tj.detached_spectra(net, x, k=2).values,
    "edges' attribution": lambda net, x: torch.tensor(
        [score for *_, score in tj.attribution_patching(net, x, OTHER, targets=[3, 4]).edges]
    ),
    "contrast": lambda net, x: tj.contrast(net, x, OTHER, by="write_token", targets=[3, 4]).clean,
    "path ablation": lambda net, x: tj.path_ablation(net, x, ["embed > 0_mlp"], targets=3).centered,
}


@pytest.mark.parametrize("name", TOOLS)
def test_inference_mode_changes_nothing(name):
    network = tj.ResidualNetwork(zoo.build(zoo.available(["gpt2"])[0]))
    tool, tokens = TOOLS[name], zoo.tokens(network.view.model, 1 if name == "spectra" else 2, 6, seed=2)
    wanted = tool(network, tokens)
    with torch.inference_mode():
        made_there = network.trace(tokens.clone())
        found = [tool(network, tokens), tool(network, made_there)]
    for values in (*found, tool(network, made_there)):
        torch.testing.assert_close(values, wanted, rtol=1e-9, atol=1e-11, equal_nan=True)
