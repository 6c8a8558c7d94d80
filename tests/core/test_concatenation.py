"""`concat`: results of several batches are those of one call on all prompts; what does not fit is refused by name."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pandas as pd
import pytest
import torch
import zoo
from torch import Tensor

import tl_jets as tj
from tl_jets.core.averages import Averaged
from tl_jets.core.concatenation import batch_axes
from tl_jets.core.results import Result

# Of unequal lengths within and between batches; the longest is in the second.
BATCHES = [["w21 w7 w5", "w3"], ["w5 w9 w33 w4 w8", "w7 w8", "w30"], ["w6 w4"]]
CALLS = {
    "iterative": lambda net, x: tj.iterative_jet_lens(net, x, order=2, targets=["w40", "w17"]),
    "iterative, bare": lambda net, x: tj.iterative_jet_lens(net, x, measures=False, layers=[0, -1]),
    "iterative, last": lambda net, x: tj.iterative_jet_lens(net, x, positions=-1),
    "iterative, first": lambda net, x: tj.iterative_jet_lens(net, x, positions=[0, 1], targets="w9"),
    "joint": lambda net, x: tj.joint_jet_lens(net, x, order=1),
    "joint, detached": lambda net, x: tj.joint_jet_lens(net, x, linearize="detached", targets=["w40", "w17"]),
    "lengths": lambda net, x: tj.path_lengths(net, x),
    "components": lambda net, x: tj.path_sums(net, x, targets=["w40", "w17"]),
    "sources": lambda net, x: tj.path_sums(net, x, by="source", positions=[0, -1]),
    "ablations": lambda net, x: tj.ablation_effect(net, x),
    "ablations, two": lambda net, x: tj.ablation_effect(net, x, ["0_mlp", "L1H1"], positions=[0, -1], targets="w40"),
}


@pytest.fixture(scope="module")
def net() -> Any:
    return tj.ResidualNetwork(zoo.build(zoo.available(["gpt2"])[0]))


def check_same(found: Any, wanted: Any, name: str, real: Tensor) -> None:
    """Every field equal; ids of tokens and targets, which have no fill in results, at real positions only."""
    assert type(found) is type(wanted), name
    if isinstance(wanted, Result):
        for field in fields(wanted):
            if not field.metadata.get("handle"):
                check_same(getattr(found, field.name), getattr(wanted, field.name), field.name, real)
    elif isinstance(wanted, Tensor):
        if name in ("tokens", "target_ids"):
            found, wanted = found[real], wanted[real]
        # Sums of a padded forward pass run over other lengths.
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-8, equal_nan=True)
    elif name == "token_names":
        assert found.items() <= wanted.items() and len(found) >= len(wanted) - 1  # without the padding token
    else:
        assert found == wanted, name


@pytest.mark.parametrize("kind", CALLS)
def test_it_is_one_call_on_all_prompts(net, kind, tmp_path):
    call = CALLS[kind]
    parts = [call(net, batch) for batch in BATCHES]
    found, wanted = tj.concat(iter(parts)), call(net, [prompt for batch in BATCHES for prompt in batch])
    real = getattr(wanted, "valid", torch.ones_like(wanted.tokens, dtype=torch.bool))
    assert len(real) == 6
    check_same(found, wanted, kind, real)
    for options in ({"spread": True}, {"group_by": list("aabbab"), "include_sinks": True}):
        pd.testing.assert_frame_equal(found.average(**options), wanted.average(**options), rtol=1e-6)
    loaded = tj.load(found.save(tmp_path / "result.safetensors"))
    check_same(loaded, found, kind, torch.ones_like(real))
    table = loaded.to_dataframe()
    pd.testing.assert_frame_equal(table, wanted.to_dataframe()[table.columns], rtol=1e-6)
    assert loaded._repr_html_() and repr(loaded) == repr(wanted)
    if hasattr(wanted, "top_tokens"):
        assert loaded.top_tokens() == wanted.top_tokens()


@pytest.mark.parametrize("kind", ["iterative", "joint", "lengths"])
def test_numbers_are_copied_and_padding_is_empty(net, kind):
    """Every tensor of every batch, to the bit; behind it NaN, -1 and False."""
    parts = [CALLS[kind](net, batch) for batch in BATCHES]
    found, start = tj.concat(parts), 0
    for part in parts:
        batch, pos = part.tokens.shape
        for name, axis in batch_axes(type(part)).items():
            value, own = getattr(found, name), getattr(part, name)
            if isinstance(own, Tensor) and name != "positions":
                rows = value.narrow(axis, start, batch)
                torch.testing.assert_close(rows.narrow(axis + 1, 0, pos), own, rtol=0, atol=0, equal_nan=True)
                rest = rows.narrow(axis + 1, pos, rows.shape[axis + 1] - pos)
                is_empty = (
                    rest.isnan() if rest.is_floating_point() else ~rest if rest.dtype is torch.bool else rest == -1
                )
                assert is_empty.all(), name
        start += batch
    assert start == len(found.tokens)


def test_left_padding_and_right_padding_go_together(net):
    """Prompts that are padded on the left are not moved; tables and averages are those of one call."""
    tokens, mask = zoo.padded(net.view.model, (5, 3, 4))
    one = tj.iterative_jet_lens(net, tokens, attention_mask=mask)
    both = tj.concat(
        [
            tj.iterative_jet_lens(net, tokens[1:, 1:], attention_mask=mask[1:, 1:]),
            tj.iterative_jet_lens(net, tokens[:1]),
        ]
    )
    order = [1, 2, 0]
    assert both.positions.tolist() == [[-1, 0, 1, 2, -1], [0, 1, 2, 3, -1], [0, 1, 2, 3, 4]]
    wanted = one.to_dataframe()
    wanted["batch"] = wanted["batch"].map(order.index)
    wanted = wanted.sort_values(["layer", "order", "batch", "pos", "rank"], kind="stable", ignore_index=True)
    found = both.to_dataframe().sort_values(
        ["layer", "order", "batch", "pos", "rank"], kind="stable", ignore_index=True
    )
    pd.testing.assert_frame_equal(found, wanted, rtol=1e-6)
    pd.testing.assert_frame_equal(both.average(), one.average(), rtol=1e-6)


def test_one_result_is_itself_without_its_model(net):
    lens = tj.joint_jet_lens(net, BATCHES[0])
    found = tj.concat([lens])
    check_same(found, lens, "lens", lens.valid)
    assert found.centers is None and lens.centers is not None
    with pytest.raises(ValueError, match="which a loaded or concatenated lens is without"):
        found.center_top_tokens()


@pytest.mark.parametrize(
    ("call", "one", "other", "said"),
    [
        (tj.iterative_jet_lens, {"order": 1}, {"order": 2}, r"orders \(first at index 2\) .* \[0, 1\] and \[0, 1, 2\]"),
        (tj.iterative_jet_lens, {"top_k": 5}, {"top_k": 4}, r"top_ids .* 5\] on cpu and .* 4\] on cpu"),
        (tj.iterative_jet_lens, {}, {"layers": [0, 2]}, r"labels \(first at index 1\) .*'1_pre'.* and \['0_pre'"),
        (tj.iterative_jet_lens, {}, {"measures": False}, r"own_top_ids must be equal .* torch\.int64 .* and None"),
        (tj.iterative_jet_lens, {}, {"seed": None}, "seed must be equal .* 0 and None"),
        (tj.iterative_jet_lens, {}, {"seed": 1}, "seed must be equal .* 0 and 1"),
        (tj.joint_jet_lens, {}, {"seed": 1}, "seed must be equal .* 0 and 1"),
        (tj.iterative_jet_lens, {}, {"center_scale": "match"}, "center_scale .* 'none' and 'match'"),
        (tj.joint_jet_lens, {"order": 1}, {"order": 0}, "order must be equal in all results; got 1 and 0"),
        (tj.joint_jet_lens, {}, {"weights": "uniform"}, "objective .* 'centered_l2' and 'uniform'"),
        (tj.joint_jet_lens, {}, {"targets": "w3"}, r"target_names .* \['<answer>'\] and \['w3'\]"),
        (tj.paths.interactions, {}, {"seed": 1}, "seed must be equal .* 0 and 1"),
        (
            tj.ablation_effect,
            {"mode": "resample", "reference": ["w1 w2 w3", "w4 w5 w6"]},
            {"mode": "resample", "reference": ["w1 w2 w3", "w4 w5 w6"], "seed": 1},
            "seed must be equal .* 0 and 1",
        ),
        (tj.path_lengths, {}, {"avoiding": "0_mlp"}, r"labels \(first at index 4\)"),
        (tj.path_lengths, {}, {"avoiding": "embed"}, r"counts \(first at index 0\)"),
        (tj.ablation_effect, {}, {"mode": "mean", "reference": "w3 w4"}, "mode .* 'zero' and 'mean'"),
        (tj.ablation_effect, {}, {"positions": [0, 1]}, "AblationEffect has no padding, .* got 1 and 2"),
    ],
)
def test_other_options_are_refused_by_name(net, call, one, other, said):
    parts = [call(net, "w5 w9 w3", **options) for options in (one, other)]
    with pytest.raises(ValueError, match=said):
        tj.concat(parts)


def of_flow(model: Any, prompts: Any) -> Any:
    return tj.flow(model, prompts, tj.ablation_hooks(model, "0_mlp"), nodes=2, tolerance=1.0)


JOINED = [
    tj.iterative_jet_lens,
    tj.joint_jet_lens,
    tj.path_sums,
    tj.ablation_effect,
    tj.first_order_effects,
    tj.paths.interactions,
]


@pytest.mark.parametrize("call", [*JOINED, of_flow], ids=lambda call: call.__name__)
def test_another_model_is_refused_by_name(net, call, tmp_path):
    model = zoo.build(zoo.available(["gpt2"])[0])
    same = call(model, "w5 w9 w3")
    assert tj.load(tj.concat([call(net, "w1 w2"), same]).save(tmp_path / "lens")).model == same.model
    with torch.no_grad():
        list(model.blocks[1].parameters())[-1].add_(1)
    changed = call(model, "w5 w9 w3")  # the same object, other weights
    with pytest.raises(ValueError, match=r"model must be equal in all results; got .*tiny.* and .*tiny"):
        tj.concat([same, changed])


def test_other_dtypes_tokenizers_and_kinds_are_refused(net):
    lens = tj.iterative_jet_lens(net, "w5 w9 w3")
    with pytest.raises(ValueError, match=r"alpha must have one dtype, .* torch\.float64 .* torch\.float32"):
        tj.concat([lens, replace(lens, alpha=lens.alpha.float())])
    inner = replace(lens.measures, kl=lens.measures.kl.float())
    with pytest.raises(ValueError, match=r"measures\.kl must have one dtype"):
        tj.concat([lens, replace(lens, measures=inner)])
    with pytest.raises(ValueError, match="token_names must be of one tokenizer; token 1 is ' <s>' and '1'"):
        tj.concat([lens, zoo.renamed_tokens(lens, None)])
    with pytest.raises(ValueError, match="at least one result"):
        tj.concat([])
    for wrong in ([lens, tj.joint_jet_lens(net, "w5")], [lens.measures, lens.measures], [lens, "lens"], [None]):
        with pytest.raises(TypeError, match=r"all of one kind; got |Type-check error"):
            tj.concat(wrong)


def test_every_kind_with_an_average_is_understood():
    """Every tensor has axes [..., batch, pos, ...], so that none is joined by its size."""

    def kinds(base: type) -> list[type]:
        return [x for own in base.__subclasses__() for x in [own, *kinds(own)]]

    for kind in [x for x in kinds(Averaged) if x.__module__.startswith("tl_jets.")]:
        tensors = [field.name for field in fields(kind) if "Tensor" in str(field.type)]  # type: ignore[arg-type]
        assert {"tokens", "positions"} <= set(tensors) <= set(batch_axes(kind)), kind
