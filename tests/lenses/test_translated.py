"""Translated lenses: what the model itself says when a hook puts the translated stream at its end; objects of other tools."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import zoo
from torch import Tensor, nn

import tl_jets as tj
from tl_jets.calculus.modes import full_precision

SPECS = zoo.available(["gpt2", "llama", "gemma2"])
RAW = [spec for spec in SPECS if spec.processing == "raw"]
PROMPTS = ["w3 w4 w5 w9", "w6 w7 w8 w1"]


def maps_of(network: Any, seed: int = 0) -> dict[str, nn.Linear]:
    """A random affine translator near the identity for every stream but the last."""
    draw, d_model = torch.Generator().manual_seed(seed), network.decoder.d_model
    found = {}
    for label in network.at("sublayer").streams[:-1]:
        found[label] = nn.Linear(d_model, d_model, dtype=torch.float64)
        for parameter, scale in zip(found[label].parameters(), (d_model**-0.5, 1.0), strict=True):
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.data = scale * noise + (torch.eye(d_model) if parameter.ndim == 2 else 0)
    return found


def said(network: Any, trace: Any, stream: Tensor) -> Tensor:
    """The model's own logits with another final stream, put there by TransformerLens' hook."""
    hook = (f"blocks.{network.n_layers - 1}.hook_resid_post", lambda write, hook: stream)
    with torch.no_grad(), full_precision():
        return network.view.model.run_with_hooks(trace.tokens, fwd_hooks=[hook])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_is_what_the_model_says_of_the_translated_stream(spec):
    network = tj.ResidualNetwork(zoo.build(spec))
    maps = maps_of(network)
    trace = network.trace(PROMPTS)
    lens = tj.translated_lens(network, trace, maps, targets=["w40", "w17"], top_k=4)
    assert lens.labels == list(maps) and lens.orders == [0] and lens.translator == "translated"
    truth = trace.logits.log_softmax(-1)
    for i, (label, linear) in enumerate(maps.items()):
        log_probs = said(network, trace, linear(trace[label])).log_softmax(-1)
        kl = (truth.exp() * (truth - log_probs)).sum(-1)
        torch.testing.assert_close(lens.kl[i, 0], kl, rtol=1e-9, atol=1e-10)
        assert torch.equal(lens.top_ids[i, 0], log_probs.topk(4).indices)
        ranks = (log_probs[..., None, :] > log_probs[..., lens.target_ids[0, 0], None]).sum(-1)
        assert torch.equal(lens.target_ranks[i, 0], ranks)
        if trace.decoder.transform is None:
            difference = log_probs[..., lens.target_ids[0, 0, 0]] - log_probs[..., lens.target_ids[0, 0, 1]]
            torch.testing.assert_close(lens.logit_difference("w40", "w17")[i, 0], difference, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("spec", RAW[:2], ids=str)
def test_the_control_is_a_random_stream_through_the_translator(spec):
    """The identity has the logit lens' measures and control; a constant is its own control; a projection on the final stream
    sees nothing of what is random."""
    network = tj.ResidualNetwork(zoo.build(spec))
    trace = network.trace(PROMPTS)
    same = dict.fromkeys(network.streams[:-1], lambda stream: stream)
    found, wanted = (
        tj.translated_lens(network, trace, same, seed=3),
        tj.iterative_jet_lens(network, trace, order=0, incl_mid=True, seed=3),
    )
    for kind in ("measures", "control"):
        for name, values in getattr(found, kind).items():
            torch.testing.assert_close(values, getattr(getattr(wanted, kind), name)[:-1], rtol=1e-9, atol=1e-10)
    moved = maps_of(network)
    lens = tj.translated_lens(network, trace, moved, seed=3)
    assert not torch.allclose(lens.control.kl, wanted.control.kl[:-1])
    constant = torch.randn(trace["embed"].shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blind = tj.translated_lens(network, trace, {"1_pre": lambda stream: constant.expand_as(stream)})
    assert torch.equal(blind.kl, blind.control.kl) and blind.kl.min() > 0.1
    # All that the final norm sees along its own stream: the control keeps it.
    norm, final = trace.decoder.norm, trace["final_post"].flatten(0, 1)
    y = norm.center(final)

    def projected(x: Tensor) -> Tensor:
        return (x * y).sum(-1, keepdim=True) / y.square().sum(-1, keepdim=True) * y

    along = tj.translated_lens(network, trace, {"1_pre": projected})
    torch.testing.assert_close(along.kl, along.control.kl, rtol=1e-9, atol=1e-10)


def test_higher_orders_are_jets_at_the_translated_stream():
    network = tj.ResidualNetwork(zoo.build(RAW[0]))
    trace, maps = network.trace(PROMPTS), maps_of(network)
    lens = tj.translated_lens(network, trace, maps, order=2)
    center, y = maps["1_mid"](trace["1_mid"]).double(), trace["final_post"].double()
    jet = tj.calculus.norm_jet(trace.decoder.norm, center, y, 2)
    for order in (0, 1, 2):
        logits = trace.decoder.logits(jet.value(order))
        best = logits.topk(5)
        torch.testing.assert_close(lens["1_mid"].full_values[0, order], best.values, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(zoo.MAJOR < 4, reason="TransformerLens 3 has no Jacobian lens")
def test_a_jacobian_lens_of_transformer_lens():
    from transformer_lens.tools.analysis import JacobianLens

    model = zoo.build(zoo.available(["gpt2"])[0])
    d_model = model.cfg.d_model
    matrix = torch.randn(d_model, d_model, generator=torch.Generator().manual_seed(1)) / d_model**0.5
    theirs = JacobianLens({0: matrix}, n_prompts=1, d_model=d_model)
    tokens = zoo.tokens(model)[:1]
    wanted = theirs.readout(model, tokens, top_k=3, return_full_logits=True)
    found = tj.translated_lens(model, tokens, theirs, top_k=3)
    assert found.labels == ["1_pre"] and found.translator == "JacobianLens"
    torch.testing.assert_close(found.top_ids[0, 0, 0], wanted.lens_topk_indices[0])
    truth, log_probs = (x.double().log_softmax(-1) for x in (wanted.model_logits, wanted.lens_logits[0]))
    torch.testing.assert_close(found.kl[0, 0, 0], (truth.exp() * (truth - log_probs)).sum(-1), rtol=1e-4, atol=1e-5)
    processed = zoo.build(next(spec for spec in SPECS if spec.processing == "processed"))
    with pytest.raises(ValueError, match="compatibility mode"):
        tj.translated_lens(processed, tokens, theirs)


class TunedLens(nn.Module):
    """The members of `tuned_lens.nn.lenses.TunedLens` 0.2.0, and its files."""

    def __init__(self, weight: Tensor, layers: list[nn.Linear]):
        super().__init__()
        self.unembed = nn.Module()
        self.unembed.unembedding = nn.Linear(*weight.T.shape, bias=False, dtype=weight.dtype)
        self.unembed.unembedding.weight.data = weight.clone()
        self.layer_translators = nn.ModuleList(layers)

    def __getitem__(self, item: int) -> nn.Module:
        return self.layer_translators[item]

    def save(self, folder: Any) -> None:
        weight = self.unembed.unembedding.weight.detach().float().numpy()
        digest = hashlib.sha256(str.encode(np.array_str(weight, precision=1))).hexdigest()
        config = {"d_model": weight.shape[1], "num_hidden_layers": len(self.layer_translators), "bias": True}
        torch.save(self.layer_translators.state_dict(), folder / "params.pt")
        (folder / "config.json").write_text(json.dumps(config | {"unembed_hash": digest}))


@pytest.mark.parametrize("spec", RAW[:2], ids=str)
def test_a_tuned_lens_and_its_folder(spec, tmp_path):
    network = tj.ResidualNetwork(zoo.build(spec))
    maps = [maps_of(network)[f"{layer}_pre"] for layer in range(network.n_layers)]
    theirs = TunedLens(network.decoder.W_U.T, maps)
    trace = network.trace(PROMPTS)
    lens = tj.translated_lens(network, trace, theirs)
    assert lens.labels == list(network.streams[:-1:2]) and lens.translator == "TunedLens"
    truth = trace.logits.log_softmax(-1)
    for layer, linear in enumerate(maps):
        stream = trace[f"{layer}_pre"]
        log_probs = said(network, trace, stream + linear(stream)).log_softmax(-1)
        torch.testing.assert_close(
            lens.kl[layer, 0], (truth.exp() * (truth - log_probs)).sum(-1), rtol=1e-9, atol=1e-10
        )
    theirs.save(tmp_path)
    assert torch.equal(tj.translated_lens(network, trace, tmp_path).kl, lens.kl)
    assert tj.translated_lens(network, trace, str(tmp_path)).translator == "TunedLens"
    other = zoo.fresh(spec, seed=1)
    for given in (theirs, tmp_path):
        with pytest.raises(ValueError, match=r"raw weights .* another, or its weights were folded or centered"):
            tj.translated_lens(other, trace.tokens, given)


@pytest.mark.parametrize("spec", RAW[:2], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_are_the_prompts_alone(spec, side):
    """Also in float64 and padded on the left, where Hugging Face's own attention gives NaN."""
    network = tj.ResidualNetwork(zoo.build(spec))
    tokens, mask = zoo.padded(network.view.model, (5, 3, 4))
    tokens, mask = (tokens, mask) if side == "left" else (tokens.flip(1), mask.flip(1))
    options: Any = {"targets": "w40", "seed": None}
    lens = tj.translated_lens(network, tokens, maps_of(network), attention_mask=mask, **options)
    for row, real in enumerate(mask.bool()):
        alone = tj.translated_lens(network, tokens[row : row + 1, real], maps_of(network), **options)
        assert torch.equal(lens.valid[row], real) and not alone.kl.isnan().any()
        for found, wanted in ((lens.kl, alone.kl), (lens.target_logits, alone.target_logits)):
            torch.testing.assert_close(found[:, :, row][:, :, real], wanted[:, :, 0], rtol=1e-8, atol=1e-9)
        assert lens.kl[:, :, row][:, :, ~real].isnan().all()


@pytest.mark.parametrize("spec", [s for s in SPECS if s.name == "gpt2" and s.processing == "processed"], ids=str)
def test_a_tuned_lens_refuses_folded_and_centered_weights(spec):
    processed = tj.ResidualNetwork(zoo.build(spec))
    raw = tj.ResidualNetwork(zoo.build(RAW[0]))
    maps = [nn.Linear(24, 24, dtype=torch.float64) for _ in range(2)]
    for weight in (raw.decoder.W_U.T, processed.decoder.W_U.T):  # an unembedding of these very weights does not help
        with pytest.raises(ValueError, match="folded or centered"):
            tj.translated_lens(processed, PROMPTS, TunedLens(weight, maps))


def test_tables_averages_files_batches_and_views_take_it(tmp_path):
    network = tj.ResidualNetwork(zoo.build(RAW[0]))
    maps = {("resid_post", 0): nn.Linear(24, 24, dtype=torch.float64)}
    lens = tj.translated_lens(network, PROMPTS, maps, name="mine", targets="w40")
    assert "of mine" in repr(lens) and lens["resid_pre", 1].labels == ["1_pre"]
    plain = tj.iterative_jet_lens(network, PROMPTS, order=0)
    table = pd.concat([plain.average().assign(lens="logit lens"), lens.average()])
    assert table.lens.tolist() == ["logit lens"] * 3 + ["mine"] and table.kl.notna().all()
    assert list(lens.average(spread=True).columns[:3]) == ["lens", "layer", "order"]
    assert lens.trajectories().lens.tolist() == ["mine"] and lens.verdict().lines
    loaded = tj.load(lens.save(tmp_path / "lens"))
    assert loaded.translator == "mine" and loaded._repr_html_() == lens._repr_html_()
    parts = [tj.translated_lens(network, [prompt], maps, name="mine", targets="w40") for prompt in PROMPTS]
    torch.testing.assert_close(tj.concat(parts).kl, lens.kl)
    torch.testing.assert_close(tj.over_prompts(tj.translated_lens, network, PROMPTS, translators=maps).kl, lens.kl)
    with pytest.raises(ValueError, match="translator must be equal in all results; got 'mine' and 'other'"):
        tj.concat([parts[0], tj.translated_lens(network, PROMPTS, maps, name="other", targets="w40")])
    assert tj.to_circuitsvis(lens, measure="kl").title == "kl by layer, order 0"
    with pytest.raises(ValueError, match="'mine' translated them"):
        lens.log_probs("1_pre", trace=network.trace(PROMPTS))


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_translator_is_refused():
    network = tj.ResidualNetwork(zoo.build(RAW[0]))
    for wrong, said in (
        ({"1_pre": lambda x: network.decoder.logits(x)}, r"\[10, 24\] here; that of 1_pre returned \[10, 61\]\. Leave"),
        ({"1_pre": lambda x: x * torch.inf}, "not all finite"),
        ({"final_post": lambda x: x}, r"streams before final_post, which needs none: .*; got \['final_post'\]"),
        ({"1_mlp_out": lambda x: x}, r"got \['1_mlp_out'\]"),
        ({}, "got none"),
    ):
        with pytest.raises(ValueError, match=said):
            tj.translated_lens(network, PROMPTS, wrong)
    for wrong in (3, {"1_pre": 2}, [lambda x: x]):
        with pytest.raises(TypeError, match="a dict of functions by stream"):
            tj.translated_lens(network, PROMPTS, wrong)
    with pytest.raises(ValueError, match="order must be an integer >= 0"):
        tj.translated_lens(network, PROMPTS, {"1_pre": lambda x: x}, order=-1)
