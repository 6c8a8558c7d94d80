"""Joint flow against sums over every order of ablation (Shapley values of a bilinear function) and hooks by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo

import tl_jets as tj
from tl_jets.calculus import full_precision

PROMPT = "This function is available on Unix and"


def models(*names, processing="raw"):
    return [spec for spec in zoo.available(list(names)) if spec.processing == processing]


def value(model, tokens, hooks, token):
    with full_precision():
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1]
    return logits[:, token] - logits.mean(-1)


def scaled(name, part, factor):
    def hook(write, hook):
        kept = torch.ones_like(write)
        kept[part] = factor
        return write * kept

    return name, hook


@pytest.mark.parametrize("spec", models("llama", "pythia", "gpt2"), ids=str)
def test_shares_are_integrals_of_derivatives_along_the_sets_own_path(spec):
    """Central differences of the model under hand-written doses, at numpy's nodes. (Heads of Llama only: others keep constants.)"""
    model, token, step = zoo.build(spec), 5, 1e-5
    tokens = zoo.tokens(model, batch=2)
    all_of = (slice(None),)
    sites = {"0_mlp": ("blocks.0.hook_mlp_out", all_of), "1_attn": ("blocks.1.hook_attn_out", all_of)}
    if spec.name == "llama":
        sites["L0H1"] = ("blocks.0.attn.hook_z", (slice(None), slice(None), 1))

    def at(doses):
        return value(model, tokens, [scaled(*sites[label], 1 - dose) for label, dose in doses.items()], token)

    found = tj.joint_flow(model, tokens, list(sites), targets=token, tolerance=1e-4, controls=1)
    assert bool(found.closed.all()) and found.effect.shape == (2, 1, 1)
    effect = at(dict.fromkeys(sites, 1.0)) - at(dict.fromkeys(sites, 0.0))
    assert torch.allclose(found.effect[:, 0, 0], effect, atol=1e-9)
    assert torch.allclose(found.share.sum(0), found.effect, rtol=1e-4)
    places, weights = np.polynomial.legendre.leggauss(found.nodes)
    for label, share, single, gradient in zip(sites, found.share, found.single, found.gradient, strict=True):

        def slope(t, label=label):
            up, down = (at(dict.fromkeys(sites, t) | {label: t + sign * step}) for sign in (1, -1))
            return (up - down) / (2 * step)

        wanted = sum(w / 2 * slope((x + 1) / 2) for x, w in zip(places, weights, strict=True))
        assert torch.allclose(share[:, 0, 0], wanted, atol=1e-6), label
        assert torch.allclose(gradient[:, 0, 0], slope(0.0), atol=1e-6)
        assert torch.allclose(single[:, 0, 0], at({label: 1.0}) - at({label: 0.0}), atol=1e-9)
    assert not torch.allclose(found.share, found.single, atol=1e-3)


@pytest.mark.parametrize("spec", models("llama"), ids=str)
def test_controls_are_other_components_of_the_same_layers(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=1)
    found = tj.joint_flow(model, tokens, ["L0H1", "1_mlp", "L1N3"], targets=5, controls=4, seed=1)
    for own, effect in zip(found.control_labels, found.control, strict=True):
        assert (
            own[0].startswith("L0H") and own[0] != "L0H1" and own[1] in ("0_mlp", "2_mlp") and own[2].startswith("L1N")
        )
        together = tj.ablation_hooks(model, own)
        wanted = value(model, tokens, together, 5) - value(model, tokens, [], 5)
        assert torch.allclose(effect[:, 0, 0], wanted, atol=1e-9)
    again = tj.joint_flow(model, tokens, ["L0H1", "1_mlp", "L1N3"], targets=5, controls=4, seed=1)
    assert again.control_labels == found.control_labels and torch.equal(again.share, found.share)
    with pytest.raises(ValueError, match="none is left beside"):
        tj.joint_flow(model, tokens, ["0_mlp", "1_mlp"], targets=5)
    few = tj.joint_flow(model, tokens, ["L0H1", "L0H2", "L0H3"], targets=5, controls=0)
    assert few.control_labels == []
    pair = tj.joint_flow(
        model, tokens, ["L0H1", "L0H2"], targets=5, controls=6
    )  # two others: one set, in whatever order
    assert [sorted(own) for own in pair.control_labels] == [["L0H0", "L0H3"]] and len(pair.control) == 1
    with pytest.raises(ValueError, match="none is left beside L0H2"):
        tj.joint_flow(model, tokens, ["L0H1", "L0H2", "L0H3"], targets=5)
    assert tj.joint_flow(model, tokens, ["0_mlp", "1_mlp"], targets=5, controls=0).control.shape == (0, 1, 1, 1)


@pytest.mark.parametrize("spec", models("llama"), ids=str)
def test_modes_positions_and_targets_are_those_of_ablations(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=2)
    options = {"mode": "mean", "reference": tokens}
    found = tj.joint_flow(model, tokens, ["0_mlp", "L1H0"], targets=5, controls=0, ablated_positions=-2, **options)
    hooks = tj.ablation_hooks(model, ["0_mlp", "L1H0"], positions=-2, **options)
    wanted = value(model, tokens, hooks, 5) - value(model, tokens, [], 5)
    assert torch.allclose(found.effect[:, 0, 0], wanted, atol=1e-9)
    difference = tj.joint_flow(model, tokens, ["0_mlp"], targets=5, against=9, positions=[2, -1], controls=1)
    both = tj.joint_flow(model, tokens, ["0_mlp"], targets=[5, 9], positions=[2, -1], controls=1)
    assert torch.allclose(difference.share[..., 0], both.share[..., 0] - both.share[..., 1], atol=1e-3)
    assert difference.share.shape == (1, 2, 2, 1) and difference.unit == "logits"


def test_results_say_what_they_are(tmp_path):
    model = tj.load_tinydocs()
    found = tj.joint_flow(model, PROMPT, ["L0H1", "L1H2"], controls=2)
    assert "2 components together" in repr(found) and "2 random sets" in repr(found) and "OPEN" not in repr(found)
    loaded = tj.load(found.save(tmp_path / "joint.safetensors"))
    assert loaded.to_dataframe().equals(found.to_dataframe()) and repr(loaded) == repr(found)
    assert found.to_dataframe()["component"].tolist() == ["L0H1", "L1H2"]
    with pytest.warns(UserWarning, match="1 of 1 effects stay open: with 128 nodes, shares miss up to"):
        still = tj.joint_flow(model, PROMPT, ["L0H1", "L1H2"], controls=0, tolerance=1e-12)
    assert "1 OPEN: their shares explain nothing" in repr(still)
    with pytest.raises(ValueError, match="must be distinct, and at least one"):
        tj.joint_flow(model, PROMPT, ["L0H1", "L0H1"])
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
