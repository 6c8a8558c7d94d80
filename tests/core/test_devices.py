"""Models that TransformerLens spreads over devices: the numbers of one device, and no operation that mixes two."""

from __future__ import annotations

import pytest
import torch
import zoo
from two_devices import DEVICES, TwoDevices, spread

import tl_jets as tj
from tl_jets.core.network import ResidualNetwork
from tl_jets.ngrams import bigram_log_normalizers, jet_bigrams, jet_trigrams
from tl_jets.ngrams.streams import mlp_steps

SPECS = [spec for spec in zoo.available(["gpt2", "pythia", "llama", "gemma2", "olmo2"]) if spec.processing == "raw"]
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def results(model):
    """Numbers by name: tables of n-grams, and writes of blocks, sublayers, heads and neurons."""
    network = ResidualNetwork(model)
    heads = jet_trigrams(model, network.view.n_layers - 1, [0, 1], top_k=20, progress=False)
    found = {f"head {head}": table.scores for head, table in heads.items()}
    found["first layer"] = jet_trigrams(model, 0, 1, top_k=20, normalize="pair").scores
    for path in ("mlps", "direct", mlp_steps(network)):
        found[f"bi-grams {path}"] = jet_bigrams(network, path, top_k=30, progress=False).scores
    found["rows"] = jet_bigrams(network, "mlps", top_k=2, per="row", progress=False).scores
    found["normalizers"] = bigram_log_normalizers(network, "mlps")
    for granularity in ("block", "sublayer", "head"):
        finer = network.at(granularity)
        trace = finer.trace(TOKENS)
        for stage in finer.stages:
            found[f"{granularity} {stage.stream}"] = trace.stage_function(stage)(1.1 * trace[stage.stream])
    for layer in range(network.view.n_layers):
        found[f"neuron {layer}"] = network.trace(TOKENS)[f"L{layer}N2_out"]
    found["iterative lens"] = tj.iterative_jet_lens(network, TOKENS, order=1, top_k=3).kl
    found["joint lens"] = tj.joint_jet_lens(network, TOKENS, order=0).weights
    found["detached map"] = tj.detached_jacobian(network, TOKENS).contributions
    left = torch.ones_like(TOKENS)
    left[0, :2] = 0
    found["padded"] = network.trace(TOKENS, attention_mask=left)["final_post"][left.bool()]
    return found


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_model_on_two_devices_gives_the_numbers_of_one(spec):
    expected = results(zoo.fresh(spec, torch.float64))
    model, mode = zoo.fresh(spec, torch.float64), TwoDevices()
    with mode:
        spread(mode, model)
        found = {name: x.cpu() for name, x in results(model).items()}
    assert min(mode.operations.values()) > 1000
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values.cpu(), atol=1e-10, rtol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_mixing_devices_fails_and_moving_does_not():
    with TwoDevices() as mode:
        x = torch.ones(3, device=DEVICES[0])
        y = (2 * x.to(DEVICES[1])).double()
        assert [str(z.device) for z in (x, y, x @ x, y.cpu())] == ["cuda:0", "cuda:1", "cuda:0", "cpu"]
        for mixed in (lambda: x + y, lambda: torch.cat([x, y]), lambda: x[y.long()], lambda: torch.ones(3) * x):
            with pytest.raises(RuntimeError, match="mixes devices"):
                mixed()
        with pytest.raises(RuntimeError, match="to numpy"):
            x.numpy()
        assert float((x * torch.tensor(2.0)).sum()) == 6
        assert mode.operations[DEVICES[1]] > 0
