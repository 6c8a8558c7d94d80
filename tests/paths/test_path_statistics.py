"""Shares of paths, lengths, components and sources: against logits, enumeration, and networks whose writes are multiplied."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
import torch
import zoo
from test_exponential import THREE_STAGES, TOKENS, detached, network, normal, tanh_block
from torch import Tensor

from tl_jets import CallableModel, Decoder, Norm, ResidualNetwork
from tl_jets.core.attribution import LogitAttribution
from tl_jets.core.selection import Rows
from tl_jets.paths.cancellation import CancellationWarning
from tl_jets.paths.expansion import exponential_expansion
from tl_jets.paths.statistics import PathStatistics, path_lengths, path_sums

FAMILIES = [spec for spec in zoo.available(["gpt2", "pythia", "llama", "gemma2"]) if spec.processing == "raw"]


def centered(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


def check(found: PathStatistics, index: int, logits: Tensor, own: Tensor) -> None:
    """Every measure of one part, from logits as large as the vocabulary."""
    part, model = centered(logits), centered(own)
    keep = found.valid
    expected = {
        "norm": part.norm(dim=-1) / model.norm(dim=-1),
        "cosine": torch.cosine_similarity(part, model, dim=-1),
        "share": (part * model).sum(-1) / model.square().sum(-1),
        "effect": part.gather(-1, found.target_ids[..., :1])[..., 0],
    }
    for name, values in expected.items():
        assert oracles.relative_error(getattr(found, name)[index][keep], values[keep]) < 1e-9, name
    assert torch.equal(found.top_ids[index][keep], logits.argmax(-1)[keep])
    assert torch.equal(found.copies[index], (logits.argmax(-1) == own.argmax(-1)) & keep)


@pytest.mark.parametrize("spec", FAMILIES, ids=str)
def test_measures_of_single_paths_are_those_of_their_logits(spec):
    net = ResidualNetwork(zoo.build(spec))
    trace = net.trace(zoo.tokens(net.view.model, batch=2, pos=5))
    paths = detached(net)(trace, positions=[1, 4])
    found = paths.statistics(targets=[7, 3])
    assert found.labels == paths.labels and found.effects.shape == (len(paths), 2, 2, 2)
    assert found.target_names == [7, 3]
    own = net.decoder.logits(net.decoder.norm(trace["final_post"]))[:, [1, 4]]
    for index in (0, 1, len(paths) // 2, len(paths) - 1):
        check(found, index, paths.logits(paths.labels[index]), own)
    assert oracles.relative_error(found.share.sum(0), torch.ones(2, 2).double()) < 1e-10
    answer = paths.statistics()
    assert torch.equal(answer.target_ids[..., 0], own.argmax(-1)) and answer.target_names == ["<answer>"]
    assert oracles.relative_error(answer.effect.sum(0), centered(own).amax(-1)) < 1e-10


@pytest.mark.parametrize("granularity", ["sublayer", "head"])
@pytest.mark.parametrize("spec", FAMILIES, ids=str)
def test_sums_without_enumeration_are_those_of_all_paths(spec, granularity):
    net = ResidualNetwork(zoo.build(spec), granularity)
    trace = net.trace(zoo.tokens(net.view.model, batch=2, pos=4))
    paths = detached(net, max_paths=10**5)(trace)
    for by, found in (
        ("length", path_lengths(net, trace)),
        ("component", path_sums(net, trace)),
        ("source", path_sums(net, trace, by="source")),
    ):
        wanted = paths.statistics(by=by)
        assert set(found.labels) == set(wanted.labels) and found.by == wanted.by == by
        order = [wanted.labels.index(label) for label in found.labels]
        assert found.counts == [wanted.counts[i] for i in order]
        for name in ("norm", "share", "effect"):
            assert oracles.relative_error(getattr(found, name), getattr(wanted, name)[order]) < 1e-9, (by, name)
        if by != "component":
            assert oracles.relative_error(found.share.sum(0), torch.ones(2, 4).double()) < 1e-10
    # Components overlap: together they count every path as often as it has writes.
    lengths, components = path_lengths(net, trace), path_sums(net, trace)
    n = torch.arange(len(lengths.labels)).double()
    assert oracles.relative_error(components.share.sum(0), torch.einsum("n,nbp->bp", n, lengths.share)) < 1e-9


def test_lengths_are_the_coefficients_of_a_network_whose_writes_are_multiplied():
    """A linear network with every matrix multiplied by z: a polynomial in z, read off at as many points as it has terms."""
    matrices = [normal(6, 6, seed=i, scale=0.5) for i in range(4)]
    biases = [normal(6, seed=10 + i) for i in range(4)]

    def net(z: float) -> ResidualNetwork:
        pairs = zip(matrices, biases, strict=True)
        stages = [{f"{i}_block": lambda x, A=A, b=b: z * (x @ A) + b} for i, (A, b) in enumerate(pairs)]
        return network(*stages, norm=Norm("none"))

    nodes = [0.0, 0.5, 1.0, 1.5, 2.0]
    streams = torch.stack([net(z).trace(TOKENS)["final_post"] for z in nodes])
    powers = torch.tensor(nodes).double()[:, None] ** torch.arange(5)
    coefficients = torch.linalg.solve(powers, streams.flatten(1)).reshape(streams.shape)
    one = net(1.0)
    found = path_lengths(one, TOKENS)
    own = one.trace(TOKENS).logits
    for n in range(5):
        check(found, n, coefficients[n] @ one.decoder.W_U + (one.decoder.b_U if n == 0 else 0), own)
    # From the embedding: 1, 4, 6, 4, 1; from the biases of blocks before 3, 2, 1, 0 others; and the decoder's own.
    assert found.counts == [1 + 4 + 1, 4 + 6, 6 + 4, 4 + 1, 1]


def test_sums_through_a_component_are_what_removing_it_changes():
    """A linear network with one matrix set to zero."""
    matrices = [normal(6, 6, seed=i, scale=0.5) for i in range(3)]

    def net(without: int | None) -> ResidualNetwork:
        stages = [{f"{i}_block": lambda x, A=A, i=i: 0 * x if i == without else x @ A} for i, A in enumerate(matrices)]
        return network(*stages, norm=Norm("none"))

    whole = net(None).trace(TOKENS)
    found = path_sums(net(None), TOKENS)
    for i in range(3):
        assert found.labels[i] == f"{i}_block" and found.counts[i] == 4
        check(found, i, whole.logits - net(i).trace(TOKENS).logits, whole.logits)


def test_depth_is_no_obstacle():
    blocks = [tanh_block(i) for i in range(64)]
    stages = [{f"{i}_block": lambda x, f=f: 0.05 * f(x)} for i, f in enumerate(blocks)]
    net = network(*stages)
    lengths = path_lengths(net, TOKENS)
    assert sum(lengths.counts) == 2**65 and len(lengths.labels) == 65
    assert oracles.relative_error(lengths.share.sum(0), torch.ones(2, 3).double()) < 1e-10
    components = path_sums(net, TOKENS)
    # A path from the embedding, or from one of the biases before, then any of the later stages.
    assert components.counts[0] == 2**63 and components.counts[63] == 2**63 + 2**63 - 1
    few = detached(net, max_length=1, sources="embed")(TOKENS).statistics(by="length")
    only = path_lengths(net, TOKENS, sources="embed")
    assert oracles.relative_error(only.norm[:2], few.norm) < 1e-9
    assert len(only.labels) == 65


def test_paths_can_be_left_out():
    net = network(*THREE_STAGES)
    trace = net.trace(TOKENS)
    for options in ({"avoiding": "attn"}, {"avoiding": ["1_mlp", "bias"]}, {"sources": "embed"}):
        paths = detached(net, **options)(trace)
        found, wanted = path_lengths(net, trace, **options), paths.statistics(by="length")
        assert found.labels == wanted.labels and found.counts == wanted.counts
        assert oracles.relative_error(found.effect, wanted.effect) < 1e-10
    found = path_sums(net, trace, avoiding="0_attn")
    wanted = detached(net, avoiding="0_attn")(trace).statistics(by="component")
    assert found.labels == ["0_mlp", "1_mlp", "2_attn"]
    order = [wanted.labels.index(label) for label in found.labels]
    assert oracles.relative_error(found.effect, wanted.effect[order]) < 1e-10


def test_jets_have_statistics_too():
    net = network(*THREE_STAGES)
    trace = net.trace(TOKENS)
    paths = exponential_expansion(net, 1)(trace)
    found = paths.statistics(targets=4)
    for index in (0, 3, 11):
        check(found, index, paths.logits(paths.labels[index]), trace.logits)
    lengths = paths.statistics(by="length")
    assert lengths.labels == ["0", "1", "2", "3"] and lengths.counts == [1, 4, 5, 2]
    twos = sum(paths.logits(path) for path in paths if path.count(" > ") == 3)
    check(lengths, 2, twos, trace.logits)
    through = paths.statistics(by="component")
    mlp = sum(paths.logits(path) for path in paths if "> 1_mlp >" in path)
    check(through, through.labels.index("1_mlp"), mlp, trace.logits)


@pytest.mark.parametrize("spec", FAMILIES[:1], ids=str)
def test_averages_over_prompts_are_those_of_single_prompts(spec):
    """Lists of prompts of unequal length: padding counts nowhere."""
    net = ResidualNetwork(zoo.build(spec))
    prompts = ["w5 w17 w8 w30", "w11 w6", "w40 w41 w42"]
    lengths = [5, 3, 4]  # with the beginning-of-sequence token
    many = path_lengths(net, prompts)
    assert many.valid.sum(1).tolist() == lengths and many.share[0][~many.valid].isnan().all()
    assert (many.top_ids[:, ~many.valid] == -1).all()
    alone = [path_lengths(net, prompt) for prompt in prompts]
    table = many.average(include_sinks=True)
    for name in ("norm", "cosine", "share", "effect", "size", "copies"):
        single = np.stack([statistics.average(include_sinks=True)[name].to_numpy() for statistics in alone])
        wanted = (single * np.array(lengths)[:, None]).sum(0) / sum(lengths)
        assert table[name].to_numpy() == pytest.approx(wanted, rel=1e-8, abs=1e-10), name
    paths = detached(net, max_length=1)(prompts)
    assert len(paths.to_dataframe()) == len(paths) * sum(lengths)
    components = path_sums(net, prompts).average(include_sinks=True).set_index("component")
    assert components.loc["0_mlp", "share"] == pytest.approx(
        sum(
            n * path_sums(net, p).average(include_sinks=True).set_index("component").loc["0_mlp", "share"]
            for n, p in zip(lengths, prompts, strict=True)
        )
        / sum(lengths)
    )


@pytest.mark.parametrize("spec", FAMILIES[:1], ids=str)
def test_statistics_of_a_slice_are_those_of_its_prompts(spec):
    net = ResidualNetwork(zoo.build(spec))
    prompts, measures = ["w5 w17 w8 w30", "w11 w6", "w40 w41 w42"], ["norm", "cosine", "share", "effect"]
    expansion = detached(net, max_length=1)
    many, alone = expansion(prompts), [expansion(prompt) for prompt in prompts]
    targets = torch.arange(15).reshape(3, 5) + 3

    def assert_same(found: PathStatistics, wanted: PathStatistics) -> None:
        one, other = found.to_dataframe(), wanted.to_dataframe()
        assert one.drop(columns=measures).equals(other.drop(columns=measures))
        assert one[measures].to_numpy() == pytest.approx(other[measures].to_numpy(), rel=1e-8, abs=1e-12)

    for index, paths in enumerate(alone):
        length = paths.truth.shape[1]
        assert_same(many.apply_slice_to_batch_dim([index]).statistics(), paths.statistics())
        part = many.apply_slice_to_batch_dim([index]).apply_slice_to_pos_dim(slice(0, length))
        ids = targets[[index], :length]
        assert_same(part.statistics(targets=ids, by="length"), paths.statistics(targets=ids, by="length"))
    whole, turned = many.statistics(), many.apply_slice_to_batch_dim([2, 0]).apply_slice_to_pos_dim([3, 1])
    found = turned.statistics()
    assert found.positions == [3, 1] and torch.equal(found.valid, turned.valid)
    assert torch.equal(found.tokens, many.trace.tokens[[2, 0]][:, [3, 1]])
    for name in (*measures, "top_ids"):
        wanted = getattr(whole, name)[:, [2, 0]][:, :, [3, 1]]
        assert torch.equal(wanted[:, ~found.valid].isnan(), getattr(found, name)[:, ~found.valid].isnan())
        assert oracles.relative_error(getattr(found, name)[:, found.valid], wanted[:, found.valid]) < 1e-9, name
    padding = many.apply_slice_to_batch_dim([1]).apply_slice_to_pos_dim([4])
    for refused in (padding.statistics, padding.check):
        with pytest.raises(ValueError, match="needs a real token"):
            refused()


def test_left_padding_counts_nowhere():
    for spec in zoo.available(["gpt2"]):
        model = zoo.build(spec)
        tokens, mask = zoo.padded(model, (6, 3))
        both = path_lengths(model, tokens, attention_mask=mask)
        alone = path_lengths(model, tokens[1:, -3:])
        assert oracles.relative_error(both.share[:, 1:, -3:], alone.share) < 1e-9
        assert both.norm[:, 1, :3].isnan().all()


def statistics(**options: Any) -> PathStatistics:
    return detached(network(*THREE_STAGES))(TOKENS).statistics(**options)


def test_tables_and_histograms():
    found = statistics(targets=[2, 5])
    table = found.to_dataframe()
    assert len(table) == len(found.labels) * 2 * 3 * 2
    row = table[
        (table.path == "embed > 1_mlp > ln_final") & (table.batch == 1) & (table.pos == 2) & (table.target == "5")
    ]
    index = found.labels.index("embed > 1_mlp > ln_final")
    assert row.effect.item() == pytest.approx(float(found.effects[index, 1, 2, 1]))
    assert row.top_token.item() == str(int(found.top_ids[index, 1, 2]))
    average = found.average()
    assert list(average.columns) == [
        *("path", "count", "length", "norm", "cosine", "share", "effect", "effect:5", "size", "copies")
    ]
    assert average.effect[index] == pytest.approx(float(found.effect[index].mean()))
    assert average["effect:5"][index] == pytest.approx(float(found.effects[index, ..., 1].mean()))
    assert average["size"][index] == pytest.approx(float(found.effect[index].abs().mean()))
    assert average.length[index] == 1
    largest = found.largest(3)
    assert largest.effect.abs().tolist() == sorted(average.effect.abs(), reverse=True)[:3]
    counts = found.histogram(bins=7)
    assert counts["count"].sum() == found.norm.numel() and len(counts) == 7
    inside = (found.norm >= counts.left[2]) & (found.norm < counts.right[2])
    assert counts["count"][2] == int(inside.sum())
    shares = found.histogram("share", bins=[-1.0, 0.0, 1.0])
    assert shares["count"].tolist() == [int((found.share < 0).sum()), int((found.share >= 0).sum())]
    assert repr(found).startswith("PathStatistics(24 parts by path, 24 paths; tokens [2, 3]")


@pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")
def test_tokens_are_readable():
    net = ResidualNetwork(zoo.load_stories("bridge", torch.float32))
    found = detached(net, top=3, rank="effect")("Once upon a time, there was a", positions=-1).statistics()
    table = found.to_dataframe()
    assert table.target.unique().tolist() == [" little"]
    assert table.path[0] == "embed > 0_mlp > ln_final"
    assert found.top_tokens()[table.path[0]] == [[table.top_token[0]]]


@pytest.mark.usefixtures("as_users_run_it")
def test_errors_say_what_must_hold():
    net = network(*THREE_STAGES)
    with pytest.raises(ValueError, match="by must be one of"):
        statistics(by="token")
    with pytest.raises(ValueError, match="by must be one of \('component', 'source'\)"):
        path_sums(net, TOKENS, by="length")
    with pytest.raises(ValueError, match="a step or source that is not avoided"):
        path_sums(net, TOKENS, avoiding=["attn", "mlp"])
    with pytest.raises(ValueError, match="measure must be one of"):
        statistics().histogram("size")
    with pytest.raises(ValueError, match="measure must be a column"):
        statistics().largest(3, "loss")
    with pytest.raises(ValueError, match="A filter must name"):
        path_lengths(net, TOKENS, avoiding="9_mlp")
    with pytest.raises(TypeError, match="A model must be"):
        path_lengths(torch.nn.Linear(2, 2), TOKENS)
    assert isinstance(net.view, CallableModel)


@pytest.mark.parametrize("rank", ["length", "effect"])
def test_what_a_beam_is_led_by_is_what_is_measured_and_nothing_at_padding(rank):
    model = zoo.build(zoo.available(["gpt2"])[0])
    net = ResidualNetwork(model)
    tokens, mask = zoo.padded(model, (6, 3))
    trace = net.trace(tokens, attention_mask=mask)
    attribution = LogitAttribution.of(trace, Rows.of(trace, None), None)
    functionals = attribution.functionals(rank)
    assert (functionals[:, ~mask.bool()] == 0).all()
    states = torch.randn(4, *trace["final_post"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts = attribution.augmented(states, states.new_zeros(4))
    found = torch.einsum("mbtd,nbtd->nbtm", functionals, states)[:, mask.bool()]
    logits = states @ net.decoder.W_U
    logits = (logits - logits.mean(-1, keepdim=True))[:, mask.bool()]
    own = net.decoder.logits(net.decoder.norm(trace["final_post"]))[mask.bool()]
    own = own - own.mean(-1, keepdim=True)
    best = own.argmax(-1)[None, :, None].expand(4, -1, 1)
    wanted = (
        logits.gather(-1, best)
        if rank == "effect"
        else (logits * own).sum(-1, keepdim=True) / own.norm(dim=-1)[:, None]
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    sizes = logits.norm(dim=(1, 2)) if rank == "length" else logits.gather(-1, best).abs().sum((1, 2))
    torch.testing.assert_close(attribution.sizes(parts, rank), sizes, rtol=1e-10, atol=1e-10)


def test_best_tokens_of_parts_are_texts_of_their_largest_logits():
    net = ResidualNetwork(zoo.build(FAMILIES[0]))
    paths = detached(net)(net.trace(zoo.tokens(net.view.model, batch=2, pos=5)), positions=[1, 4])
    found = paths.statistics()
    for texts in (found.top_tokens(), found.top_tokens(net.tokenizer)):
        assert list(texts) == paths.labels
        for label in (paths.labels[0], paths.labels[-1]):
            best = paths.logits(label).argmax(-1).tolist()
            assert [[text.strip() for text in row] for row in texts[label]] == [
                [net.tokenizer.decode([token]).strip() for token in row] for row in best
            ]


def test_norms_that_are_zero_have_a_bin_of_their_own():
    found = statistics()
    norm = found.norm.clone()
    norm[3] = norm[5, 1, 2] = 0
    counts = replace(found, norm=norm).histogram(bins=7)
    assert len(counts) == 8 and counts["count"].sum() == norm.numel()
    assert counts["count"][0] == 7 and counts.left[0] == 0 and counts.right[0] == norm[norm > 0].min()


@pytest.mark.parametrize(("factor", "index"), [(-2.0, 27.0), (-0.25, (1.25 / 0.75) ** 3), (1.0, 1.0)])
def test_how_much_paths_cancel(factor, index):
    """Three stages that write a multiple of their stream: sizes are (1 + |f|)^3, the sum (1 + f)^3."""
    embed = torch.nn.Embedding(7, 5, dtype=torch.float64)
    decoder = Decoder(Norm("none"), torch.randn(5, 9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64))
    model = CallableModel(embed, [{f"{i}_mlp": lambda x: factor * x} for i in range(3)], decoder)
    tokens = torch.tensor([[0, 3, 1], [2, 5, 4]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lengths = path_lengths(model, tokens, targets=[3, 5])
        components = path_sums(model, tokens)
        paths = exponential_expansion(model, linearize="detached")(tokens).statistics()
    found = [warning for warning in caught if warning.category is CancellationWarning]
    assert len(found) == (2 if index > 3 else 0)
    for result in (lengths, paths):
        torch.testing.assert_close(result.cancellation, torch.full_like(result.cancellation, index))
        assert result.overall_cancellation == pytest.approx(index)
        assert (f"their sizes are {index:.3g} times their sum" in repr(result)) == (index > 3)
    assert math.isnan(components.overall_cancellation) and bool(components.cancellation.isnan().all())
    assert all(f"{index:.3g} times" in str(warning.message) and warning.filename == __file__ for warning in found)
