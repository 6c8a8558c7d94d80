"""Series of ablations along their dose, against finite differences and hooked passes with scaled writes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo

import tl_jets as tj
from tl_jets.calculus import full_precision
from tl_jets.circuits.patching import compare_patching
from tl_jets.interventions import ablation_jets, replays
from tl_jets.interventions.hooks import ablation_hooks

FAMILIES = [spec for spec in zoo.available(["gpt2", "llama", "gemma2", "pythia"]) if spec.processing == "raw"]
STEPS = ["1_mlp", "L0H2", "0_attn", "1_block", "L1N7"]


def at_doses(model, tokens, hooks, doses, targets, position):
    """Centered logits (before a softcap) at some doses of an ablation, by hooks written here [dose, batch, target]."""
    found = []
    for dose in doses:
        own = [
            (name, lambda write, hook, edit=edit, dose=dose: (1 - dose) * write + dose * edit(write, hook))
            for name, edit in hooks
        ]
        box: list = []
        handle = model.unembed.register_forward_hook(lambda module, args, out, box=box: box.append(out))
        with torch.no_grad(), full_precision():
            model.run_with_hooks(tokens, fwd_hooks=own)
        handle.remove()
        logits = box[-1][:, position]
        found.append(logits[:, targets] - logits.mean(-1, keepdim=True))
    return torch.stack(found)


@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize("spec", FAMILIES, ids=str)
def test_coefficients_are_those_of_a_polynomial_through_true_doses(spec, mode):
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=2, pos=6)
    reference = None if mode == "zero" else zoo.tokens(model, batch=3, pos=6, seed=4)
    given = {"mode": mode, "reference": reference}
    found = tj.ablation_effect(model, tokens, STEPS, targets=[3, 11], order=2, doses=[0.25], **given)
    plain = tj.ablation_effect(model, tokens, STEPS, targets=[3, 11], **given)
    torch.testing.assert_close(found.logit, plain.logit, rtol=0, atol=1e-10)
    # A polynomial of degree 9 through doses within 0.02 of 0.
    doses = 0.02 * np.cos(np.pi * (np.arange(10) + 0.5) / 10)
    for i, step in enumerate(STEPS):
        hooks = ablation_hooks(model, step, **given)
        near = at_doses(model, tokens, hooks, doses.tolist(), [3, 11], -1)
        fitted = np.polynomial.polynomial.polyfit(doses / 0.02, near.flatten(1).numpy(), 9)
        wanted = torch.tensor(fitted[1:4] / 0.02 ** np.arange(1, 4)[:, None]).view(3, 2, 1, 2)
        error = (found.coefficients[:, i] - wanted).abs().flatten(1).amax(1)
        assert (error < torch.tensor([1e-7, 1e-5, 1e-3]) * wanted.abs().max().clamp_min(1)).all(), (step, error)
        clean, quarter = at_doses(model, tokens, hooks, [0, 0.25], [3, 11], -1)
        torch.testing.assert_close(found.truth[0, i, :, 0], quarter - clean, rtol=0, atol=1e-9)
    assert found.coefficients[0].abs().max() > 0.01 and found.coefficients[1].abs().max() > 0.01


@pytest.mark.parametrize("spec", FAMILIES, ids=str)
def test_one_backward_pass_gives_the_first_order(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=2, pos=6)
    options = {"targets": [3, 11], "positions": [2, -1], "ablated_positions": [1, 2]}
    found = tj.first_order_effects(model, tokens, STEPS, **options)
    series = tj.ablation_effect(model, tokens, STEPS, order=1, **options)
    assert found.labels == series.labels == STEPS
    torch.testing.assert_close(found.effect.double(), series.coefficients[0], rtol=0, atol=1e-5)
    assert found.effect.abs().max() > 0.01


@pytest.mark.parametrize("spec", FAMILIES, ids=str)
def test_all_tools_have_the_same_first_order(spec):
    """Patches from a corrupted run toward a clean one, as ablations, doses, sums over edges and jets of writes."""
    model, steps = zoo.build(spec), ["0_attn", "0_mlp", "1_mlp"]
    clean, corrupted = (zoo.tokens(model, batch=1, pos=6, seed=seed) for seed in (0, 4))
    options = {"mode": "resample", "reference": clean, "targets": [3, 11]}
    effect = tj.first_order_effects(model, corrupted, steps, **options).effect[:, 0, 0].double()
    series = tj.ablation_effect(model, corrupted, steps, order=2, **options).coefficients[..., 0, 0, :]
    joint = tj.joint_flow(model, corrupted, steps, controls=0, tolerance=1e9, **options).gradient[:, 0, 0]
    edges = tj.attribution_patching(model, clean, corrupted, targets=[3, 11]).edges
    patched = compare_patching(model, clean, corrupted, steps, order=2, targets=[3, 11]).change[..., 0]
    wanted = series[0, :, 0] - series[0, :, 1]
    assert wanted.abs().max() > 0.01
    by_writer = [sum(score for writer, _, score in edges if writer == step) for step in steps]
    for found in (effect[:, 0] - effect[:, 1], joint[:, 0] - joint[:, 1], torch.tensor(by_writer).double(), patched[1]):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(patched[2], wanted + series[1, :, 0] - series[1, :, 1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("hooked", [False, True])
def test_hooked_passes_and_small_stacks_give_the_same_series(hooked, monkeypatch):
    model = zoo.build(next(spec for spec in FAMILIES if spec.name == "llama"))
    tokens = zoo.tokens(model, batch=2, pos=6)
    hooks = [("blocks.1.hook_resid_pre", lambda stream, hook: 2 * stream)] if hooked else []
    with model.hooks(fwd_hooks=hooks):
        whole = tj.ablation_effect(model, tokens, STEPS, order=2)
        monkeypatch.setattr(replays, "STACKED_TOKENS", 100)
        small = tj.ablation_effect(model, tokens, STEPS, order=2)
        monkeypatch.setattr(ablation_jets, "can_replay", lambda trace, start: False)
        passes = tj.ablation_effect(model, tokens, STEPS, order=2)
    for other in (small, passes):
        torch.testing.assert_close(other.coefficients, whole.coefficients, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("radius", "order", "converges"),
    [
        (20.0, 1, True),
        (3.0, 1, False),
        (3.0, 3, True),
        (1.5, 3, False),
        (1.5, 8, True),
        (1.02, 8, False),
        (0.8, 8, False),
    ],
)
def test_a_series_converges_if_it_is_within_a_tenth_of_a_function_of_known_radius(radius, order, converges):
    model = tj.load_tinydocs()
    jet = tj.ablation_effect(model, "This function is", ["3_mlp"], order=order, doses=[0.5])

    def curve(dose):  # a pole at the radius; its series goes to it inside, and away from it outside
        return torch.full_like(jet.centered, 1 / (1 - dose / radius) - 1)

    terms = torch.stack([torch.full_like(jet.centered, radius**-j) for j in range(1, order + 2)])
    known = replace(jet, coefficients=terms, centered=curve(1.0), truth=curve(0.5)[None])
    assert bool(known.converges.all()) is bool(known.converges.any()) is converges
    assert (float((known.series() / known.centered - 1).abs().max()) < 0.1) >= converges
    off = replace(known, truth=known.truth + 0.11 * known.centered.abs())  # right at dose 1, wrong before
    assert not off.converges.any() and not replace(known, centered=1.3 * known.centered).converges.any()
    nothing = replace(jet, coefficients=0 * terms, centered=0 * jet.centered, truth=0 * jet.truth)
    assert nothing.converges.all()


def test_what_a_result_says():
    model = zoo.build(FAMILIES[0])
    tokens = zoo.tokens(model, batch=2, pos=6)
    jet = tj.ablation_effect(model, tokens, ["1_mlp", "0_attn"], order=3, doses=[0.0, 0.5])
    torch.testing.assert_close(jet.series(0.5, 2), 0.5 * jet.coefficients[0] + 0.25 * jet.coefficients[1])
    assert jet.order == 3 and (jet.truth[0].abs() < 1e-9).all()
    table = jet.to_dataframe()
    assert table["series"].tolist() == pytest.approx(sum(table[f"c_{j}"] for j in (1, 2, 3)).tolist())
    assert table["error_estimate"].tolist() == pytest.approx((2 * jet.coefficients[3].abs()).flatten().tolist())
    curve = jet.dose_response()
    assert curve["dose"].tolist() == [0.0, 0.5, 1.0] * 2
    assert curve["truth"].iloc[2] == pytest.approx(float(jet.centered[0].mean()))
    assert {"series", "error_estimate", "converges"} <= set(jet.average())
    both = tj.concat([tj.ablation_effect(model, row[None], "1_mlp", order=1) for row in tokens])
    torch.testing.assert_close(both.coefficients, jet.coefficients[:2, :1], rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match=r"order must be 1\.\.3"):
        jet.series(order=4)
    for options, said in (
        ({"doses": [0.5]}, "without an order"),
        ({"order": 0}, "1 or more"),
        ({"order": 1, "doses": [2]}, "0 to 1"),
    ):
        with pytest.raises(ValueError, match=said):
            tj.ablation_effect(model, tokens, "1_mlp", **options)
