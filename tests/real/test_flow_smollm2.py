"""Flow and joint flow on SmolLM2: effects of Hugging Face's own module without a write, closed gaps, the story of FLOW.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tl_jets as tj

pytestmark = pytest.mark.real

EIFFEL, JAPAN = "The Eiffel Tower is in the city of", "The capital of Japan is"
INDUCTION = ["L17H3", "L17H4", "L17H5", "L18H6", "L18H7", "L20H6", "L23H2", "L23H7"]
VARIABLE = "The variable foo_barrel is set. Later the function reads foo_bar"


def centered_change(network, prompt, hooks, answer):
    """By the model's own logits."""
    model = network.view.model
    with torch.no_grad():
        before, after = model(prompt)[0, -1].double(), model.run_with_hooks(prompt, fwd_hooks=hooks)[0, -1].double()
    change = after - before
    return float(change[answer] - change.mean())


@pytest.mark.parametrize(
    ("prompt", "step"), [(EIFFEL, "8_mlp"), (EIFFEL, "5_mlp"), (EIFFEL, "20_mlp"), (JAPAN, "8_mlp")]
)
@pytest.mark.parametrize("spares_the_sink", [True, False])
def test_ablations_are_explained_to_one_percent(network, prompt, step, spares_the_sink):
    length = network.trace(prompt).tokens.shape[1]
    hooks = tj.ablation_hooks(network, step, positions=list(range(1, length)) if spares_the_sink else None)
    found = tj.flow(network, prompt, hooks)
    effect = float(found.effect)
    assert effect == pytest.approx(centered_change(network, prompt, hooks, int(found.target_ids)), abs=1e-3)
    assert bool(found.closed.all()) and float(found.edit.sum()) == pytest.approx(effect, rel=0.01, abs=1e-4)
    assert found.passes < 12


@pytest.mark.parametrize("prompt", [EIFFEL, JAPAN])
def test_an_ablation_that_moves_the_attention_sink_is_explained_too(network, prompt):
    hooks = tj.ablation_hooks(network, "11_mlp")
    found = tj.flow(network, prompt, hooks)
    effect = float(found.effect)
    assert effect == pytest.approx(centered_change(network, prompt, hooks, int(found.target_ids)), abs=1e-3)
    assert effect < -5 and bool(found.closed.all()) and float(found.edit.sum()) == pytest.approx(effect, rel=0.01)
    assert found.passes < 80 and max(found.nodes) >= 32  # a fixed three would not do:
    with pytest.warns(UserWarning, match="1 of 1 effects stay open"):
        assert float(tj.flow(network, prompt, hooks, nodes=3).gap_share) > 0.3


def test_flows_agree_with_path_patching(network):
    hooks = tj.ablation_hooks(network, "5_mlp", positions=range(1, network.trace(EIFFEL).tokens.shape[1]))
    agreement = tj.flow(network, EIFFEL, hooks, check=6).agreement()
    assert int(agreement["mediators"].iloc[0]) == 12
    assert float(agreement["spearman"].iloc[0]) > 0.8 and float(agreement["relative_error"].iloc[0]) < 0.5


def test_an_edge_is_that_of_hugging_face_and_all_components_balance(network, reference):
    hooks = tj.ablation_hooks(network, "5_mlp", positions=range(1, network.trace(EIFFEL).tokens.shape[1]))
    found, model = tj.flow(network, EIFFEL, hooks, edges=True, nodes=4), network.view.model
    answer, effect = int(found.target_ids), float(found.effect)
    balance = found.balance()
    assert balance["gap"].abs().sum() < 0.01 * abs(effect) and len(balance) == 50
    assert float((found.edge_flow.sum(0) - found.flow).abs().max()) < 1e-3 * abs(effect)
    names = ["blocks.29.hook_resid_mid", "blocks.29.hook_resid_post", "blocks.20.hook_mlp_out"]
    with torch.no_grad():
        runs = []
        for own in ([], hooks):
            with model.hooks(fwd_hooks=own):
                runs.append(model.run_with_cache(EIFFEL, names_filter=names)[1])
    last = reference.layers[29]

    def mean_gradient(function, name):
        total = 0.0
        for place, weight in zip(*np.polynomial.legendre.leggauss(4), strict=True):
            before, after = (run[name] for run in runs)
            x = (before + (place + 1) / 2 * (after - before)).requires_grad_(True)
            total = total + weight / 2 * torch.autograd.grad(function(x), x)[0]
        return total

    def target(x):
        logits = reference.hf.lm_head(reference.norm(x))[0, -1]
        return logits[answer] - logits.mean()

    g = mean_gradient(target, names[1])
    read = mean_gradient(lambda x: (g * last.mlp(last.post_attention_layernorm(x))).sum(), names[0])
    change = runs[1][names[2]] - runs[0][names[2]]
    edges = found.edges().set_index(["writer", "reader"])["flow"]
    for reader, covector in (("29_mlp", read), ("ln_final", g)):
        assert edges["20_mlp", reader] == pytest.approx(float((covector * change).sum()), abs=1e-4 * abs(effect))


def test_induction_heads_stand_in_for_each_other(network):
    found = tj.joint_flow(network, VARIABLE, INDUCTION)
    hooks = tj.ablation_hooks(network, INDUCTION)
    effect = centered_change(network, VARIABLE, hooks, int(found.target_ids))
    assert float(found.effect) == pytest.approx(effect, abs=2e-3) and effect == pytest.approx(-17.9, abs=0.1)
    assert bool(found.closed.all()) and float(found.share.sum()) == pytest.approx(effect, rel=2e-3)
    assert float(found.single.sum()) == pytest.approx(-3.8, abs=0.2)  # one by one they seem to do little
    assert float(found.control.abs().max()) < 4  # as many other heads of the same layers
    assert found.share.flatten().argsort().tolist()[:3] == [0, 3, 2]
