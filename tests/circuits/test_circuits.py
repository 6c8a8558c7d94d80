"""Circuits: attribution patching and faithfulness against TransformerLens' own, finite differences, hooks, and by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

import tl_jets as tj
from tl_jets.calculus import full_precision
from tl_jets.circuits.attribution_patching import attribution_patching
from tl_jets.circuits.faithfulness import circuit_faithfulness
from tl_jets.interop.circuits import from_transformer_lens, to_transformer_lens
from tl_jets.interventions.hooks import ablation_hooks, patch_hooks
from tl_jets.paths.circuit import Circuit

SPECS = [spec for spec in zoo.available(["gpt2", "pythia", "llama", "gemma2"]) if spec.processing == "raw"]
TARGETS = [5, 9]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Tensor, Tensor]:
    """tinydocs and two prompts of five tokens."""
    return tj.load_tinydocs(), torch.tensor([[3, 77, 120, 41, 200]]), torch.tensor([[3, 90, 120, 17, 200]])


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, TARGETS[0]] - logits[:, -1, TARGETS[1]]).mean()


def every(circuit: Circuit) -> dict[tuple[str, str, int | None], float]:
    return {(w, r, place): s for (w, r, s), place in zip(circuit.edges, circuit.positions, strict=True)}


def edge_attribution(pair: Any) -> Any:
    ap = pytest.importorskip("transformer_lens.tools.analysis.attribution_patching")
    if zoo.MAJOR < 4:
        pytest.skip("TransformerLens 3.9 has no edges")
    model, clean, corrupted = pair
    return ap, ap.attribution_patch(model, clean, corrupted, metric, ap.EdgeAttributionConfig("edge"))


def test_attributions_of_edges_are_transformer_lens(pair):
    _, theirs = edge_attribution(pair)
    ours = attribution_patching(tj.ResidualNetwork(pair[0], "head"), *pair[1:], targets=TARGETS, by_position=True)
    expected = every(from_transformer_lens(theirs).merged())
    found = {key: score for key, score in every(ours).items() if not key[0].endswith("_attn_bias")}
    assert found.keys() == expected.keys() and len(found) > 1000
    worst = max(abs(found[key] - expected[key]) for key in found)
    assert worst < 1e-4 * max(map(abs, expected.values()))


def test_attributions_of_nodes_are_transformer_lens_in_both_versions(pair):
    ap = pytest.importorskip("transformer_lens.tools.analysis.attribution_patching")
    model, clean, corrupted = pair
    expected = every(from_transformer_lens(ap.attribution_patch(model, clean, corrupted, metric)))
    ours = attribution_patching(tj.ResidualNetwork(model, "head"), clean, corrupted, targets=TARGETS, by_position=True)
    total: dict[Any, float] = {}
    for (writer, _, place), score in every(ours).items():
        total[writer, "ln_final", place] = total.get((writer, "ln_final", place), 0.0) + score
    worst = max(abs(total[key] - expected[key]) for key in expected)
    assert len(expected) > 50 and worst < 1e-4 * max(map(abs, expected.values()))


@pytest.mark.parametrize("of", ["attribution", "random", "paths"])
def test_faithfulness_of_edges_is_transformer_lens(pair, of):
    ap, scores = edge_attribution(pair)
    model, clean, corrupted = pair
    network = tj.ResidualNetwork(model, "head")
    if of == "paths":
        paths = tj.exponential_expansion(network, linearize="detached", top=12, rank="effect", targets=TARGETS)
        circuit = paths(clean, positions=-1).to_circuit(10, targets=TARGETS, by_position=True)
    else:
        graph = from_transformer_lens(scores).merged()
        picked = random.Random(1).sample(range(len(graph.edges)), 700)
        picked = picked if of == "random" else range(len(graph.edges))
        circuit = Circuit([graph.edges[i] for i in picked], [graph.positions[i] for i in picked]).top(400)
    edges = to_transformer_lens(circuit, model, clean.shape[1])
    expected = ap.faithfulness(model, clean, corrupted, metric, edges)
    found = circuit_faithfulness(network, clean, corrupted, circuit, level="edge", targets=TARGETS, random=0)
    row = found.to_dataframe().query("circuit == 'circuit' and baseline == 'corrupted'")
    assert row.recovered.item() == pytest.approx(expected.recovered, rel=1e-4, abs=1e-4)
    assert float(found.clean) == pytest.approx(expected.full_metric, rel=1e-4)
    assert abs(expected.recovered) > 1e-3 and abs(expected.recovered - 1) > 1e-3


def test_nodes_there_and_back(pair):
    _, scores = edge_attribution(pair)
    theirs = [(*edge, score) for edge, score in scores.edge_scores.items()]
    again = to_transformer_lens(from_transformer_lens(scores), pair[0], pair[1].shape[1])
    assert {edge[:2] for edge in again} == {edge[:2] for edge in theirs} and len(again) == len(theirs)
    assert from_transformer_lens(scores.top_edges(3)).edges == from_transformer_lens(scores).top(3).edges
    with pytest.raises(NotImplementedError, match="the embedding, heads, MLPs"):
        to_transformer_lens(Circuit.of_edges([("L0N3", "ln_final")]), pair[0], 5)
    with pytest.raises(ValueError, match="Positions must lie"):
        to_transformer_lens(Circuit.of_paths(["embed"], position=5), pair[0], 5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_faithfulness_of_nodes_is_that_of_hooks(spec):
    """Hooks on everything outside the circuit, under each baseline; prompts of two lengths in one batch."""
    model = zoo.build(spec)
    network = tj.ResidualNetwork(model)
    (clean, mask), other = zoo.padded(model), zoo.tokens(model, seed=3)
    clean, mask = clean[:2], mask[:2]
    corrupted = torch.where(mask.bool(), other[:2, : clean.shape[1]], clean)
    inside = ["embed", *(["pos_embed"] if "pos_embed" in network.sources else []), "0_mlp", "1_attn"]
    outside = [step.label for step in network.steps if step.label not in inside]
    reference = zoo.tokens(model, seed=8)
    circuit = Circuit.of_edges((label, "ln_final") for label in inside)
    options = {"targets": TARGETS, "random": 0, "attention_mask": mask}
    found = circuit_faithfulness(network, clean, corrupted, circuit, reference=reference, **options)
    hooks = {
        "corrupted": patch_hooks(network, outside, network.trace(corrupted, attention_mask=mask)),
        "zero": ablation_hooks(network, outside),
        "mean": ablation_hooks(network, outside, mode="mean", reference=reference),
    }
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    for j, baseline in enumerate(found.baselines):
        with torch.no_grad(), full_precision():
            logits = model.run_with_hooks(clean, attention_mask=mask, fwd_hooks=hooks[baseline])
        if network.decoder.transform is not None:  # measured before the softcap
            with model.hooks(hooks[baseline]):
                trace = network.trace(clean, attention_mask=mask)
                logits = network.decoder.logits(network.decoder.norm(trace["final_post"]))
        rows = logits[torch.arange(2), last]
        expected = rows[:, TARGETS[0]] - rows[:, TARGETS[1]]
        torch.testing.assert_close(found.logit_difference[1, j], expected, rtol=1e-5, atol=1e-7)
        assert (found.logit_difference[1, j] - found.clean).abs().max() > 1e-4


@pytest.mark.parametrize("granularity", ["sublayer", "head"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_attributions_are_derivatives_along_edges(spec, granularity):
    """Finite differences: a run whose reader gets a little of what the clean run's writer adds to the corrupted one's."""
    model = zoo.build(spec)
    network = tj.ResidualNetwork(model, granularity)
    clean, corrupted = zoo.tokens(model, 2, 5), zoo.tokens(model, 2, 5, seed=4)
    scores = every(attribution_patching(network, clean, corrupted, targets=TARGETS))
    a, b = network.trace(clean), network.trace(corrupted)
    head = granularity == "head"
    for writer, reader in (
        ("embed", "L1H1" if head else "1_attn"),
        ("L0H2" if head else "0_attn", "1_mlp"),
        ("0_mlp", "ln_final"),
    ):
        write = writer if writer == "embed" else f"{writer}_out"
        change = a[write] - b[write]

        def difference(size: float, reader: str = reader, change: Tensor = change) -> float:
            if reader == "ln_final":
                final = b["final_post"] + size * change
            else:
                stream = b[network.stage(reader).stream]
                added = b.gamma(reader)(stream + size * change) - b[f"{reader}_out"]
                with model.hooks(added_to(model, network, reader, added)), full_precision():
                    final = network.trace(corrupted)["final_post"]
            logits = network.decoder.logits(network.decoder.norm(final[:, -1]))
            return float((logits[:, TARGETS[0]] - logits[:, TARGETS[1]]).mean())

        slope = (difference(1e-4) - difference(-1e-4)) / 2e-4
        assert scores[writer, reader, None] == pytest.approx(slope, rel=1e-5, abs=1e-8), (writer, reader)
        assert abs(slope) > 1e-5


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.name != "gemma2"], ids=str)
def test_integrated_attributions_are_derivatives_on_the_way_between_embeddings(spec):
    """Finite differences at every step: a little more of a write's change, with the first stream on its way to the clean one."""
    model, steps, size = zoo.build(spec), 3, 1e-4
    network = tj.ResidualNetwork(model)
    clean, corrupted = zoo.tokens(model, 2, 5), zoo.tokens(model, 2, 5, seed=4)
    circuit = attribution_patching(network, clean, corrupted, targets=TARGETS, integration_steps=steps)
    a, b = network.trace(clean), network.trace(corrupted)
    for label in ("0_attn", "0_mlp", "1_mlp"):
        change, point = a[f"{label}_out"] - b[f"{label}_out"], f"blocks.{label[0]}.hook_{label[2:]}_out"

        def value(k: int, dose: float, point: str = point, change: Tensor = change) -> float:
            first = b["0_pre"] + k / steps * (a["0_pre"] - b["0_pre"])
            hooks = [
                ("blocks.0.hook_resid_pre", lambda old, hook: first),
                (point, lambda old, hook: old + dose * change),
            ]
            with torch.no_grad(), full_precision():
                return float(metric(model.run_with_hooks(corrupted, fwd_hooks=hooks)))

        slopes = [(value(k, size) - value(k, -size)) / (2 * size) for k in range(1, steps + 1)]
        score = sum(score for writer, _, score in circuit.edges if writer == label)
        assert score == pytest.approx(sum(slopes) / steps, rel=1e-5, abs=1e-8) and abs(score) > 1e-5, label
    with pytest.raises(ValueError, match="integration_steps must be an integer >= 0"):
        attribution_patching(network, clean, corrupted, targets=TARGETS, integration_steps=-1)


def added_to(model: Any, network: Any, reader: str, added: Tensor) -> list[tuple[str, Callable]]:
    """A hook that adds to what a sublayer, or the one of a head, writes."""
    layer = network.stage(reader).steps[0].layer
    kind = "mlp" if reader.endswith("mlp") else "attn"
    return [(f"blocks.{layer}.hook_{kind}_out", lambda write, hook: write + added)]


@pytest.mark.parametrize("level", ["node", "edge"])
def test_whole_and_empty_circuits_are_the_two_runs(level, pair):
    model, clean, corrupted = pair
    for network in (tj.ResidualNetwork(model), tj.ResidualNetwork(model, "head")):
        whole = attribution_patching(network, clean, corrupted, targets=TARGETS)
        found = circuit_faithfulness(network, clean, corrupted, whole, level=level, targets=TARGETS, random=1)
        torch.testing.assert_close(found.recovered[:, 0], torch.tensor([0.0, 1, 1, 1]).double(), rtol=0, atol=1e-4)


def test_controls_have_the_size_of_the_circuit(pair):
    model, clean, corrupted = pair
    network = tj.ResidualNetwork(model, "head")
    paths = [
        "embed > 0_mlp > ln_final",
        "embed > L0H1 > 2_mlp > ln_final",
        "3_mlp_bias > ln_final",
        "embed > L1H0 > L3H1",
    ]
    for level in ("node", "edge"):
        found = circuit_faithfulness(network, clean, corrupted, paths, k=[2, 4], level=level, targets=TARGETS, random=4)
        size = [len(c.edges) if level == "edge" else len({w for w, *_ in c.edges}) for c in found.circuits]
        assert found.kinds == ["nothing", *(["paths", "attribution", *["random"] * 4] * 2)]
        assert size[2] == size[1] and size[8] == size[7] and size[7] > size[1]
        assert all(n <= size[1] for n in size[3:7]) and max(size[9:]) == size[7]
        drawn = [path for circuit in found.circuits[9:] for path in circuit.paths()]
        assert {path.source for path in drawn} >= {"embed"} and max(path.length for path in drawn) >= 2
    again = circuit_faithfulness(network, clean, corrupted, paths, k=[2, 4], level=level, targets=TARGETS, random=4)
    other = circuit_faithfulness(
        network, clean, corrupted, paths, k=[2, 4], level=level, targets=TARGETS, random=4, seed=1
    )
    assert [c.edges for c in again.circuits] == [c.edges for c in found.circuits] != [c.edges for c in other.circuits]
    summary = found.summary()
    assert len(summary) == 14 and (summary.lowest <= summary.recovered + 1e-9).all()


def test_results_are_saved(pair, tmp_path):
    model, clean, corrupted = pair
    found = circuit_faithfulness(model, clean, corrupted, ["embed > 0_mlp"], targets=TARGETS, random=1)
    loaded = tj.load(found.save(tmp_path / "faithfulness.safetensors"))
    assert loaded.to_dataframe().equals(found.to_dataframe()) and loaded.circuits[1].edges == found.circuits[1].edges


def test_what_cannot_be_compared_is_refused(pair):
    model, clean, corrupted = pair
    faithful = circuit_faithfulness
    with pytest.raises(ValueError, match="equal length in tokens"):
        faithful(model, clean, corrupted[:, 1:], ["embed"])
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="same padding"):
        faithful(model, tj.ResidualNetwork(model).trace(clean, attention_mask=mask), corrupted, ["embed"])
    with pytest.raises(ValueError, match="differ in what is measured"):
        faithful(model, clean, clean, ["embed"], targets=TARGETS)
    with pytest.raises(ValueError, match="two different tokens"):
        faithful(model, clean, corrupted, ["embed"], targets=[5])
    with pytest.raises(ValueError, match="An edge leads from"):
        faithful(model, clean, corrupted, Circuit.of_edges([("1_mlp", "0_mlp")]), targets=TARGETS)
    with pytest.raises(ValueError, match="An edge leads from"):
        faithful(tj.ResidualNetwork(model), clean, corrupted, ["embed > L0H1"], targets=TARGETS, random=0)
    with pytest.raises(ValueError, match="k must be at most"):
        faithful(model, clean, corrupted, ["embed"], k=2, targets=TARGETS)
    with (
        model.hooks([("blocks.1.hook_resid_pre", lambda x, hook: x + 1)]),
        pytest.raises(ValueError, match="edit streams"),
    ):
        faithful(model, clean, corrupted, ["embed"], targets=TARGETS)


def test_circuits_of_paths_and_back():
    texts = ["embed > L0H1 > 1_mlp > ln_final", "embed > 1_mlp > ln_final", "ln_final_bias", "0_mlp_bias > ln_final"]
    circuit = Circuit.of_paths(texts, [1.0, 2.0, 5.0, 0.5], position=3)
    assert every(circuit) == {
        ("embed", "L0H1", None): 1.0,
        ("L0H1", "1_mlp", 3): 1.0,
        ("1_mlp", "ln_final", 3): 3.0,
        ("embed", "1_mlp", 3): 2.0,
        ("0_mlp_bias", "ln_final", 3): 0.5,
    }
    assert {str(path) for path in circuit.paths()} == {texts[0], texts[1], texts[3]}
    assert circuit.to_dot().count(" -> ") == 5 and circuit.to_networkx().number_of_edges() == 5
    with pytest.raises(ValueError, match="max_paths = 2"):
        circuit.paths(max_paths=2)
    with pytest.raises(ValueError, match="from 1_mlp to itself"):
        Circuit.of_edges([("embed", "1_mlp"), ("1_mlp", "2_mlp"), ("2_mlp", "1_mlp")]).paths()
    with pytest.raises(ValueError, match="a position"):
        Circuit([("embed", "ln_final", 1.0)], [])
