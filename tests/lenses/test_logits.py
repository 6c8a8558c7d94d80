"""All logits of a layer and order, against the model's own modules and their derivative."""

from __future__ import annotations

import pytest
import torch
import zoo

import tl_jets as tj
from tl_jets.calculus import full_precision


@pytest.fixture(scope="module", params=zoo.available(["gpt2", "llama", "softcap"]), ids=str)
def model(request):
    return zoo.build(request.param)


def of_model(model, x, y, order):
    """Logits after ln_final and W_U of the jet of ln_final at x, evaluated at y: by forward differentiation."""
    with full_precision():
        value, slope = torch.autograd.functional.jvp(model.ln_final, x, y - x)
        return (value + order * slope) @ model.W_U + model.b_U


def test_logits_are_the_jets_of_the_models_norm(model):
    tokens = zoo.tokens(model)
    network = tj.ResidualNetwork(model)
    trace = network.trace(tokens)
    lens = tj.iterative_jet_lens(network, trace, order=1, positions=[-1, 2])
    at = [trace.tokens.shape[1] - 1, 2]
    for order in (0, 1):
        found = lens.logits(("resid_pre", 1), order, trace=trace)
        wanted = of_model(model, trace["1_pre"], trace["final_post"], order)[:, at]
        torch.testing.assert_close(found, wanted.to(found), atol=1e-8, rtol=1e-8)
        log_probs = lens.log_probs("1_pre", order, trace=trace)
        cap = trace.decoder.transform or (lambda logits: logits)
        torch.testing.assert_close(log_probs, cap(wanted).log_softmax(-1).to(found), atol=1e-8, rtol=1e-8)
    own = lens.log_probs("final_post", trace=trace)
    torch.testing.assert_close(own, trace.logits[:, at].log_softmax(-1).to(own), atol=1e-8, rtol=1e-8)


def test_prompts_of_several_lengths_after_concat_and_saving(tmp_path):
    network = tj.ResidualNetwork(tj.load_tinydocs())
    prompts = ["This function is available on Unix and", "If the file"]
    parts = [tj.iterative_jet_lens(network, prompt) for prompt in prompts]
    lens = tj.load(tj.concat(parts).save(tmp_path / "lens"))
    found = lens.logits("2_pre", 1, trace=network.trace(prompts))
    assert torch.equal(found.isnan().all(-1), ~lens.valid)
    for i, (part, prompt) in enumerate(zip(parts, prompts, strict=True)):
        alone = part.logits("2_pre", 1, trace=network.trace(prompt))
        torch.testing.assert_close(found[i][lens.valid[i]], alone[0], atol=1e-3, rtol=1e-4)


def test_more_rows_than_a_chunk(monkeypatch):
    network = tj.ResidualNetwork(tj.load_tinydocs())
    trace = network.trace("This function is available on Unix and")
    lens = tj.iterative_jet_lens(network, trace)
    whole = lens.logits("1_pre", trace=trace)
    monkeypatch.setattr("tl_jets.lenses.logits.CHUNK_SIZE", 3)
    torch.testing.assert_close(lens.logits("1_pre", trace=trace), whole, atol=1e-4, rtol=1e-4)


def test_other_inputs_and_models_are_refused():
    model = tj.load_tinydocs()
    network = tj.ResidualNetwork(model)
    prompt = "This function is available on Unix and"
    lens = tj.iterative_jet_lens(network, prompt)
    with pytest.raises(ValueError, match="other tokens"):
        lens.logits("1_pre", trace=network.trace("If the file"))
    with pytest.raises(ValueError, match="other tokens"):
        lens.logits("1_pre", trace=network.trace("This function is available on Windows and"))
    with (
        model.hooks([("blocks.0.hook_mlp_out", lambda write, hook: write * 2)]),
        pytest.raises(ValueError, match="same model"),
    ):
        lens.logits("1_pre", trace=network.trace(prompt))
    trace = network.trace(prompt)
    with pytest.raises(ValueError, match="order must be one of"):
        lens.logits("1_pre", 2, trace=trace)
    with pytest.raises(ValueError, match="indexed by its layers"):
        lens.log_probs("9_pre", trace=trace)
    with pytest.raises((ValueError, TypeError), match=r"layer must be one of|1_pre"):
        lens.log_probs(["1_pre", "2_pre"], trace=trace)  # type: ignore[arg-type]
