"""Results as a user holds them: what the joint lens attributes to components, best tokens, other devices."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any, cast

import oracles
import pytest
import torch
import zoo
from every_result import classes_of, every_result, of_every_result

import tl_jets as tj
from tl_jets import ResidualNetwork, jet_expand, joint_jet_lens
from tl_jets.core.model_marks import model_mark
from tl_jets.core.notebook import Shown
from tl_jets.core.tokens import token_text

RAW = [
    spec
    for spec in zoo.available(["gpt2", "gptj", "llama", "gemma2", "no_norm", "attn_only"])
    if spec.processing == "raw"
]


def centered(logits):
    return logits - logits.mean(-1, keepdim=True)


# Effects of the joint lens


@pytest.mark.parametrize("spec", RAW, ids=str)
@pytest.mark.parametrize("granularity", ["sublayer", "head"])
def test_direct_logit_attribution_is_that_by_hand(spec, granularity):
    """A center's effect is its logits through the final norm at the model's own scale; effects sum to the model's."""
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=2, pos=5)
    network = ResidualNetwork(model, granularity)
    trace, decoder = network.trace(tokens), network.decoder
    targets = torch.stack([tokens, tokens.flip(-1), (tokens + 1) % zoo.D_VOCAB], -1)[:, [1, 4]]
    lens = joint_jet_lens(network, trace, linearize="detached", targets=targets, positions=[1, -1])
    assert torch.equal(lens.target_ids, targets) and lens.effects.shape == (len(lens.labels), 2, 2, 3)
    final = trace["final_post"]
    scale = (
        1
        if decoder.norm.kind == "none"
        else 1 / (decoder.norm.center(final).square().mean(-1, True) + decoder.norm.eps).sqrt()
    )
    bias = torch.zeros_like(final[0, 0]) if decoder.norm.bias is None else decoder.norm.bias
    for label, effects in zip(lens.labels, lens.effects, strict=True):
        if label == "ln_final_bias":
            logits = (bias @ decoder.W_U + decoder.b_U).expand(2, 5, -1)
        else:
            logits = decoder.norm.scale(decoder.norm.center(trace[label])) * scale @ decoder.W_U
        assert oracles.relative_error(effects, centered(logits)[:, [1, 4]].gather(-1, targets)) < 1e-10, label
    additive = centered(decoder.norm(final) @ decoder.W_U + decoder.b_U)[:, [1, 4]]
    assert oracles.relative_error(lens.effects.sum(0), additive.gather(-1, targets)) < 1e-10


@pytest.mark.parametrize("spec", RAW[:3], ids=str)
@pytest.mark.parametrize("order", [0, 1])
def test_effects_of_weighted_jets_are_those_of_the_expansion(spec, order):
    model = zoo.build(spec)
    network = ResidualNetwork(model, "sublayer")
    trace = network.trace(zoo.tokens(model, batch=2, pos=5))
    lens = joint_jet_lens(network, trace, order=order)
    terms = jet_expand(network, "ln_final", centers=lens.labels, order=order, weights=lens.weights)(trace)
    logits = torch.stack([centered(terms.logits(path)) for path in terms])
    answers = lens.model_top_ids[..., None]
    assert lens.target_names == ["<answer>"] and torch.equal(lens.target_ids, answers)
    assert oracles.relative_error(lens.effects, logits.gather(-1, answers.expand(len(logits), -1, -1, -1))) < 1e-9
    best = lens.contributions(zoo.D_VOCAB, prompt=1)
    at = (best.indices == answers[1]).long().argmax(-1, keepdim=True)
    assert oracles.relative_error(best.values.gather(-1, at), lens.effects[:, 1]) < 1e-9


def test_effects_of_padding_and_their_table():
    network = ResidualNetwork(zoo.build(RAW[0]), "block")
    lens = joint_jet_lens(network, ["w3 w4 w5", "w6"], linearize="detached", targets=["w7", 4])
    assert lens.target_names == ["w7", 4]
    alone = joint_jet_lens(network, "w6", linearize="detached", targets=[7, 4])
    assert bool(lens.effects[:, ~lens.valid].isnan().all()) and not bool(lens.effects[:, lens.valid].isnan().any())
    assert oracles.relative_error(lens.effects[:, 1:][:, :, alone.valid[0].nonzero()[:, 0]], alone.effects) < 1e-10
    frame = lens.to_dataframe()
    assert len(frame) == len(lens.labels) * int(lens.valid.sum()) * 2
    assert not {"weights", "rho", "alpha", "beta"} & set(frame.columns)
    row = frame[(frame.center == "1_block_out") & (frame.batch == 0) & (frame.pos == 2)].iloc[1]
    assert (row.target, row.effect) == (" w4", float(lens.effects[lens.labels.index("1_block_out"), 0, 2, 1]))
    assert len(joint_jet_lens(network, "w6").to_dataframe().columns) == len(frame.columns) + 4
    with pytest.raises(ValueError, match="A tensor of targets must hold ids"):
        joint_jet_lens(network, "w6 w7", targets=torch.zeros(1, 9, dtype=torch.long))


# Best tokens by name


@pytest.mark.usefixtures("as_users_run_it")
def test_top_tokens_say_what_they_take():
    """Some results take a number and give ids, some take a tokenizer and give texts; neither takes the other's."""
    network = ResidualNetwork(zoo.build(RAW[2]))
    tokenizer, prompt = network.tokenizer, "w3 w4 w5"
    paths = tj.exponential_expansion(network, linearize="detached", max_length=1)(prompt)
    J = tj.detached_jacobian(network, prompt, output="logits")
    counted = [paths, jet_expand(network, "ln_final", centers="embed")(prompt), J, J.block_norms()]
    counted += [tj.detached_jacobian(network, prompt), tj.detached_spectra(network, prompt, k=2)]
    for result in counted:
        with pytest.raises(
            TypeError, match=r"k must be the number of tokens; got .* top_tokens\(k\)\.texts\(tokenizer\)"
        ):
            result.top_tokens(tokenizer)
        with pytest.raises(ValueError, match=f"k must be between 1 and d_vocab = {zoo.D_VOCAB}, got 0"):
            result.top_tokens(0)
    for result in (joint_jet_lens(network, prompt), tj.iterative_jet_lens(network, prompt), paths.statistics()):
        with pytest.raises(
            TypeError,
            match=r"tokenizer must be a Hugging Face tokenizer, or None; got 3\. The number of tokens is an option",
        ):
            result.top_tokens(3)
    best = paths.top_tokens(2)
    assert isinstance(best, tj.TopTokens)
    assert best.texts(tokenizer)[3][0][2] == [token_text(tokenizer, int(token)) for token in best.indices[3, 0, 2]]


# Devices

# Tables of n-grams stay on the CPU, in the results of studies, too.
TABLES = {"Circuit", "NgramTable", "Roles", "AblationCheck", "Mass", "ModelDiff", "TextComparison", "Track"}


def tensors_of(result: Any, path: str = ""):
    """Every tensor in a result's public fields, and in results and mappings there."""
    if isinstance(result, torch.Tensor):
        yield path, result
    elif isinstance(result, dict):
        for name, value in result.items():
            yield from tensors_of(value, f"{path}[{name}]")
    elif isinstance(result, Shown):
        for field in fields(cast(Any, result)):
            if not field.name.startswith("_"):
                yield from tensors_of(getattr(result, field.name), f"{path}.{field.name}")


@pytest.fixture(scope="module")
def movable():
    """One of every class that moves, by class."""
    return {kind: result for kind, result in every_result().items() if kind.__name__ not in TABLES}


def test_every_result_moves_or_is_known_to_stay(movable):
    for kind in (kind for kind in classes_of(Shown) if hasattr(sys.modules[kind.__module__], kind.__name__)):
        assert issubclass(kind, tuple(movable)) != (kind.__name__ in TABLES) and hasattr(kind, "to"), kind


def test_all_tensors_of_a_result_move(movable):
    for kind, result in movable.items():
        before, moved = dict(tensors_of(result)), result.to("meta")
        assert type(moved) is kind and before
        assert [path for path, _ in tensors_of(moved)] == list(before)
        for path, values in tensors_of(moved):
            assert values.device.type == "meta" and values.shape == before[path].shape, f"{kind.__name__}{path}"
        for path, values in tensors_of(result):
            assert values is before[path] and values.device.type == "cpu", f"{kind.__name__}{path}"


# What belongs to another result, which names the model.
PARTS = {"Measures", "Sinks", "Verdict", "SimplexSolution", "SingularVectors", "BlockNorms"}
# Results with a control at random hold its seed.
SEEDED = {
    "Flow",
    "IterativeJetLens",
    "JointJetLens",
    "Interactions",
    "JointFlow",
    "CircuitFaithfulness",
    "HeadScores",
    "Sketch",
    "MassChange",
    "Promoters",
}


def test_every_result_names_its_model_and_the_seed_of_its_control(movable, tmp_path):
    mark = model_mark(ResidualNetwork(zoo.build(of_every_result())))
    for kind, result in movable.items():
        if kind.__name__ not in PARTS:
            loaded = tj.load(result.save(tmp_path / "result"))
            assert (loaded.marks[0] if kind.__name__ == "MassChange" else loaded.model) == mark, kind
            assert getattr(result, "seed", None) == (0 if kind.__name__ in SEEDED else None), kind


@pytest.mark.usefixtures("as_users_run_it")
def test_a_result_moves_to_no_dtype(movable):
    with pytest.raises(TypeError, match=r"`to` takes a device; got the dtype torch\.float16"):
        movable[tj.PathStatistics].to(torch.float16)
    assert movable[tj.JetCache].to(torch.float16)["embed > 0_mlp"].dtype == torch.float16  # which is of numbers alone
