"""One unit of effects and ablations: models with a logit scale or a softcap, against their own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from commands import numbers, run
from oracles import relative_error
from torch import Tensor

import tl_jets as tj
from tl_jets.calculus import full_precision
from tl_jets.cli import session
from tl_jets.core.attribution import LogitAttribution, additive_logits
from tl_jets.core.frozen_network import FrozenNetwork
from tl_jets.core.selection import Rows
from tl_jets.interventions.path_ablations import verdict
from tl_jets.paths.evaluation import JetStages

TOKENS = torch.tensor([[5, 9, 30, 12, 7], [3, 41, 2, 8, 22]])
TARGETS = [7, 12]
CAP = 5.0


def granite(scaling: float) -> Any:
    """Granite whose logits are divided by a number; the weights are the same whatever it is."""
    name, options = zoo.HF_CONFIGS["granite"]
    zoo.HF_CONFIGS["granite"] = (name, options | {"logits_scaling": scaling})
    try:
        return zoo.fresh(zoo.ModelSpec("granite", "bridge", "raw"))
    finally:
        zoo.HF_CONFIGS["granite"] = (name, options)


@pytest.fixture(scope="module")
def granites() -> list[tj.ResidualNetwork]:
    return [tj.ResidualNetwork(granite(scaling)) for scaling in (1.0, 16.0)]


def own_centered(model: Any, *, cap: float | None = None) -> Tensor:
    """The model's own logits of the targets beyond the mean of the vocabulary, a softcap undone."""
    with torch.no_grad(), full_precision():
        logits = model(TOKENS).double()
    logits = logits if cap is None else cap * torch.atanh(logits / cap)
    return logits[..., TARGETS] - logits.mean(-1, keepdim=True)


def everything(network: tj.ResidualNetwork) -> dict[str, Tensor]:
    """All that is said in logits of one input."""
    trace = network.trace(TOKENS)
    joint = tj.joint_jet_lens(network, trace, targets=TARGETS, linearize="detached")
    weighted = tj.joint_jet_lens(network, trace, targets=TARGETS, weights="uniform")
    iterative = tj.iterative_jet_lens(network, trace, order=1, targets=TARGETS)
    paths = tj.exponential_expansion(network, linearize="detached")(trace)
    pairs = tj.paths.interactions(network, trace, targets=7, minus=12, center_scale="match")
    jacobian = tj.detached_jacobian(network, trace, output="logits", positions=-1)
    decoded = tj.jet_expand(network, "ln_final", centers=["embed", "0_mlp_out"], order=1)(trace)
    steps = ["0_attn", "0_mlp", "1_mlp"]
    return {
        "effects of components": joint.effects,
        "contributions": joint.contributions(2).values,
        "values of the joint lens": joint.full_values,
        "own values of the joint lens": joint.own_values,
        "effects of weighted components": weighted.effects,
        "values of the iterative lens": iterative.full_values,
        "own values of the iterative lens": iterative.own_values,
        "targets of the iterative lens": iterative.target_logits,
        "effects of paths": paths.statistics(targets=TARGETS).effects,
        "logits of paths": paths.logits("embed > 0_mlp > ln_final"),
        "what paths leave": paths.remainder_logits() + paths.logits(),
        "sums of paths": tj.path_sums(network, trace, by="source", targets=TARGETS).effects,
        "lengths of paths": tj.path_lengths(network, trace, targets=TARGETS).effects,
        "interactions": pairs.matrix,
        "control of interactions": pairs.control,
        "degrees": pairs.degrees,
        "logit of interactions": pairs.logit,
        "ablations": tj.ablation_effect(network, trace, steps, targets=TARGETS).logit,
        "centered ablations": tj.ablation_effect(network, trace, steps, targets=TARGETS).centered,
        "path ablations": tj.path_ablation(network, trace, paths.labels[:-1], targets=TARGETS).centered,
        "detached map": jacobian.value,
        "tokens through the detached map": jacobian.contributions,
        "bias of the detached map": jacobian.bias,
        "logits of jets": decoded.logits(),
        "best tokens of jets": decoded.top_tokens(2).values,
    }


def test_dividing_all_logits_by_a_number_divides_everything_alike(granites):
    """And no verdict on a path changes."""
    plain, scaled = (everything(network) for network in granites)
    for name, values in scaled.items():
        keep = values.isfinite()
        assert torch.equal(keep, plain[name].isfinite()), name
        assert relative_error(16 * values[keep], plain[name][keep]) < 1e-8, name

    def verdicts(found: dict[str, Tensor]) -> list[str]:
        effects, falls = found["effects of paths"][:-1, 0, -1, 0], -found["path ablations"][:, 0, 0, 0]
        return [verdict(*pair) for pair in zip(effects.tolist(), falls.tolist(), strict=True)]

    assert verdicts(plain) == verdicts(scaled) and len(set(verdicts(plain))) == 3


@pytest.mark.parametrize("name", ["granite", "cohere"])
def test_effects_sum_to_the_models_own_centered_logit(name):
    spec = zoo.ModelSpec(name, "bridge", "raw")
    if spec not in zoo.available([name]):
        pytest.skip("TransformerLens 3.9 reads its rotary embedding in another way")
    model = zoo.build(spec)
    network, own = tj.ResidualNetwork(model), own_centered(model)
    joint = tj.joint_jet_lens(network, TOKENS, targets=TARGETS, linearize="detached")
    assert relative_error(joint.effects.sum(0), own) < 1e-8
    paths = tj.exponential_expansion(network, linearize="detached")(TOKENS).statistics(targets=TARGETS)
    assert relative_error(paths.effects.sum(0), own) < 1e-8
    assert relative_error(tj.path_sums(network, TOKENS, by="source", targets=TARGETS).effects.sum(0), own) < 1e-8
    pairs = tj.paths.interactions(network, TOKENS, targets=TARGETS[0], minus=TARGETS[1], center_scale="match")
    assert relative_error(pairs.logit[:, 0], (own[..., 0] - own[..., 1])[:, -1]) < 1e-8
    hooks = tj.ablation_hooks(model, "0_mlp")
    with model.hooks(fwd_hooks=hooks):
        change = own_centered(model) - own
    found = tj.ablation_effect(network, TOKENS, "0_mlp", targets=TARGETS)
    assert relative_error(found.centered[0, :, 0], change[:, -1]) < 1e-8
    assert {joint.unit, paths.unit, pairs.unit, found.unit} == {"logits"} and "softcap" not in repr(found)


@pytest.mark.parametrize("spec", zoo.available(["gemma2"]), ids=str)
def test_under_a_softcap_effects_and_ablations_are_both_before_it(spec):
    model = zoo.build(spec)
    network, own = tj.ResidualNetwork(model), own_centered(model, cap=CAP)
    joint = tj.joint_jet_lens(network, TOKENS, targets=TARGETS, linearize="detached")
    assert relative_error(joint.effects.sum(0), own) < 1e-7
    found = tj.ablation_effect(network, TOKENS, ["0_mlp", "1_attn"], targets=TARGETS)
    for i, step in enumerate(found.labels):
        with model.hooks(fwd_hooks=tj.ablation_hooks(model, step)):
            change = own_centered(model, cap=CAP) - own
            with torch.no_grad(), full_precision():
                after = model(TOKENS)[:, -1].double().log_softmax(-1)
        assert relative_error(found.centered[i, :, 0], change[:, -1]) < 1e-7
        with torch.no_grad(), full_precision():
            before = model(TOKENS)[:, -1].double().log_softmax(-1)
        assert relative_error(found.kl[i, :, 0], (before.exp() * (before - after)).sum(-1)) < 1e-7
    path = tj.path_ablation(network, TOKENS, "1_mlp_bias > ln_final", targets=TARGETS)
    sums = tj.path_sums(network, TOKENS, targets=TARGETS)
    iterative = tj.iterative_jet_lens(network, TOKENS, targets=TARGETS)
    pairs = tj.paths.interactions(network, TOKENS, targets=7, center_scale="match")
    for result in (joint, found, path, sums, iterative, pairs):
        assert result.unit == "logits before the softcap" and "logits before the softcap" in repr(result)


def test_targets_of_every_prompt():
    """One list a prompt, wherever targets are taken: what every prompt alone has with its own."""
    model = zoo.build(zoo.ModelSpec("gpt2", "bridge", "raw"))
    network, lists = tj.ResidualNetwork(model), [["w3", 9], [12, "w40"]]
    trace, rows = network.trace(TOKENS), [TOKENS[:1], TOKENS[1:]]
    paths = tj.exponential_expansion(network, linearize="detached", max_length=1)
    largest = tj.exponential_expansion(network, linearize="detached", top=3, rank="effect", targets=lists)
    take: dict[str, Any] = {
        "iterative": lambda x, t: tj.iterative_jet_lens(network, x, targets=t).target_logits[0].movedim(1, 0),
        "joint": lambda x, t: tj.joint_jet_lens(network, x, targets=t, weights="uniform").effects.movedim(1, 0),
        "paths": lambda x, t: paths(x).statistics(targets=t).effects.movedim(1, 0),
        "sums": lambda x, t: tj.path_sums(network, x, targets=t).effects.movedim(1, 0),
        "lengths": lambda x, t: tj.path_lengths(network, x, targets=t).effects.movedim(1, 0),
        "ablations": lambda x, t: tj.ablation_effect(network, x, "0_mlp", targets=t).logit[0],
        "path ablations": lambda x, t: tj.path_ablation(network, x, "embed > 0_mlp", targets=t).logit[0],
        "interactions": lambda x, t: (
            tj.paths.interactions(
                network, x, targets=[own[:1] for own in t], minus=[own[1:] for own in t], center_scale="match"
            ).logit
        ),
    }
    for name, function in take.items():
        found = function(trace, lists)
        for i, row in enumerate(rows):
            assert relative_error(found[i], function(row, [lists[i]])[0]) < 1e-9, name
    flat = tj.path_sums(network, rows[0], targets=lists[0])
    alone = tj.path_sums(network, rows[0], targets=[lists[0]])
    assert alone.target_names == flat.target_names == ["w3", 9] and torch.equal(alone.effects, flat.effects)
    assert len(largest(trace, positions=-1).labels) == 3
    for wrong in ([["w3"]], [["w3"], [9, 12]], [["w3"], 9], [[], []], [["w3"], [9], [5]]):
        with pytest.raises(ValueError, match="one list a prompt, all of one length: 2 lists here"):
            tj.path_sums(network, trace, targets=wrong)
    with pytest.raises(ValueError, match=r"token ids in 0\.\.60"):
        tj.path_sums(network, trace, targets=[[3], [61]])


def test_commands_name_the_unit(capsys, monkeypatch, granites):
    """A mere scale is no softcap, and the logit of the answer is the model's own."""
    models = {"granite": granites[1].view.model, "gemma2": zoo.build(zoo.ModelSpec("gemma2", "bridge", "raw"))}
    monkeypatch.setattr(session, "load_model", models.__getitem__)
    monkeypatch.setenv("COLUMNS", "120")
    for name, is_capped in (("granite", False), ("gemma2", True)):
        unit = "logits before the softcap" if is_capped else "logits"
        asked = ("--model", name, "--prompt", "w5 w9 w30")
        for command in ("paths", "jacobian"):
            found = numbers(capsys, command, *asked)
            assert (found["is_softcapped"], found["unit"]) == (is_capped, unit)
        assert numbers(capsys, "lens", *asked)["unit"] == unit
        for command in (("paths", "--ablate"), ("jacobian",), ("lens",)):
            text = " ".join(run(capsys, *command, *asked).split())
            assert ("before the softcap" in text or "model's final softcap" in text) is is_capped
    logits = models["granite"]("w5 w9 w30")[0, -1].double()
    found = numbers(capsys, "paths", "--model", "granite", "--prompt", "w5 w9 w30")
    assert found["target"]["logit"] == pytest.approx(float(logits.max() - logits.mean()), rel=1e-6)


def test_what_a_trace_gave_is_not_decoded_with_other_weights():
    """Of W_U changed after the trace, through `.data` and then read anew, nothing is reported."""
    model = zoo.fresh(zoo.ModelSpec("gpt2", "bridge", "raw"))
    network = tj.ResidualNetwork(model)
    trace = network.trace(TOKENS)
    expansion = tj.jet_expand(network, "ln_final", centers=["embed", "0_mlp_out"], order=1)
    paths = tj.exponential_expansion(network, linearize="detached")
    jets, found = expansion(trace), paths(trace)
    other = network.trace(TOKENS)
    model.W_U.data.mul_(2)
    tj.ResidualNetwork(network).trace(TOKENS)  # the network has read the new weights
    rows = Rows.of(trace, -1)
    for decode in (
        lambda: additive_logits(trace, torch.full((2, 1), -1) % TOKENS.shape[1]),
        lambda: LogitAttribution.at(trace, rows, rows.take(trace["final_post"]), None),
        lambda: jets.logit_attrs(TARGETS),
        lambda: found.statistics(),
        lambda: expansion.evaluate(other),
        lambda: JetStages(trace, 0, "none", (1.0,) * 9, False).terms(trace["embed"][None], rows),
        lambda: FrozenNetwork.of(other),
    ):
        with pytest.raises(ValueError, match="changed since"):
            decode()
