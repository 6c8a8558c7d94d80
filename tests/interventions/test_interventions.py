"""Ablations against edited weights of the Hugging Face checkpoint, hand-written hooks, and means taken by hand."""

from __future__ import annotations

import pytest
import torch
import zoo
from scipy.special import rel_entr

from tl_jets import CallableModel, Decoder, Norm, Path, ResidualNetwork
from tl_jets.calculus import full_precision
from tl_jets.interventions.ablation_effects import ablation_effect
from tl_jets.interventions.hooks import ablation_hooks, patch_hooks, without_path

CLOSE = {"rtol": 0, "atol": 1e-10}


def models(*names, processing="raw"):
    return [spec for spec in zoo.available(list(names)) if spec.processing == processing]


def logits(model, tokens, hooks=(), **options):
    with full_precision():
        return model.run_with_hooks(tokens, fwd_hooks=list(hooks), **options)


def hooks_left(model):
    return sum(len(point.fwd_hooks) for point in model.hook_dict.values())


# Edited weights of the checkpoint: step -> parameters that make its write zero


def no_llama_head(hf):
    hf.model.layers[1].self_attn.o_proj.weight[:, 2 * 6 : 3 * 6] = 0


def no_llama_mlp(hf):
    hf.model.layers[0].mlp.down_proj.weight[:] = 0


def no_gpt2_head(hf):
    """The head's rows of W_O go; what it writes for a zero normalized input stays, in b_O."""
    block, of_head = hf.transformer.h[1], slice(2 * 6, 3 * 6)
    weight, bias = block.attn.c_attn.weight[:, 48:], block.attn.c_attn.bias[48:]
    constant = (block.ln_1.bias @ weight + bias)[of_head]
    block.attn.c_proj.bias += constant @ block.attn.c_proj.weight[of_head]
    block.attn.c_proj.weight[of_head] = 0


def no_gpt2_mlp(hf):
    hf.transformer.h[0].mlp.c_proj.weight[:] = 0
    hf.transformer.h[0].mlp.c_proj.bias[:] = 0


def no_gpt2_block(hf):
    no_gpt2_mlp(hf)
    hf.transformer.h[0].attn.c_proj.weight[:] = 0
    hf.transformer.h[0].attn.c_proj.bias[:] = 0


def no_pythia_attn(hf):
    hf.gpt_neox.layers[1].attention.dense.weight[:] = 0
    hf.gpt_neox.layers[1].attention.dense.bias[:] = 0


def no_gemma2_mlp(hf):
    hf.model.layers[0].post_feedforward_layernorm.weight[:] = -1  # a gain of zero


def no_gemma2_head(hf):
    hf.model.layers[1].self_attn.o_proj.weight[:, 2 * 6 : 3 * 6] = 0


def no_olmo2_attn(hf):
    hf.model.layers[0].post_attention_layernorm.weight[:] = 0


EDITED = [
    ("llama", "L1H2", no_llama_head),
    ("llama", "0_mlp", no_llama_mlp),
    ("gpt2", "L1H2", no_gpt2_head),
    ("gpt2", "0_mlp_out", no_gpt2_mlp),
    ("gpt2", "0_block", no_gpt2_block),
    ("pythia", "1_attn", no_pythia_attn),
    ("gemma2", "0_mlp", no_gemma2_mlp),
    ("gemma2", "L1H2", no_gemma2_head),
    ("olmo2", "0_attn", no_olmo2_attn),
]


@pytest.mark.parametrize(
    ("spec", "step", "edit"),
    [(spec, step, edit) for name, step, edit in EDITED for spec in models(name)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_zero_ablation_is_the_checkpoint_with_those_weights_zero(spec, step, edit):
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    hf = zoo.hf_model(spec.name)
    clean = logits(model, tokens)
    edit(hf)
    with full_precision():
        expected = hf(tokens).logits
    found = logits(model, tokens, ablation_hooks(model, step))
    # HookedTransformer's rotary tables are float32: its clean logits are as far from the checkpoint's (up to 5e-7).
    rotary = spec.world == "hooked" and spec.name != "gpt2"
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 if rotary else 1e-10)
    assert (found - clean).abs().max() > 0.1
    assert hooks_left(model) == 0
    torch.testing.assert_close(logits(model, tokens), clean, rtol=0, atol=0)


@pytest.mark.parametrize("spec", models("gpt2", "gated_rms"), ids=str)
def test_several_steps_paths_and_both_ways_to_hook(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model)

    def zero(tensor, hook):
        return torch.zeros_like(tensor)

    expected = logits(model, tokens, [("blocks.0.hook_attn_out", zero), ("blocks.1.hook_mlp_out", zero)])
    for steps in (["0_attn", "1_mlp"], Path("embed", ("0_attn", "1_mlp", "ln_final")), "embed > 0_attn > 1_mlp"):
        hooks = ablation_hooks(model, steps)
        torch.testing.assert_close(logits(model, tokens, hooks), expected, **CLOSE)
        with model.hooks(fwd_hooks=hooks), full_precision():
            torch.testing.assert_close(model(tokens), expected, **CLOSE)
    assert hooks_left(model) == 0


@pytest.mark.parametrize("spec", models("gpt2", "llama", "pythia"), ids=str)
def test_mean_is_over_the_real_positions_of_the_reference(spec):
    """Left padding in float32: in float64 the checkpoints' own masks give NaN."""
    model = zoo.build(spec, torch.float32)
    tokens = zoo.tokens(model, seed=3)
    padded, mask = zoo.padded(model)
    reference = ResidualNetwork(model).trace(padded, attention_mask=mask)
    saved = {}
    names = ["blocks.1.hook_mlp_out", "blocks.0.attn.hook_z"]
    grab = [(name, lambda x, hook, name=name: saved.__setitem__(name, x.clone())) for name in names]
    model.run_with_hooks(padded, attention_mask=mask, fwd_hooks=grab)
    write, z = (sum(saved[n][b, p] for b, p in mask.nonzero().tolist()) / int(mask.sum()) for n in names)

    def head(x, hook):
        x = x.clone()
        x[:, :, 3] = z[3]
        return x

    expected = model.run_with_hooks(
        tokens, fwd_hooks=[(names[0], lambda x, hook: write.expand_as(x).clone()), (names[1], head)]
    )
    hooks = ablation_hooks(model, ["L0H3", "1_mlp"], mode="mean", reference=reference)
    torch.testing.assert_close(model.run_with_hooks(tokens, fwd_hooks=hooks), expected, rtol=0, atol=1e-4)
    every = {"input_ids": padded, "attention_mask": torch.ones_like(mask)}
    unpadded = ablation_hooks(model, ["L0H3", "1_mlp"], mode="mean", reference=every)
    assert (model.run_with_hooks(tokens, fwd_hooks=unpadded) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("spec", models("gpt2", "llama", "gemma2"), ids=str)
def test_resampled_and_patched_writes_are_the_other_prompts(spec):
    model = zoo.build(spec)
    tokens, other = zoo.tokens(model, 3), zoo.tokens(model, 3, seed=5)
    names = ["blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"]
    saved = {}
    logits(model, other, [(name, lambda x, hook, name=name: saved.__setitem__(name, x.clone())) for name in names])
    mlp, z = (saved[name] for name in names)

    def by_hand(rows, places=slice(None)):
        def edit_mlp(x, hook):
            x = x.clone()
            x[:, places] = mlp[rows][:, places]
            return x

        def edit_z(x, hook):
            x = x.clone()
            x[:, places, 0] = z[rows][:, places, 0]
            return x

        return logits(model, tokens, [(names[0], edit_mlp), (names[1], edit_z)])

    steps = ["0_mlp", "L1H0"]
    network = ResidualNetwork(model)
    drawn = set()
    for seed in range(3):
        seen = []
        hooks = ablation_hooks(network, steps, mode="resample", reference=other, seed=seed)
        found = logits(model, tokens, [*hooks, (names[0], lambda x, hook, seen=seen: seen.append(x.clone()))])
        rows = [[float((row - write).abs().max()) < 1e-9 for write in mlp].index(True) for row in seen[0]]
        torch.testing.assert_close(found, by_hand(rows), **CLOSE)
        drawn.add(tuple(rows))
    assert len(drawn) > 1

    for source in (other, network.trace(other)):
        patched = logits(model, tokens, patch_hooks(network, steps, source))
        torch.testing.assert_close(patched, by_hand([0, 1, 2]), **CLOSE)
    patched = logits(model, tokens, patch_hooks(network, steps, other, positions=[2, -1]))
    torch.testing.assert_close(patched, by_hand([0, 1, 2], [2, 6]), **CLOSE)


@pytest.mark.parametrize("spec", models("gpt2"), ids=str)
def test_patches_of_tensors_and_of_one_prompt(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    value = torch.randn(3, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = logits(model, tokens, [("blocks.1.hook_attn_out", lambda x, hook: value)])
    for source in (value, {"1_attn_out": value}):
        torch.testing.assert_close(logits(model, tokens, patch_hooks(model, "1_attn", source)), expected, **CLOSE)
    one = logits(model, tokens, patch_hooks(model, "1_attn", value[:1]))
    expected = logits(model, tokens, [("blocks.1.hook_attn_out", lambda x, hook: value[:1].expand(3, -1, -1).clone())])
    torch.testing.assert_close(one, expected, **CLOSE)
    # Padding of the source keeps the input's own write.
    source = ResidualNetwork(model).trace(["w5 w7", "w4 w5 w6 w8 w9 w10", "w3"])
    assert not source.valid.all()
    own = ResidualNetwork(model).trace(tokens)["1_mlp_out"]
    mixed = torch.where(source.valid[..., None], source["1_mlp_out"], own)
    expected = logits(model, tokens, [("blocks.1.hook_mlp_out", lambda x, hook: mixed)])
    torch.testing.assert_close(logits(model, tokens, patch_hooks(model, "1_mlp", source)), expected, **CLOSE)


@pytest.mark.parametrize("spec", models("gpt2"), ids=str)
def test_writes_of_a_run_under_hooks_are_patched_without_them(spec):
    """What a sublayer wrote is in the trace; heads are read off another run, which would be of another model."""
    model = zoo.build(spec)
    tokens, network = zoo.tokens(model), ResidualNetwork(model)
    with model.hooks(ablation_hooks(model, "0_attn")):
        trace = network.trace(tokens)
    expected = logits(model, tokens, [("blocks.1.hook_mlp_out", lambda x, hook: trace["1_mlp_out"])])
    torch.testing.assert_close(logits(model, tokens, patch_hooks(network, "1_mlp", trace)), expected, **CLOSE)
    assert (expected - logits(model, tokens, patch_hooks(network, "1_mlp", tokens))).abs().max() > 1e-3
    with pytest.raises(ValueError, match="under the hooks under which it was made"):
        patch_hooks(network, ["1_mlp", "L1H0"], trace)


@pytest.mark.parametrize("spec", models("gpt2", "gemma2"), ids=str)
def test_effects_are_differences_of_logits(spec):
    model = zoo.build(spec)
    prompts = ["w5 w7 w9", "w4 w5 w6 w8 w30 w31"]
    effect = ablation_effect(ResidualNetwork(model), prompts, ["0_mlp", "L1H2"], targets=[7, "w9"])
    assert effect.labels == ["0_mlp", "L1H2"] and effect.target_names == [7, "w9"]
    for i, step in enumerate(effect.labels):
        for b, prompt in enumerate(prompts):
            clean = logits(model, model.to_tokens(prompt))[0, -1]
            found = logits(model, model.to_tokens(prompt), ablation_hooks(model, step))[0, -1]
            before, after = clean, found
            if spec.name == "gemma2":  # effects are in logits before the softcap, KL is of the predictions
                cap = zoo.hf_model("gemma2").config.final_logit_softcapping
                before, after = (cap * torch.atanh(x / cap) for x in (clean, found))
            change = (after - before)[[7, 9]]
            torch.testing.assert_close(effect.logit[i, b, 0], change, **CLOSE)
            torch.testing.assert_close(effect.centered[i, b, 0], change - (after.mean() - before.mean()), **CLOSE)
            kl = rel_entr(clean.softmax(-1).numpy(), found.softmax(-1).numpy()).sum()
            assert float(effect.kl[i, b, 0]) == pytest.approx(kl, abs=1e-10)
    assert effect.tokens.tolist() == [[9], [31]]
    table = effect.to_dataframe()
    assert len(table) == 8 and [name.strip() for name in table.target.unique()] == ["w7", "w9"]
    assert effect.average().kl[0] == pytest.approx(float(effect.kl[0].mean()))
    assert "2 ablations, zero; 2 prompts" in repr(effect)
    mine = ablation_effect(model, prompts, "0_mlp", mode="mean", reference=prompts, positions=[0, -1])
    assert mine.logit.shape == (1, 2, 2, 1) and mine.kl.min() > 0
    best = logits(model, model.to_tokens(prompts[0]))[0, [0, -1]].argmax(-1)
    assert mine.target_ids[0, :, 0].tolist() == best.tolist()
    assert ablation_effect(ResidualNetwork(model, "head"), prompts[0]).labels[:3] == ["L0H0", "L0H1", "L0H2"]


@pytest.mark.parametrize("spec", models("gpt2"), ids=str)
def test_ablations_at_some_positions_are_patches_of_zeros_there(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    clean = logits(model, tokens)

    def zero_at_2(tensor, hook):
        return torch.cat([tensor[:, :2], torch.zeros_like(tensor[:, 2:3]), tensor[:, 3:]], 1)

    expected = logits(model, tokens, [("blocks.0.hook_mlp_out", zero_at_2)])
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    mask[:, 2] = True
    for positions in (2, [2 - tokens.shape[1]], mask):
        found = logits(model, tokens, ablation_hooks(model, "0_mlp", positions=positions))
        torch.testing.assert_close(found, expected, **CLOSE)
    assert torch.equal(found[:, :2], clean[:, :2]) and (found[:, 2] - clean[:, 2]).abs().max() > 1e-3
    whole = logits(model, tokens, ablation_hooks(model, ["0_mlp", "L1H2"], positions=range(tokens.shape[1])))
    torch.testing.assert_close(whole, logits(model, tokens, ablation_hooks(model, ["0_mlp", "L1H2"])), **CLOSE)
    # Counted among real tokens: the last of each prompt.
    prompts = ["w5 w7 w9", "w4 w5 w6 w8 w30 w31"]
    effect = ablation_effect(model, prompts, ["0_mlp", "L1H2"], ablated_positions=-1)
    alone = [ablation_effect(model, prompt, ["0_mlp", "L1H2"], ablated_positions=-1).logit for prompt in prompts]
    torch.testing.assert_close(effect.logit, torch.cat(alone, 1), **CLOSE)
    ids = model.to_tokens(prompts[0])
    last = logits(model, ids, ablation_hooks(model, "0_mlp", positions=-1)) - logits(model, ids)
    torch.testing.assert_close(effect.logit[0, 0, 0, 0], last[0, -1, effect.target_ids[0, 0, 0]], **CLOSE)
    with pytest.raises(ValueError, match="positions must lie in the input's 7; got 9"):
        model.run_with_hooks(tokens, fwd_hooks=ablation_hooks(model, "0_mlp", positions=9))
    with pytest.raises(ValueError, match=r"A mask of positions must be .* here; got \[1, 7\]"):
        model.run_with_hooks(tokens, fwd_hooks=ablation_hooks(model, "0_mlp", positions=mask[:1]))


@pytest.mark.parametrize("spec", models("llama"), ids=str)
def test_without_path_takes_one_frozen_path_off_the_last_stream(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    network = ResidualNetwork(model)
    trace = network.trace(tokens)
    layer = zoo.hf_model("llama").model.layers[2]
    stream, gain = trace["2_mid"], layer.post_attention_layernorm.weight
    scale = torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + 1e-3)
    gate = torch.nn.functional.silu((stream * scale * gain) @ layer.mlp.gate_proj.weight.T)
    vector = (gate * ((trace["embed"] * scale * gain) @ layer.mlp.up_proj.weight.T)) @ layer.mlp.down_proj.weight.T
    for path in ("embed > 2_mlp", Path("embed", ("2_mlp", "ln_final"))):
        with model.hooks(without_path(model, tokens, path)):
            left = network.trace(tokens)["final_post"]
        torch.testing.assert_close(left, trace["final_post"] - vector, **CLOSE)
    with model.hooks(without_path(model, trace, "embed")):
        torch.testing.assert_close(network.trace(tokens)["final_post"], trace["final_post"] - trace["embed"], **CLOSE)
    with pytest.raises(ValueError, match="later and later"):
        without_path(model, tokens, "embed > 2_mlp > 0_attn")
    with pytest.raises(ValueError, match="starts at"):
        without_path(model, tokens, "nowhere > 2_mlp")
    with pytest.raises(ValueError, match="without_path needs an input of the shape"):
        model.run_with_hooks(tokens[:1], fwd_hooks=without_path(model, tokens, "embed > 2_mlp"))


def test_what_cannot_be_edited_is_refused(as_users_run_it):
    model = zoo.build(models("gpt2")[0])
    tokens = zoo.tokens(model)
    callables = CallableModel(
        torch.nn.Embedding(5, 4), [{"0_mlp": torch.tanh}], Decoder(Norm("none"), torch.randn(4, 5), torch.zeros(5))
    )
    for call in (ablation_hooks, ablation_effect, lambda m, s: patch_hooks(m, s, tokens)):
        with pytest.raises(NotImplementedError, match="plain callables has none"):
            call(callables, "0_mlp")
    for steps, error, match in (
        ("9_mlp", ValueError, "A step to edit is one of '._mlp', "),
        ("embed", ValueError, "A step to edit"),
        ([], ValueError, "at least one step"),
        ("0_attn_bias", NotImplementedError, "edit 0_attn instead"),
    ):
        with pytest.raises(error, match=match):
            ablation_hooks(model, steps)
    with pytest.raises(ValueError, match="mode must be one of"):
        ablation_hooks(model, "0_mlp", mode="noise")
    for options in ({"mode": "mean"}, {"mode": "resample"}, {"reference": tokens}):
        with pytest.raises(ValueError, match="A reference says"):
            ablation_hooks(model, "0_mlp", **options)
    with pytest.raises(ValueError, match="of one length"):
        ablation_hooks(model, "0_mlp", mode="resample", reference=["w5", "w5 w6"])
    hooks = ablation_hooks(model, "0_mlp", mode="resample", reference=tokens)
    with pytest.raises(ValueError, match="resample needs an input of the shape"):
        model.run_with_hooks(tokens[:, :4], fwd_hooks=hooks)
    with pytest.raises(ValueError, match="patch needs an input of the shape"):
        model.run_with_hooks(tokens[:2], fwd_hooks=patch_hooks(model, "0_mlp", tokens))
    with pytest.raises(ValueError, match=r"positions must lie in -7\.\.6"):
        patch_hooks(model, "0_mlp", tokens, positions=7)
    with pytest.raises(ValueError, match=r"positions must lie in -2\.\.1"):
        ablation_effect(model, ["w5", "w5 w6"], positions=2)
    value = torch.randn(3, 7, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match="Every step to patch"):
        patch_hooks(model, ["0_mlp", "1_mlp"], {"0_mlp": value})
    for given in ({"0_mlp": value, "1_mlp": value}, {"0_mlp": value, "0_mlp_out": value}):
        with pytest.raises(
            ValueError, match=r"writes of the steps to patch, \['0_mlp_out'\], one for each; got another for"
        ):
            patch_hooks(model, "0_mlp", given)
    with pytest.raises(NotImplementedError, match="A tensor is the write of"):
        patch_hooks(model, "L0H1", value)
    with pytest.raises(ValueError, match="Writes must have shape"):
        patch_hooks(model, "0_mlp", value[..., :5])
    assert hooks_left(model) == 0
