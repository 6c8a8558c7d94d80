"""Two runs side by side: exact sums of their difference, and single writes patched, against hooks and other tools."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

import tl_jets as tj
from tl_jets.calculus import full_precision
from tl_jets.circuits.attribution_patching import attribution_patching
from tl_jets.circuits.contrast import contrast
from tl_jets.circuits.faithfulness import circuit_faithfulness
from tl_jets.circuits.patching import compare_patching
from tl_jets.interventions.hooks import patch_hooks

SPECS = [spec for spec in zoo.available(["gpt2", "llama"]) if spec.processing == "raw"]
# Heads of one family, sublayers of the others.
GRANULARITIES = [(spec, "head" if spec.name == "gpt2" else "sublayer") for spec in SPECS]
GEMMA = [(spec, "sublayer") for spec in zoo.available(["gemma2"])[:1]]
TARGETS = [5, 9]


def prompts(model: Any) -> tuple[Tensor, Tensor]:
    return zoo.tokens(model, 2, 4), zoo.tokens(model, 2, 4, seed=4)


def differences(logits: Tensor) -> Tensor:
    return (logits[:, -1, TARGETS[0]] - logits[:, -1, TARGETS[1]]).double()


def run(model: Any, tokens: Tensor, hooks: Any = ()) -> Tensor:
    with torch.no_grad(), full_precision():
        return differences(model.run_with_hooks(tokens, fwd_hooks=list(hooks)))


@pytest.mark.parametrize(("spec", "granularity"), GRANULARITIES, ids=str)
def test_the_parts_of_two_runs_sum_to_their_difference(spec, granularity):
    model = zoo.build(spec)
    clean, corrupted = prompts(model)
    network = tj.ResidualNetwork(model, granularity)
    whole = run(model, clean) - run(model, corrupted)
    for by in ("write", "source", "length", "path"):
        found = contrast(network, clean, corrupted, by=by, targets=TARGETS, top=100_000)
        torch.testing.assert_close(found.difference.sum(0), whole, rtol=0, atol=1e-9)
        assert found.remainder.abs().max() < 1e-9 < found.difference.abs().max()
    expansion = tj.exponential_expansion(network, linearize="detached")
    for tokens, own in ((clean, found.clean), (corrupted, found.corrupted)):
        statistics = expansion(tokens, positions=-1).statistics(targets=TARGETS)
        expected = dict(
            zip(statistics.labels, statistics.effects[:, :, 0, 0] - statistics.effects[:, :, 0, 1], strict=True)
        )
        assert expected.keys() <= set(found.labels)
        for label, effect in zip(found.labels, own, strict=True):
            torch.testing.assert_close(effect, expected.get(label, torch.zeros(2)).double(), rtol=0, atol=1e-9)
    sizes = found.difference.mean(-1).abs()
    assert (sizes[1:] <= sizes[:-1] + 1e-12).all()


def frozen_terms(model: Any, tokens: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's stream, the gradient of the logit difference there with patterns, scales and gates frozen, and the difference."""
    kept: list[Tensor] = []

    def keep(stream: Tensor, hook: Any) -> Tensor:
        kept.append(stream.detach().requires_grad_())
        return kept[0]

    with torch.enable_grad(), tj.detached(model), full_precision():
        found = differences(model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", keep)]))
        (gradient,) = torch.autograd.grad(found.sum(), kept[0])
    return kept[0].detach(), gradient, found.detach()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("spec", "granularity"), GRANULARITIES, ids=str)
def test_the_detached_map_of_a_difference_by_token_and_write(spec, granularity, layer):
    """Against autograd through TransformerLens' own pass: parts, both changes and their sums, at the embeddings and inside."""
    model = zoo.build(spec)
    clean, corrupted = prompts(model)
    network = tj.ResidualNetwork(model, granularity)
    (x, g, m), (y, k, n) = (frozen_terms(model, tokens, layer) for tokens in (clean, corrupted))
    found = contrast(network, clean, corrupted, by="token", targets=TARGETS, at=("resid_pre", layer))
    assert found.labels == ["0", "1", "2", "3", "bias"] and found.at == f"{layer}_pre"
    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(found.clean[:-1].T, (g * x).sum(-1), **close)
    torch.testing.assert_close(found.corrupted[:-1].T, (k * y).sum(-1), **close)
    torch.testing.assert_close(found.from_input[:-1].T, ((g + k) / 2 * (x - y)).sum(-1), **close)
    torch.testing.assert_close(found.from_map[:-1].T, ((g - k) * (x + y) / 2).sum(-1), **close)
    torch.testing.assert_close(found.from_input + found.from_map, found.difference, **close)
    assert found.from_input.abs().max() > 1e-3 < found.from_map.abs().max()
    fine = contrast(network, clean, corrupted, by="write_token", targets=TARGETS, at=("resid_pre", layer))
    for parts in (found, fine):
        torch.testing.assert_close(parts.clean.sum(0), m, **close)
        torch.testing.assert_close(parts.difference.sum(0), m - n, **close)
    trace = network.trace(clean)
    for label in [label for label in network.components if layer or label in network.sources]:
        if label in network.sources or label in [
            step.write for stage in network.at("sublayer").stages[:2] for step in stage.steps
        ]:
            own = fine.clean[[fine.labels.index(f"{label} @ {pos}") for pos in range(4)]].T
            torch.testing.assert_close(own, (g * trace[label]).sum(-1), **close)


def test_tokens_of_unequal_prompts_and_names():
    model = zoo.build(SPECS[0])
    alone = contrast(model, "w3 w4 w5", "w3 w9 w5", by="token", targets=TARGETS)
    assert alone.labels[2:4] == ["2 ·w4|·w9", "3 ·w5"]
    both = contrast(model, ["w3 w4 w5", "w8 w7 w6 w2 w1"], ["w3 w9 w5", "w8 w7 w6 w1 w1"], by="token", targets=TARGETS)
    torch.testing.assert_close(both.difference[[0, 1, 2, 3, -1], 0], alone.difference[:, 0], rtol=0, atol=1e-9)
    assert not both.clean[4:6, 0].any()
    assert list(alone.to_dataframe()) == ["token", "clean", "corrupted", "difference", "from_input", "from_map"]
    with pytest.raises(ValueError, match=r"`at` must be a stream of the network, .*; got '0_mlp_out'"):
        contrast(model, "w3 w4", "w3 w9", by="token", at="0_mlp_out", targets=TARGETS)
    with pytest.raises(ValueError, match="got at='1_pre' by 'write'"):
        contrast(model, "w3 w4", "w3 w9", by="write", at="1_pre", targets=TARGETS)


def test_layers_and_components_are_those_of_their_tools():
    model = zoo.build(SPECS[0])
    clean, corrupted = prompts(model)
    found = contrast(model, clean, corrupted, by="layer", targets=TARGETS, order=2)
    lens = tj.iterative_jet_lens(model, corrupted, order=2, targets=TARGETS, positions=-1, incl_mid=True)
    torch.testing.assert_close(
        found.corrupted, lens.logit_difference(*TARGETS)[:, -1, :, 0].double(), rtol=0, atol=1e-9
    )
    torch.testing.assert_close(found.clean[-1], found.clean_total, rtol=0, atol=1e-9)
    found = contrast(model, clean, corrupted, targets=TARGETS)
    sums = tj.path_sums(model, clean, targets=TARGETS, positions=-1).effects[:, :, 0]
    torch.testing.assert_close(found.clean, sums[..., 0] - sums[..., 1], rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="by 'path'"):
        found.to_circuit()


def test_other_parts_are_refused(as_users_run_it):
    model = zoo.build(SPECS[0])
    with pytest.raises(ValueError, match="by must be one of"):
        contrast(model, *prompts(model), by="head")


def test_the_paths_of_a_contrast_are_a_circuit(tmp_path):
    model = zoo.build(SPECS[0])
    clean, corrupted = prompts(model)
    found = contrast(model, clean, corrupted, by="path", targets=TARGETS, top=30)
    circuit = found.to_circuit(5)
    assert {str(path) for path in circuit.paths()} >= {label for label in found.labels[:5] if label != "ln_final_bias"}
    by_hand = circuit_faithfulness(model, clean, corrupted, found.labels[:5], targets=TARGETS, random=0)
    measured = circuit_faithfulness(model, clean, corrupted, found, k=5, targets=TARGETS, random=0)
    assert torch.equal(measured.logit_difference, by_hand.logit_difference)
    assert tj.load(found.save(tmp_path / "contrast.safetensors")).to_dataframe().equals(found.to_dataframe())


@pytest.mark.parametrize(("spec", "granularity"), GRANULARITIES + GEMMA, ids=str)
def test_patched_writes_are_those_of_hooks_and_jets_their_series(spec, granularity):
    """Jets against central differences of hooked runs, attribution against the sums of its edges."""
    model = zoo.build(spec)
    clean, corrupted = prompts(model)
    network = tj.ResidualNetwork(model, granularity)
    sites = ["embed", "0_mlp", "0_attn" if granularity == "sublayer" else "L0H2"]
    found = compare_patching(network, clean, corrupted, sites, order=2, targets=TARGETS)
    scores = attribution_patching(network, clean, corrupted, targets=TARGETS).edges
    to, start = network.trace(clean), network.trace(corrupted)

    def hooked(site: str, size: float) -> Tensor:
        """The logit difference, before a softcap, with a part of the way gone."""
        write = site if site == "embed" else f"{site}_out"
        added = size * (to[write] - start[write])
        kind = "resid_pre" if site == "embed" else "mlp_out" if site.endswith("mlp") else "attn_out"
        layer = 0 if site == "embed" else network.stage(site).steps[0].layer
        with model.hooks([(f"blocks.{layer}.hook_{kind}", lambda x, hook: x + added)]), full_precision():
            final = network.trace(corrupted)["final_post"]
        return differences(network.decoder.logits(network.decoder.norm(final)))

    for i, site in enumerate(sites):
        base = hooked(site, 0.0)
        torch.testing.assert_close(found.change[0, i], hooked(site, 1.0) - base, rtol=1e-6, atol=1e-9)
        first = (hooked(site, 1e-4) - hooked(site, -1e-4)) / 2e-4
        second = (hooked(site, 1e-4) + hooked(site, -1e-4) - 2 * base) / 2e-8
        torch.testing.assert_close(found.change[1, i], first, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.change[2, i], first + second, rtol=1e-4, atol=1e-5)
        assert (found.change[2, i] - found.change[1, i]).abs().max() > 1e-5
        total = sum(score for writer, _, score in scores if writer == site)
        assert total == pytest.approx(float(found.change[1, i].mean()), rel=1e-6, abs=1e-9)
        if site != "embed" and network.decoder.transform is None:
            patched = run(model, corrupted, patch_hooks(network, site, to)) - run(model, corrupted)
            torch.testing.assert_close(found.change[0, i], patched, rtol=1e-6, atol=1e-9)


def test_the_table_says_which_estimate_agrees():
    model = tj.load_tinydocs()
    clean, corrupted = "This function is available on Unix and", "This module is deprecated since version and"
    found = compare_patching(model, clean, corrupted, order=3)
    assert found.sites[0] == "embed" and len(found.sites) == 9
    by_name = compare_patching(model, clean, corrupted, ("mlp_out", -1), order=1)
    assert by_name.sites == ["3_mlp"] and by_name.methods == ["activation", "attribution"]
    torch.testing.assert_close(by_name.change[:, 0], found.change[:2, -1])
    table, agreement = found.to_dataframe(), found.agreement()
    expected = (table["jet 2"] - table.activation).abs().mean() / table.activation.abs().mean()
    assert agreement.set_index("method").error["jet 2"] == pytest.approx(expected)
    assert (agreement.closer.iloc[0], agreement.method.tolist()) == (0.0, ["attribution", "jet 2", "jet 3"])
    for bad in ("7_mlp", []):
        with pytest.raises(ValueError, match="sites must be"):
            compare_patching(model, clean, corrupted, bad)
    with pytest.raises(ValueError, match="equal length"):
        compare_patching(model, clean, "This")
    with pytest.raises(ValueError, match="equal length"):
        contrast(model, clean, "This")
