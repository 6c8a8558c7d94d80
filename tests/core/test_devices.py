"""Models that TransformerLens spreads over devices: the numbers of one device, and no operation that mixes two."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import zoo
from two_devices import DEVICES, DefaultDevice, TwoDevices, spread

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


# Another default device


@pytest.mark.parametrize("spec", SPECS[:1] + SPECS[-1:], ids=str)
def test_the_default_device_changes_nothing(spec):
    tokens = TOKENS[:1]

    def numbers(model):
        network = ResidualNetwork(model)
        components = network.at("block").components
        weights = [1 / len(components)] * len(components)
        return {
            "iterative lens": tj.iterative_jet_lens(model, tokens, order=1, top_k=3).kl,
            "joint lens": tj.joint_jet_lens(model, tokens, granularity="block", weights=weights).measures.kl,
            "detached map": tj.detached_jacobian(model, tokens).contributions,
            "expansion": tj.jet_expand(model, "ln_final", centers=["embed", "0_mlp_out"], order=1, weights="optimal")(
                tokens
            ).stack(),
            "interactions": tj.paths.interactions(model, tokens, granularity="block").matrix.nan_to_num(),
            "ablation": tj.ablation_effect(model, tokens, ["0_mlp", "L0H1"], mode="resample", reference=TOKENS).logit,
            "zero": tj.ablation_effect(model, tokens, ["0_mlp", "L0H1"], mode="zero").logit,
            "bi-grams": jet_bigrams(model, "mlps", top_k=30, progress=False).scores,
            "trigrams": jet_trigrams(model, 0, 1, top_k=20, progress=False).scores,
            "path sums": tj.path_sums(model, tokens).norm,
        }

    expected = numbers(zoo.fresh(spec, torch.float64))
    model, mode = zoo.fresh(spec, torch.float64), DefaultDevice()
    with mode:
        mode.put(model, DEVICES[0])
        if not hasattr(model, "original_model"):
            model.cfg.device = "cuda:0"
        with tj.detached(model):
            pass
        found = {name: x.cpu() for name, x in numbers(model).items()}
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values.cpu(), atol=1e-10, rtol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


MAKERS = "tensor arange zeros ones full empty eye linspace logspace rand randn randint randperm normal triu_indices tril_indices"


def test_no_tensor_is_made_without_a_device():
    """By the whole library: `torch.set_default_device` would put it somewhere else than what it meets."""
    missing = []
    for path in Path(tj.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS.split():
                named = {keyword.arg for keyword in node.keywords}
                is_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
                if is_torch and not named & {"device", "out", None}:
                    missing.append(f"{path.name}:{node.lineno}")
    assert not missing
