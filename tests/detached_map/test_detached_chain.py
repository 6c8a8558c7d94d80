"""Chains of stages: kept graphs and remade ones give the same map; remade ones take the memory of one stage."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
import zoo
from live_memory import peak_bytes
from torch import Tensor

from tl_jets import CallableModel, Decoder, Norm, ResidualNetwork
from tl_jets.core.factors import Span
from tl_jets.core.frozen_network import freeze_stacked
from tl_jets.detached_map import composed_jacobian, detached_jacobian, detached_spectra
from tl_jets.detached_map.composed_jacobian import ComposedJacobian
from tl_jets.detached_map.stage_products import StageProducts


@pytest.fixture(
    params=[spec for spec in zoo.available(["gpt2", "pythia", "llama"]) if spec.processing == "raw"], ids=str
)
def model(request: pytest.FixtureRequest) -> Any:
    return zoo.build(request.param)


@pytest.mark.parametrize("output", ["final_post", "logits", "1_mlp_out", "L1H1_out"])
def test_what_is_kept_changes_nothing(model, output):
    network = ResidualNetwork(model)
    trace = network.trace(zoo.tokens(model, batch=2, pos=4))
    kept, remade = (detached_jacobian(network, trace, output=output, keep_graph=keep) for keep in (True, False))
    assert all(part.kept is not None for part in kept.map.parts)
    assert all(part.kept is None for part in remade.map.parts)
    assert oracles.relative_error(remade.materialize(), kept.materialize()) < 1e-13
    assert kept.ordinary is not None and remade.ordinary is not None
    u = torch.randn(kept.map.in_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert oracles.relative_error(remade.apply(u), kept.apply(u)) < 1e-13
    assert oracles.relative_error(remade.ordinary.apply(u), kept.ordinary.apply(u)) < 1e-13
    assert oracles.relative_error(remade.bias, kept.bias) < 1e-14


def test_a_truncated_svd_of_what_is_remade():
    network = ResidualNetwork(deep(2))
    trace = network.trace(torch.tensor([[0, 3, 1]]))
    kept, remade = (detached_jacobian(network, trace, keep_graph=keep, ordinary=False) for keep in (True, False))
    assert all(part.kept is None for part in remade.map.parts)
    assert oracles.relative_error(remade.svd(2).values, kept.svd(2).values) < 1e-6
    assert oracles.relative_error(remade.svd(2).right, kept.svd(2).right) < 1e-4


def test_large_graphs_are_not_kept(model, monkeypatch):
    network = ResidualNetwork(model)
    trace = network.trace(zoo.tokens(model, batch=1, pos=5))
    assert detached_jacobian(network, trace).map.parts[0].kept is not None
    monkeypatch.setattr(composed_jacobian, "GRAPH_BYTES", 1000)  # and a hundredth of the matrix is less than that
    J = detached_jacobian(network, trace)
    assert all(part.kept is None for part in J.map.parts) and J.reconstruction_error < 1e-12
    assert all(part.kept is not None for part in detached_jacobian(network, trace, keep_graph=True).map.parts)


def test_a_map_that_is_remade_needs_its_hooks(model):
    tokens = zoo.tokens(model, batch=1, pos=5)
    hooks = [("blocks.1.attn.hook_z", lambda z, hook: z * 0.5)]
    network = ResidualNetwork(model)
    with model.hooks(hooks):
        kept = detached_jacobian(network, tokens, keep_graph=True)
        remade = detached_jacobian(network, tokens, keep_graph=False)
        expected = remade.materialize()
    assert oracles.relative_error(kept.materialize(), expected) < 1e-13
    with pytest.raises(ValueError, match="hooks on the model have changed"):
        remade.materialize()
    assert kept.ordinary is not None
    with pytest.raises(ValueError, match="hooks on the model have changed"):
        kept.ordinary.apply(kept.map.point)


@pytest.mark.parametrize("many", [3, 40], ids=["products", "matrices by position"])
def test_one_pass_through_many_maps(model, many):
    network = ResidualNetwork(model)
    trace = network.trace(zoo.tokens(model, batch=1, pos=4))
    outputs = ["1_mlp_out", "0_attn_out", "final_post", "1_pre"]
    composed = ComposedJacobian(trace, "embed", outputs, [2])
    u = torch.randn(many, *composed.point.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = {output: part.T for output, (part,) in composed.on_the_way(spans_of(u))}
    assert set(found) == set(outputs)
    for output in outputs:
        alone = detached_jacobian(network, trace, output=output, positions=2, ordinary=False)
        assert oracles.relative_error(found[output], alone.apply(u)[:, 0, 0]) < 1e-13


def spans_of(vectors: Tensor, start: int = 0) -> list[Span]:
    """Vectors [many, 1, pos, d_model] from one position on."""
    return [Span(start, vectors[:, 0, start:].permute(1, 2, 0).clone())]


# A bridge's OPT has no MLP that can be called.
READ = [spec for spec in zoo.available() if spec.processing == "raw" and (spec.world, spec.name) != ("bridge", "opt")]


@pytest.mark.parametrize("spec", READ, ids=str)
def test_factors_are_the_graph_of_every_family(spec):
    """Forwards from a position on, and backwards, with few vectors and with many, against the frozen stage's own graph."""
    network = ResidualNetwork(zoo.build(spec)).at("sublayer")
    trace = network.trace(zoo.tokens(network.view.model, batch=1, pos=6))
    unread = {"olmo": "attn", "solu_ln": "mlp"}.get(spec.name)  # values are clamped; neurons pass a norm
    for stage in network.stages:
        products, graph = (
            StageProducts.of(trace, stage),
            freeze_stacked(trace.stage_function(stage), trace[stage.stream])[0],
        )
        assert (products.factors is None) == (unread in [step.kind for step in stage.steps])
        for many, start in ((2, 0), (70, 3)):
            u = torch.randn(
                many, *trace[stage.stream].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
            )
            u[:, :, :start] = 0
            ((*writes,),) = products.writes(spans_of(u, start))
            wanted = graph.apply_rows(u)[:, 0].split(u.shape[-1], -1)
            for write, own in zip(writes, wanted, strict=True):
                assert oracles.relative_error(write.over(0, 6).vectors.permute(2, 0, 1), own) < 1e-13
            if products.factors is not None:
                (back,) = products.pulled_back(spans_of(u, start))
                wanted = u + graph.apply_transpose_rows(u.repeat(1, 1, 1, len(stage.steps)))
                assert oracles.relative_error(back.over(0, 6).vectors.permute(2, 0, 1), wanted[:, 0]) < 1e-13
                assert back.start == (start if products.factors[0].is_local else 0)


def test_what_factors_do_not_see_is_left_to_the_graph(model):
    """Hooks that average neurons or values over positions, or make a pattern look ahead."""
    tokens = zoo.tokens(model, batch=1, pos=4)
    hooks = {
        "mlp.hook_post": lambda post, hook: post + post.mean(1, keepdim=True),
        "attn.hook_z": lambda z, hook: z + z.flip(1),
        "attn.hook_pattern": lambda pattern, hook: (pattern + pattern.mT) / 2,
    }
    for name, hook in hooks.items():
        with model.hooks([(f"blocks.1.{name}", hook)]):
            network = ResidualNetwork(model)
            trace = network.trace(tokens)
            stage = next(stage for stage in network.at("sublayer").stages if stage.steps[0].layer == 1)
            stage = network.at("sublayer").stage("1_mlp") if "mlp" in name else stage
            is_read = StageProducts.of(trace, stage).factors is not None
            assert is_read == (name == "attn.hook_pattern")
            spectra = detached_spectra(network, trace, position=2, k=3)
            J = detached_jacobian(network, trace, positions=2, ordinary=False)
            by_rows = J.materialize(chunk_size=7)  # by the graph
            assert oracles.relative_error(J.materialize(), by_rows) < 1e-13
            assert oracles.relative_error(spectra.values[-1], torch.linalg.svdvals(by_rows[0, 0].flatten(1))[:3]) < 1e-7


def deep(layers: int) -> CallableModel:
    """MLPs wider than the stream, whose gates are what a graph holds."""
    generator = torch.Generator().manual_seed(0)
    decoder = Decoder(Norm("RMS"), torch.eye(16), torch.zeros(16))

    def stage(layer: int) -> dict[str, Any]:
        W_in, W_gate = (torch.randn(16, 512, generator=generator) / 4 for _ in range(2))
        W_out = torch.randn(512, 16, generator=generator) / 64
        return {f"{layer}_mlp": lambda x: (torch.nn.functional.silu(x @ W_gate) * (x @ W_in)) @ W_out}

    table = torch.randn(5, 16, generator=generator)
    return CallableModel(lambda tokens: table[tokens], [stage(layer) for layer in range(layers)], decoder)


def test_memory_is_that_of_one_stage():
    tokens = torch.randint(5, (1, 400), generator=torch.Generator().manual_seed(0))

    def peak(layers: int, keep: bool) -> float:
        network = ResidualNetwork(deep(layers))
        trace = network.trace(tokens)

        def work() -> Any:
            J = detached_jacobian(network, trace, keep_graph=keep)
            return J, J.apply_transpose(J.apply(torch.ones(J.map.in_shape)))

        return peak_bytes(work) / (400 * 512 * 4)  # in gates

    assert peak(4, True) > 3 and peak(16, True) > 15
    assert peak(16, False) < 1.1 * peak(4, False) + 2
    assert peak(16, False) < peak(16, True) / 2
