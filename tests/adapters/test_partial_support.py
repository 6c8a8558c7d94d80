"""Models that some tools cannot serve: their streams are read all the same, and what needs more is refused by name.

`test_families.py` has every tool on such families; here is what no table shows: quantized weights, ready caches, hooks, messages.
"""

from __future__ import annotations

import oracles
import pytest
import torch
import zoo
from torch import Tensor, nn

import tl_jets as tj
from tl_jets.calculus import full_precision

pytestmark = pytest.mark.skipif(zoo.MAJOR < 4, reason="the families are those of TransformerLens 4")
TOLERANCE = 1e-10


class PackedLinear(nn.Module):
    """A stand-in for a 4-bit layer: integers in storage, made floating-point anew at each call, as bitsandbytes does."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.scale = float(linear.weight.abs().max()) / 7
        levels = (linear.weight / self.scale).round().clamp(-7, 7) + 8
        self.weight = nn.Parameter(levels.to(torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight.to(x.dtype) - 8) * self.scale)


def packed(name: str = "llama", unembedding: bool = False):
    """A model whose attention and MLP weights are packed, norms and embeddings are not."""
    hf = zoo.hf_model(name)
    for layer in hf.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for child, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(parent, child, PackedLinear(module))
    if unembedding:
        hf.lm_head = PackedLinear(hf.lm_head)
    with zoo._quiet():
        model = zoo.TransformerBridge.boot_transformers(
            "tiny", hf_model=hf, tokenizer=zoo.tokenizer(), device="cpu", dtype=torch.float64
        )
    return model.eval().requires_grad_(False)


def kl_of_the_logit_lens(model, tokens: Tensor, layer: int) -> Tensor:
    with torch.no_grad(), full_precision():
        logits, cache = model.run_with_cache(tokens)
        own = model.unembed(model.ln_final(cache["resid_pre", layer])).log_softmax(-1)
    return (logits.log_softmax(-1).exp() * (logits.log_softmax(-1) - own)).sum(-1)


def test_quantized_weights_have_lenses_and_attribution():
    model = packed()
    tokens = zoo.tokens(model)
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.float64}
    lens = tj.iterative_jet_lens(model, tokens, order=1)
    assert oracles.relative_error(lens.kl[1, 0], kl_of_the_logit_lens(model, tokens, 1)) < TOLERANCE
    network = tj.ResidualNetwork(model)
    trace = network.trace(tokens)
    cache = tj.jet_expand(network, "ln_final", centers=list(network.components), linearize="detached")(trace)
    total = torch.stack(list(cache.terms.values())).sum(0)
    assert oracles.relative_error(total, network.decoder.norm(trace["final_post"])) < TOLERANCE
    ablated = model.run_with_hooks(
        tokens, fwd_hooks=tj.ablation_hooks(model, "1_mlp")
    )  # a write is edited from outside
    by_hand = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_mlp_out", lambda t, hook: torch.zeros_like(t))])
    assert torch.equal(ablated, by_hand)


@pytest.mark.parametrize(
    "tool",
    [
        lambda model, tokens: tj.jet_expand(model, "1_mlp", centers=["embed"], order=1)(tokens),
        lambda model, tokens: tj.exponential_expansion(model, linearize="detached")(tokens),
        lambda model, tokens: tj.detached_jacobian(model, tokens),
        lambda model, tokens: tj.detached(model).__enter__(),
        lambda model, tokens: tj.joint_jet_lens(model, tokens, granularity="head"),
        lambda model, tokens: tj.ResidualNetwork(model).trace(tokens)["L0N3_out"],
        lambda model, tokens: tj.ablation_hooks(model, "L0H1"),
        lambda model, tokens: tj.jet_bigrams(model, "1_mlp", progress=False),
        lambda model, tokens: tj.jet_trigrams(model, 0, 1, progress=False),
    ],
)
def test_what_needs_more_of_quantized_weights_is_refused(tool):
    model = packed()
    with pytest.raises(
        NotImplementedError, match=r"quantized weights \(its dtype is torch.uint8.*load the model in float32"
    ):
        tool(model, zoo.tokens(model))


def test_a_quantized_unembedding_is_refused():
    with pytest.raises(NotImplementedError, match="final norm and the unembedding must be in floating point"):
        tj.ResidualNetwork(packed(unembedding=True))


def test_dense_blocks_of_a_mixture_of_experts_have_every_tool():
    model = zoo.build(zoo.ModelSpec("Qwen 3 MoE", "bridge", "raw"))
    network = tj.ResidualNetwork(model)
    trace = network.trace(zoo.tokens(model))
    assert trace.gamma("0_mlp")(trace["0_mid"]).shape == trace["0_mid"].shape
    assert "L0N3_out" in network and "L1N3_out" not in network
    with pytest.raises(NotImplementedError, match=r"1_mlp of .* routes tokens to experts"):
        trace.gamma("1_mlp")
    block = tj.ResidualNetwork(model, "block").trace(trace.tokens)
    assert oracles.relative_error(block["1_block_out"], trace["1_attn_out"] + trace["1_mlp_out"]) < TOLERANCE
    with pytest.raises(NotImplementedError, match="experts"):
        block.gamma("1_block")


@pytest.mark.parametrize("name", ["Qwen 3.5", "Mamba", "LFM2"])
def test_a_block_without_attention_is_one_write(name):
    model = zoo.build(zoo.ModelSpec(name, "bridge", "raw"))
    tokens = zoo.tokens(model)
    network = tj.ResidualNetwork(model)
    assert next(step.label for step in network.steps) == "0_block"
    with torch.no_grad(), full_precision():
        _, cache = model.run_with_cache(tokens)
    write = cache["blocks.0.hook_resid_post"] - cache["blocks.0.hook_resid_pre"]
    for trace in (network.trace(tokens), network.trace(tokens, cache=cache)):
        assert torch.equal(trace["0_block_out"], write)
        assert oracles.relative_error(sum(trace[label] for label in network.components), trace["final_post"]) < 1e-12
    with pytest.raises(ValueError, match="must be of the same input"):
        network.trace(tokens.flip(0), cache=cache)
    with pytest.raises(NotImplementedError, match="its block holds"):
        trace.gamma("0_block")
    with pytest.raises(NotImplementedError, match="No hook point carries the write of 0_block alone"):
        tj.ablation_hooks(model, "0_block")
    with pytest.raises(NotImplementedError, match="its block holds"):
        tj.jet_trigrams(model, 0, 1, progress=False)
    moved = [("blocks.0.hook_resid_post", lambda value, hook: value + 1)]
    with model.hooks(moved), pytest.raises(ValueError, match="must be told from what the block wrote"):
        network.trace(tokens)
    if name != "Mamba":
        with pytest.raises(NotImplementedError, match='"mlps" takes every MLP'):
            tj.jet_bigrams(model, "mlps", progress=False)
        following = [("blocks.1.hook_resid_pre", lambda value, hook: value + 1)]
        with model.hooks(following):
            found = network.trace(tokens)
        assert torch.equal(found["0_block_out"], write)
        edit = found["edit:blocks.1.hook_resid_pre"]
        assert oracles.relative_error(edit, torch.ones_like(edit)) < TOLERANCE


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_heads_of_another_layout_are_neither_read_nor_edited(mode):
    """Latent attention shows hook_z with other axes: index 1 of the third would be another thing than head 1."""
    model = zoo.build(zoo.ModelSpec("Youtu (latent attention)", "bridge", "raw"))
    reference = None if mode == "zero" else zoo.tokens(model)
    with pytest.raises(NotImplementedError, match="attention is not understood"):
        tj.ablation_hooks(model, "L1H1", mode=mode, reference=reference)
    with pytest.raises(NotImplementedError, match="attention is not understood"):
        tj.interventions.patch_hooks(model, "L1H1", zoo.tokens(model))
    assert tj.ablation_hooks(model, "1_attn")


def test_skip_trigrams_of_attention_that_fails_in_float64_are_refused_by_name():
    model = zoo.fresh(zoo.ModelSpec("XGLM", "bridge", "raw"), torch.float32)
    with pytest.raises(NotImplementedError, match=r"attention of layer 0 of TransformerBridge\(tiny\) in float64"):
        tj.jet_trigrams(model, 0, 1, progress=False)


def test_blocks_whose_streams_pass_no_hook_are_refused():
    config = zoo.transformers.OpenAIGPTConfig(vocab_size=zoo.D_VOCAB, n_positions=32, n_embd=24, n_layer=2, n_head=4)
    with zoo._quiet():
        hf = zoo.transformers.OpenAIGPTLMHeadModel(config)
        hf.config.architectures = [type(hf).__name__]
        model = zoo.TransformerBridge.boot_transformers("tiny", hf_model=hf, tokenizer=zoo.tokenizer(), device="cpu")
    with pytest.raises(NotImplementedError, match=r"nothing passed \['blocks.0.hook_resid_post'"):
        tj.iterative_jet_lens(model.eval(), zoo.tokens(model))


def test_heads_beside_attention_sinks_have_no_constant_to_keep():
    """Rows of the pattern sum to less than one, by position: what a head writes for a zero stream is not one constant."""
    model = zoo.build(zoo.ModelSpec("GPT-OSS", "bridge", "raw"))
    tokens = zoo.tokens(model)
    with pytest.raises(NotImplementedError, match=r"attention sinks\). Use mode='mean' or 'resample'"):
        tj.ablation_hooks(model, "L1H1")
    with torch.no_grad(), full_precision():
        _, cache = model.run_with_cache(tokens)
        mean = cache["blocks.1.attn.hook_z"][:, :, 1].mean((0, 1))

    def by_hand(z: Tensor, hook) -> Tensor:
        z = z.clone()
        z[:, :, 1] = mean
        return z

    with torch.no_grad(), full_precision():
        found = model.run_with_hooks(tokens, fwd_hooks=tj.ablation_hooks(model, "L1H1", mode="mean", reference=tokens))
        wanted = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", by_hand)])
    assert oracles.relative_error(found, wanted) < TOLERANCE
