"""The zoo is what it says: right, non-linear, random everywhere, reproducible."""

from __future__ import annotations

import pytest
import torch
import zoo
from zoo import ModelSpec, build

SPECS = zoo.available()
RAW = [spec for spec in SPECS if spec.processing == "raw"]
FROM_HF = [spec for spec in SPECS if spec.name in zoo.HF_CONFIGS]


def log_probs(logits):
    return logits.log_softmax(dim=-1)


def distance(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_runs_in_float64_on_a_batch(spec):
    model = build(spec)
    ids = zoo.tokens(model, batch=3, pos=7)
    logits = model(ids)
    assert logits.shape == (3, 7, zoo.D_VOCAB)
    assert logits.dtype == torch.float64
    assert logits.isfinite().all()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    # Neither constant over tokens nor saturated.
    assert 0.4 < logits.std(dim=-1).mean() < 10
    assert (logits[0] - logits[1]).std() > 0.3


@pytest.mark.parametrize("spec", FROM_HF, ids=str)
def test_is_the_hugging_face_model(spec):
    model = build(spec)
    ids = zoo.tokens(model)
    expected = log_probs(zoo.hf_model(spec.name)(ids).logits)
    found = log_probs(model(ids))
    if (zoo.MAJOR, spec) in zoo.NOT_THE_HF_MODEL:  # if this fails, the bug is gone: remove the entry
        assert distance(found, expected) > 0.1
        return
    if spec.processing == "processed" or spec.world == "hooked":
        tolerance = 1e-5  # folding, and Hugging Face's own norms and softmax, run in float32: up to 5e-6
    elif spec.name in ("pythia", "phi3", "cohere"):
        tolerance = 2e-6  # float32 casts at other places than in Hugging Face: up to 1e-6
    else:
        tolerance = 1e-12
    assert distance(found, expected) < tolerance


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.processing == "processed"], ids=str)
def test_processing_keeps_the_log_probabilities(spec):
    raw = build(ModelSpec(spec.name, spec.world, "raw"))
    ids = zoo.tokens(raw)
    assert distance(log_probs(build(spec)(ids)), log_probs(raw(ids))) < 1e-5  # folding runs in float32


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.processing == "processed"], ids=str)
def test_processing_changes_the_weights(spec):
    raw, processed = build(ModelSpec(spec.name, spec.world, "raw")), build(spec)
    assert max(distance(raw.W_Q, processed.W_Q), distance(raw.W_U, processed.W_U)) > 1e-2


@pytest.mark.parametrize("spec", RAW, ids=str)
def test_attention_looks_somewhere(spec):
    model = build(spec)
    _, cache = model.run_with_cache(zoo.tokens(model))
    for layer in range(model.cfg.n_layers):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        assert pattern.shape == (3, zoo.N_HEADS, 7, 7)
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)), atol=1e-6, rtol=0)
        last = pattern[:, :, -1]
        window = (last > 0).sum(-1).max()
        assert 1.5 / window < last.max(-1).values.mean() < 0.97  # neither uniform nor one-hot


@pytest.mark.parametrize("spec", [spec for spec in RAW if spec.name != "attn_only"], ids=str)
def test_mlp_is_not_linear(spec):
    """An affine MLP, with any norm before it, would give f(x) + f(-x) the same at every position."""
    model = build(spec)
    ids = zoo.tokens(model)
    parallel = spec.name in ("parallel", "pythia", "gptj", "phi", "cohere")
    stream = torch.randn(3, 7, model.cfg.d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def mlp_out(x):
        write = []
        model.run_with_hooks(
            ids,
            fwd_hooks=[
                ("blocks.0.hook_resid_pre" if parallel else "blocks.0.hook_resid_mid", lambda t, hook: x),
                ("blocks.0.hook_mlp_out", lambda t, hook: write.append(t)),
            ],
        )
        return write[0]

    plus, minus = mlp_out(stream), mlp_out(-stream)
    even, odd = plus + minus, plus - minus
    assert (even - even.mean(dim=(0, 1))).std() > 0.2 * odd.std()


@pytest.mark.parametrize("name", zoo.HF_CONFIGS)
def test_every_checkpoint_parameter_is_random(name):
    for key, parameter in zoo.hf_model(name).named_parameters():
        assert parameter.std() > 0.05, key
        if parameter.ndim == 1 and key.endswith("weight"):
            centre = 0.0 if name.startswith("gemma") else 1.0
            assert (parameter - centre).abs().max() <= 0.6 + 1e-6, key
            assert (parameter - centre).abs().mean() > 0.1, key


@pytest.mark.parametrize("spec", [spec for spec in RAW if spec.name in zoo.OWN_CONFIGS], ids=str)
def test_every_own_parameter_is_random(spec):
    model = build(spec)
    module = model if spec.world == "hooked" else model.original_model
    for key, parameter in module.named_parameters():
        assert parameter.std() > 0.05, key


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_left_padding_leaves_real_tokens_alone(spec):
    model = build(spec)
    ids, mask = zoo.padded(model)
    assert mask.sum(-1).tolist() == [7, 4, 6]
    assert (mask[:, -1] == 1).all()
    logits = model(ids, attention_mask=mask)
    if spec in zoo.NAN_UNDER_LEFT_PADDING:  # if this fails, the bug is gone: remove the entry
        assert logits[mask.bool()].isnan().any()
        model = build(spec, torch.float32)
        logits = model(ids, attention_mask=mask)
    tolerance = 1e-10 if logits.dtype == torch.float64 else 1e-4
    for row, length in enumerate(mask.sum(-1).tolist()):
        alone = model(ids[row : row + 1, -length:])[0]
        assert distance(logits[row, -length:], alone) < tolerance


@pytest.mark.parametrize("spec", RAW, ids=str)
def test_same_seed_same_model(spec):
    model = build(spec)
    ids = zoo.tokens(model)
    state = torch.random.get_rng_state()
    again, other = zoo.fresh(spec), zoo.fresh(spec, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(model(ids), again(ids))
    assert distance(model(ids), other(ids)) > 0.1


@pytest.mark.parametrize("spec", [spec for spec in RAW if spec.name == "gpt2"], ids=str)
def test_text_goes_in(spec):
    model = build(spec)
    assert model.to_tokens("w5 w17").tolist() == [[1, 5, 17]]
    assert model.to_tokens("w5 w17", prepend_bos=False).tolist() == [[5, 17]]
    assert model.to_string(torch.tensor([5, 17])) == "w5 w17"


@pytest.mark.parametrize("spec", [spec for major, spec in zoo.KNOWN_UNBUILDABLE if major == zoo.MAJOR], ids=str)
def test_unbuildable_models_are_still_unbuildable(spec):
    with pytest.raises(ValueError, match="act_fn"):
        zoo.fresh(spec)


@pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")
@pytest.mark.parametrize("processing", ["raw", "processed"])
@pytest.mark.parametrize("world", sorted({spec.world for spec in SPECS}))
def test_stories_tell_a_story(world, processing):
    model = zoo.load_stories(world, processing=processing)
    ids = model.to_tokens("Once upon a time, there was a little girl named Lily. She loved to play")
    assert ids[0, 0] == 1
    assert (ids[0, 1:] != 1).all()
    chosen = log_probs(model(ids))[0, :-1].gather(-1, ids[0, 1:, None])
    assert -0.2 < chosen.mean() < -0.1  # measured: -0.12
