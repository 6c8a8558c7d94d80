"""Detached models and their Jacobians, against models whose scales, patterns and gates hooks overwrite, in both worlds."""

from __future__ import annotations

import copy
from typing import Any

import oracles
import overwritten
import pytest
import torch
import zoo
from overwritten import first_stream
from torch import Tensor

import tl_jets
from tl_jets import CallableModel, Decoder, Norm, ResidualNetwork, jet_expand
from tl_jets.calculus import full_precision
from tl_jets.detached_map import DetachedJacobian, detached, detached_jacobian, detached_spectra

CORE = zoo.available(zoo.CORE)
# Every family; processed weights (folded norms, another mask) of the two that differ most.
ALL = [spec for spec in zoo.available() if spec.processing == "raw" or spec.name in ("gpt2", "gemma2")]
# HF's Bloom differentiates its activation itself (torch.autograd.Function).
DETACHABLE = [spec for spec in ALL if (spec.world, spec.name) != ("bridge", "bloom")]
# OPT's MLP is no module, so that no stage can be replayed.
MAPPED = [spec for spec in DETACHABLE if (spec.world, spec.name) != ("bridge", "opt")]
# Biases and an ungated MLP, parallel writes, gates, norms on both sides and softcaps: where one of each kind is enough.
KINDS = [spec for spec in CORE if spec.name in ("gpt2", "pythia", "llama", "gemma2") and spec.processing == "raw"]
BIASED = ("gpt2", "pythia", "gpt_neo", "gptj", "attn_only", "qwen2", "phi", "opt")


def has_biases(spec: zoo.ModelSpec) -> bool:
    return spec.name in (*BIASED, *zoo.OWN_CONFIGS, "bloom") or spec.name.startswith("gpt2")


@pytest.mark.parametrize("spec", DETACHABLE, ids=str)
def test_the_forward_pass_is_bit_equal(spec):
    check_bit_equal(zoo.build(spec))


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_the_forward_pass_is_bit_equal_in_float32(spec):
    check_bit_equal(zoo.build(spec, torch.float32))


def check_bit_equal(model: Any) -> None:
    tokens = zoo.tokens(model, batch=2, pos=5)
    with torch.no_grad():
        plain, plain_cache = model.run_with_cache(tokens)
        with detached(model):
            found, cache = model.run_with_cache(tokens)
    assert torch.equal(found, plain)
    assert all(torch.equal(cache[name], plain_cache[name]) for name in plain_cache)


@pytest.mark.parametrize("spec", [spec for spec in DETACHABLE if not has_biases(spec)], ids=str)
def test_gradients_through_a_detached_model_are_of_an_affine_map(spec):
    """Of the whole model, softcap of the logits included: v'output = (J'v)'stream wherever nothing adds a constant.

    Where biases do, the Jacobian's own test takes them into account.
    """
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=2, pos=5)
    with full_precision():
        stream = first_stream(model, tokens)[1].detach().requires_grad_()
        with detached(model):
            output, _ = first_stream(model, tokens, stream)
        v = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
        (gradient,) = torch.autograd.grad(output, stream, v)
        plain, _ = first_stream(model, tokens, stream)
        (ordinary,) = torch.autograd.grad(plain, stream, v)
    expected = float((v * output.detach()).sum())
    assert abs(float((gradient * stream.detach()).sum()) / expected - 1) < 1e-11
    assert abs(float((ordinary * stream.detach()).sum()) / expected - 1) > 1e-2


@pytest.mark.parametrize("spec", MAPPED, ids=str)
def test_the_output_is_reconstructed(spec):
    model = zoo.build(spec)
    network = ResidualNetwork(model)
    trace = network.trace(zoo.tokens(model, batch=2, pos=5))
    assert detached_jacobian(network, trace, output="final_post", ordinary=False).reconstruction_error < 1e-12
    J = detached_jacobian(network, trace, output="logits")
    assert J.reconstruction_error < 1e-12
    assert J.ordinary_error > 0.05
    total = J.apply(trace["embed"]) + J.bias
    logits = network.decoder.logits(network.decoder.norm(trace["final_post"][:, -1:]))
    assert oracles.relative_error(total, logits) < 1e-12
    if network.decoder.transform is None:
        with torch.no_grad(), full_precision():
            assert oracles.relative_error(total, model(trace.tokens)[:, -1:]) < 1e-12
    if spec.name in BIASED:
        assert float(J.bias.norm() / total.norm()) > 0.05, "the bias must matter"


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_the_output_is_reconstructed_in_float32(spec):
    model = zoo.build(spec, torch.float32)
    J = detached_jacobian(model, zoo.tokens(model), output="logits", positions=None)
    assert J.reconstruction_error < 1e-5
    if ResidualNetwork(model).decoder.transform is None:
        found = J.apply(J.map.point.detach()) + J.bias
        assert float((found - model(J.tokens)).norm() / found.norm()) < 1e-5


# Constants written into an ordinary model ---------------------------------------------------------------------------


@pytest.mark.parametrize("spec", overwritten.SPECS, ids=str)
def test_it_is_the_difference_quotient_of_a_model_with_constant_factors(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=2, pos=5)
    hooks = overwritten.overwriting(model, tokens, spec.name in overwritten.GATED)
    J = detached_jacobian(model, tokens, output="final_post", positions=None, wrt="0_pre")
    boxes = {"last": f"blocks.{len(model.blocks) - 1}.hook_resid_post"}

    def final(stream: Tensor) -> Tensor:
        box: list[Tensor] = []
        with torch.no_grad(), full_precision():
            first_stream(model, tokens, stream, [*hooks, (boxes["last"], lambda own, hook: box.append(own))])
        return box[-1]

    point = J.map.point.detach()
    change = torch.randn(point.shape, generator=torch.Generator().manual_seed(2), dtype=point.dtype)
    assert oracles.relative_error(final(point), J.value) < 1e-12
    assert oracles.relative_error(final(torch.zeros_like(point)), J.bias) < 1e-12
    # The overwritten model is affine, so that a difference quotient of any step is exact.
    found = J.apply(change)
    assert oracles.relative_error(found, final(point + change) - final(point)) < 1e-11
    assert J.ordinary is not None
    assert oracles.relative_error(J.ordinary.apply(change), found) > 1e-2


@pytest.mark.parametrize("spec", [s for s in zoo.available(["gpt2", "llama"]) if s.processing == "processed"], ids=str)
def test_the_final_norm_alone_is_direct_logit_attribution(spec):
    """TransformerLens' logit_attrs divides a component by the final norm's scale: on a folded model, its logits."""
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    with full_precision():
        _, cache = model.run_with_cache(tokens)
    components, labels = cache.decompose_resid(return_labels=True)
    J = detached_jacobian(model, tokens, output="logits", wrt="final_post", positions=None)
    logits = J.apply(components)
    answers = tokens.roll(-1, 1)
    expected = cache.logit_attrs(components, tokens=answers)
    found = logits.gather(-1, answers.expand(len(labels), -1, -1)[..., None])[..., 0]
    assert oracles.relative_error(found, expected) < 1e-9


# The context --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_hooks_stay_in_force(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    plain = detached_jacobian(model, tokens, output="logits")
    network = ResidualNetwork(model)
    calls: list[Any] = []

    def without_head_1(z: Tensor, hook: Any) -> Tensor:
        assert z.shape[:2] == tokens.shape, "the user's hook must see the user's input only"
        calls.append(hook)
        z[:, :, 1] = 0
        return z

    with model.hooks([("blocks.1.attn.hook_z", without_head_1)]):
        ablated = model(tokens)
        calls.clear()
        with detached(model):
            assert torch.equal(model(tokens), ablated)
        assert len(calls) == 1
        J = detached_jacobian(network, tokens, output="logits")
    assert J.reconstruction_error < 1e-12
    change = randn_like(J.map.point.detach())
    found = J.apply(change)  # outside of the hooks
    assert oracles.relative_error(found, plain.apply(change)) > 1e-3


@pytest.mark.parametrize("spec", zoo.available(["gpt2", "pythia"]), ids=str)
def test_edits_of_streams_are_part_of_the_bias(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    network = ResidualNetwork(model)
    with model.hooks([("blocks.1.hook_resid_pre", lambda stream, hook: stream + 0.5)]):
        J = detached_jacobian(network, tokens, output="final_post")
        later = detached_jacobian(network, tokens, output="final_post", wrt="0_pre")
    assert J.reconstruction_error < 1e-12
    assert later.reconstruction_error < 1e-12


def test_everything_is_restored():
    model = zoo.build(CORE[0])
    tokens = zoo.tokens(model)
    stream = first_stream(model, tokens)[1].detach().requires_grad_()

    def gradient() -> Tensor:
        return torch.autograd.grad(first_stream(model, tokens, stream)[0].square().sum(), stream)[0]

    before, hooks = gradient(), [len(point.fwd_hooks) for point in model.hook_dict.values()]
    with detached(model):
        assert oracles.relative_error(gradient(), before) > 1e-2
    assert torch.equal(gradient(), before)
    with pytest.raises(KeyError), detached(model):
        raise KeyError
    assert torch.equal(gradient(), before)
    assert [len(point.fwd_hooks) for point in model.hook_dict.values()] == hooks
    with detached(model):
        pass
    detached_jacobian(model, tokens)
    model(tokens)
    copy.deepcopy(model)


def test_it_works_where_no_gradients_are_taken():
    model = zoo.build(CORE[0])
    tokens = zoo.tokens(model)
    expected = detached_jacobian(model, tokens).materialize()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, detached(model):
            model(tokens)
        with context:
            assert torch.equal(detached_jacobian(model, tokens).materialize(), expected)


def test_what_cannot_be_detached_is_refused_by_name():
    bloom = zoo.build(zoo.ModelSpec("bloom", "bridge", "raw"))
    with pytest.raises(NotImplementedError, match=r"affine.*BloomForCausalLM"), detached(bloom):
        pass
    with pytest.raises(NotImplementedError, match=r"affine.*BloomForCausalLM"):
        detached_jacobian(bloom, zoo.tokens(bloom))
    with pytest.raises(TypeError, match="TransformerBridge"), detached(torch.nn.Linear(2, 2)):
        pass


def callables(stage: Any, dtype: torch.dtype = torch.float64) -> CallableModel:
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(5, 4, dtype=dtype).requires_grad_(False)
    decoder = Decoder(Norm("LN"), torch.randn(4, 7, dtype=dtype), torch.randn(7, dtype=dtype))
    return CallableModel(embedding, [{"0_mlp": stage}, {"1_mlp": torch.nn.functional.gelu}], decoder)


def test_plain_callables():
    tokens = torch.tensor([[0, 3, 1]])
    J = detached_jacobian(callables(torch.tanh), tokens, output="logits")
    assert J.reconstruction_error < 1e-14
    with detached(callables(torch.tanh)):
        x = torch.ones(2, requires_grad=True)
        assert torch.autograd.grad(torch.tanh(x).sum(), x)[0].equal(torch.tanh(x).detach())
    with pytest.raises(NotImplementedError, match="affine"):
        detached_jacobian(callables(lambda x: x * x.flip(-1)), tokens)


# The map ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[spec for spec in zoo.available(["gpt2", "llama"]) if spec.processing == "raw"], ids=str)
def model(request: pytest.FixtureRequest) -> Any:
    return zoo.build(request.param)


def randn_like(x: Tensor, *many: int) -> Tensor:
    return torch.randn(*many, *x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)


@pytest.mark.parametrize(
    ("output", "positions"),
    [
        *(("final_post", -1), ("final_post", None), ("logits", [1, 3]), ("ln_final", [1, 3])),
        *(("1_mid", None), ("1_attn_out", [1, 3]), ("L1H2_out", -1)),
    ],
)
def test_the_matrix_and_its_products_agree(model, output, positions):
    J = detached_jacobian(model, zoo.tokens(model, batch=2, pos=5), output=output, positions=positions)
    matrix = J.materialize(chunk_size=7)
    assert matrix.shape == (2, *J.map.out_shape[1:], 5, J.map.in_shape[-1])
    assert matrix.numel() * 8 == J.map.n_bytes
    u, v = randn_like(J.map.point, 2, 3), randn_like(J.value, 2, 3)
    assert oracles.relative_error(J.apply(u), torch.einsum("bovtd,kmbtd->kmbov", matrix, u)) < 1e-12
    assert oracles.relative_error(J.apply_transpose(v), torch.einsum("bovtd,kmbov->kmbtd", matrix, v)) < 1e-12
    assert (
        torch.equal(J.apply(u[0, 0]), J.apply(u, chunk_size=2)[0, 0])
        or oracles.relative_error(J.apply(u[0, 0]), J.apply(u, chunk_size=2)[0, 0]) < 1e-12
    )
    total = torch.einsum("bovtd,btd->bov", matrix, J.map.point.detach()) + J.bias
    assert oracles.relative_error(total, J.value) < 1e-12
    assert oracles.relative_error(J.contributions.sum(1) + J.bias, J.value) < 1e-12
    by_position = torch.einsum("bovtd,btd->btov", matrix, J.map.point.detach())
    assert oracles.relative_error(J.contributions, by_position) < 1e-12


def test_maps_compose_and_heads_add_up(model):
    tokens = zoo.tokens(model)
    network = ResidualNetwork(model, "head")
    trace = network.trace(tokens)

    def J(wrt: str, output: str) -> DetachedJacobian:  # noqa: N802
        return detached_jacobian(network, trace, wrt=wrt, output=output, positions=None)

    u = randn_like(trace["embed"])
    whole = J("embed", "final_post").apply(u)
    first = J("0_pre", "1_pre").apply(u)
    assert oracles.relative_error(J("1_pre", "final_post").apply(first), whole) < 1e-12
    attn = J("1_pre", "1_attn_out").apply(first)
    assert oracles.relative_error(first + attn, J("1_pre", "1_mid").apply(first)) < 1e-12
    heads = [f"L1H{head}_out" for head in range(model.cfg.n_heads)]
    assert oracles.relative_error(sum(J("1_pre", head).apply(first) for head in heads), attn) < 1e-12
    assert (
        oracles.relative_error(J("1_mid", "1_mlp_out").apply(first + attn), J("1_pre", "1_mlp_out").apply(first))
        < 1e-12
    )


def test_the_map_sees_no_later_position(model):
    J = detached_jacobian(model, zoo.tokens(model), positions=2)
    assert float(J.contributions[:, :3].norm(dim=-1).min()) > 1e-3
    assert float(J.contributions[:, 3:].abs().max()) == 0.0


@pytest.mark.parametrize("world", sorted({spec.world for spec in CORE}))
def test_padding(world):
    model = zoo.build(zoo.ModelSpec("gpt2", world, "raw"))
    tokens, mask = zoo.padded(model, lengths=(6, 4))
    network = ResidualNetwork(model)
    J = detached_jacobian(network, tokens, attention_mask=mask, output="logits")
    assert J.reconstruction_error < 1e-12
    alone = detached_jacobian(network, tokens[1:, 2:], output="logits")
    assert oracles.relative_error(J.materialize()[1, ..., 2:, :], alone.materialize()[0]) < 1e-10
    assert float(J.contributions[1, :2].abs().max()) == 0.0
    assert len(J.to_dataframe()) == 6 + 4 + 2
    with pytest.raises(ValueError, match="real tokens"):
        detached_jacobian(network, tokens, attention_mask=mask, positions=0)
    with pytest.raises(
        ValueError, match=r"at the same positions of the padded row in every prompt; got \[\[3\], \[1\]\]"
    ):
        detached_jacobian(network, ["w5 w6 w7", "w5"])


def test_a_large_matrix_is_refused_with_its_size(model):
    J = detached_jacobian(model, zoo.tokens(model), positions=None)
    with pytest.raises(ValueError, match=r"max_bytes = 1 KiB; it takes .* KiB"):
        J.materialize(max_bytes=1024)
    assert J.materialize(max_bytes=None).shape[-1] == 24


def test_wrong_arguments_are_refused(model):
    tokens = zoo.tokens(model)
    J = detached_jacobian(model, tokens)
    with pytest.raises(ValueError, match="shape"):
        J.apply(torch.zeros(3, 2, 24))
    with pytest.raises(ValueError, match="shape"):
        J.apply_transpose(torch.zeros(3, 2, 24))
    for options in ({"output": "nothing"}, {"wrt": "0_mlp_out"}, {"output": "0_pre", "wrt": "1_pre"}):
        with pytest.raises(ValueError, match=r"must|follow"):
            detached_jacobian(model, tokens, **options)
    with pytest.raises(ValueError, match="must come after"):
        detached_jacobian(model, tokens, output="0_attn_out", wrt="1_pre")
    with pytest.raises(ValueError, match="positions"):
        detached_jacobian(model, tokens, positions=7)


# Reading it ---------------------------------------------------------------------------------------------------------


def test_what_it_prints_and_tabulates(model):
    J = detached_jacobian(model, "w5 w6 w7 w8", output="logits", positions=[-2, -1])
    assert "reconstruction error" in repr(J) and "as a matrix" in repr(J)
    assert J.labels[1] == "1 \u00b7w5"
    table = J.to_dataframe(k=2)
    assert list(table.columns) == ["batch", "out_pos", "pos", "token", "norm", "share", "top_tokens"]
    assert len(table) == 2 * (5 + 1)
    assert table.groupby("out_pos")["share"].sum().sub(1).abs().max() < 1e-12
    row = table[(table.out_pos == 4) & (table.pos == 2)].iloc[0]
    contribution = J.contributions[0, 2, 1]
    assert abs(row["norm"] - float(contribution.norm())) < 1e-12
    best = contribution.topk(2).indices.tolist()
    assert [text.strip() for text in row["top_tokens"]] == [model.tokenizer.decode([i]).strip() for i in best]


def test_contributions_to_the_last_stream_decode_to_logits(model):
    """Through the frozen final norm they sum to the logits, biases apart."""
    tokens = zoo.tokens(model)
    J = detached_jacobian(model, tokens, output="final_post")
    logits = detached_jacobian(model, tokens, output="logits")
    found, wanted = J.top_tokens(3), logits.contributions.topk(3)
    assert torch.equal(found.indices, wanted.indices)
    assert oracles.relative_error(found.values, wanted.values) < 1e-12


@pytest.mark.parametrize("output", ["final_post", "logits"])
def test_singular_vectors_and_their_tokens(model, output):
    J = detached_jacobian(model, zoo.tokens(model, batch=2), output=output, positions=[3, 6])
    found = J.svd(8, prompt=1)
    matrix = J.materialize()[1].flatten(2).flatten(0, 1)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    assert oracles.relative_error(found.values, values[:8]) < 1e-12
    for mine, full in ((found.left, left.T), (found.right, right)):
        overlap = (mine.flatten(1) * full[:8]).sum(-1).abs()
        assert float((overlap - 1).abs().max()) < 1e-10
    back = J.apply_transpose(torch.stack([torch.zeros_like(found.left[0]), found.left[0]]))[1]
    assert oracles.relative_error(back, found.values[0] * found.right[0]) < 1e-10
    assert bool((found.right.flatten(1) @ J.map.point.detach()[1].flatten() >= 0).all())
    decoder = ResidualNetwork(model).decoder
    states = decoder.norm.scale(decoder.norm.center(found.left)) if output == "final_post" else found.left
    wanted = states @ decoder.W_U if output == "final_post" else states
    assert torch.equal(J.decode_left(found, 3).indices, wanted.topk(3).indices)
    cosines = torch.cosine_similarity(found.right[..., None, :], model.W_E, dim=-1)
    nearest = J.decode_right(found, 3)
    assert torch.equal(nearest.indices, cosines.topk(3).indices)
    assert oracles.relative_error(nearest.values, cosines.topk(3).values) < 1e-12
    one = J.svd(2, prompt=1, pos=3)
    assert (
        oracles.relative_error(one.values, torch.linalg.svdvals(J.materialize()[1, ..., 3, :].flatten(0, 1))[:2])
        < 1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("output", ["final_post", "logits"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "stories"])
def test_the_truncated_svd_is_the_full_one(name, output, dtype):
    """Eight values and vectors to 1e-6, in both dtypes: measured 2e-15 and 2e-7 of each value."""
    if name == "stories" and zoo.STORIES is None:
        pytest.skip("stories260K is not beside this checkout")
    model = (
        zoo.load_stories("bridge", dtype)
        if name == "stories"
        else zoo.build(zoo.ModelSpec(name, "bridge", "raw"), dtype)
    )
    J = detached_jacobian(model, zoo.tokens(model, batch=1), output=output, ordinary=False)
    found = J.svd(8)
    left, values, right = torch.linalg.svd(J.materialize()[0, 0].flatten(1).double(), full_matrices=False)
    tolerance = 1e-12 if dtype is torch.float64 else 1e-6
    assert found.values.dtype is dtype
    assert float((found.values.double() / values[:8] - 1).abs().max()) < tolerance
    # A vector is defined as well as its value is separated: compare subspaces where the next value is 1 % below.
    ends = [end for end in range(1, 9) if float(values[end] / values[end - 1]) < 0.99]
    assert len(ends) >= 3
    for end in ends:
        for mine, full in ((found.left, left[:, :end].T), (found.right, right[:end])):
            cosines = torch.linalg.svdvals(mine[:end].flatten(1).double() @ full.T)
            assert float((cosines - 1).abs().max()) < tolerance


@pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")
def test_a_trained_model():
    model = zoo.load_stories("bridge")
    J = detached_jacobian(model, "Once upon a time, there was a little girl", output="logits")
    assert J.reconstruction_error < 1e-5
    assert J.ordinary_error > 0.1
    logits = J.contributions.sum(1) + J.bias
    assert torch.equal(logits.argmax(-1), model(J.tokens)[:, -1:].argmax(-1))


@pytest.mark.parametrize("point", ["attn.hook_pattern", "ln1.hook_scale"])
@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_a_hook_may_change_in_place_what_is_frozen(spec, point):
    """Its change is made once, not again at every replay: the map is that of a hook which returns a new tensor."""
    model = zoo.build(spec)
    tokens, name = zoo.tokens(model, batch=1, pos=4), f"blocks.1.{point}"
    if spec.world == "bridge" and point == "ln1.hook_scale":
        pytest.skip("a bridge's own norm does not read a scale that was changed in place")

    def in_place(values: Tensor, hook: Any) -> Tensor:
        values *= 0.5
        return values

    found = []
    for change in (in_place, lambda values, hook: values * 0.5):
        network = ResidualNetwork(model)
        with model.hooks([(name, change)]):
            found.append(detached_jacobian(network, tokens, ordinary=False))
    torch.testing.assert_close(found[0].materialize(), found[1].materialize(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[0].bias, found[1].bias, rtol=1e-10, atol=1e-12)
    if spec.world == "bridge":  # a HookedTransformer hooks a copy of what softmax saves
        network = ResidualNetwork(model)
        with model.hooks([(name, in_place)]), pytest.raises(ValueError, match="must return a new tensor"):
            detached_jacobian(network, tokens)


@pytest.mark.parametrize("of_a_parameter", [False, True])
def test_a_step_that_writes_a_constant_has_a_zero_map(of_a_parameter):
    W = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    constant = W[0, 0].clone().requires_grad_(of_a_parameter)
    model = CallableModel(
        torch.nn.Embedding(5, 4, dtype=torch.float64),
        [{"0_mlp": lambda x: torch.nn.functional.silu(x @ W[0])}, {"1_mlp": lambda x: constant.expand_as(x)}],
        Decoder(Norm("RMS"), W[1], torch.zeros(4, dtype=torch.float64)),
    )
    tokens = torch.tensor([[0, 3, 1]])
    J = detached_jacobian(model, tokens, output="1_mlp_out", wrt="1_pre")
    assert not bool(J.materialize().any()) and torch.equal(J.bias[0, 0], constant.detach())
    assert not bool(J.apply(torch.ones(2, 1, 3, 4, dtype=torch.float64)).any())
    assert detached_jacobian(model, tokens).reconstruction_error < 1e-14
    terms = jet_expand(model, "1_mlp", centers=["embed", "0_mlp_out"], linearize="detached")(tokens)
    assert terms.check().passed and terms.relative_remainder < 1e-14
    assert float(detached_spectra(model, tokens, maps=[("1_pre", "1_mlp_out")], k=1).values) == 0


@pytest.mark.parametrize("output", ["final_post", "logits"])
def test_a_map_saves_and_loads(output, tmp_path):
    model = zoo.build(zoo.available(["gpt2"])[0])
    tokens = zoo.tokens(model, batch=2, pos=5)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0  # padded on the left: the positions read, 3 and 4, are others among the real tokens
    J = detached_jacobian(model, tokens, output=output, positions=[-2, -1], attention_mask=mask)
    found = tl_jets.load(J.save(tmp_path / "map.safetensors"))
    assert torch.equal(found.contributions, J.contributions) and found.labels == J.labels
    assert found.reconstruction_error == J.reconstruction_error and "loaded" in repr(found) and found._repr_html_()
    kept, table = found.to_dataframe(), J.to_dataframe()
    assert kept["top_tokens"].isna().all()
    assert kept.drop(columns="top_tokens").equals(table.drop(columns="top_tokens"))
    with pytest.raises(ValueError, match="Products with the map need the model"):
        found.apply(torch.zeros(2, 5, 4))
    again = found.with_model(model, tokens, attention_mask=mask)
    assert again.positions == J.positions and again.to_dataframe().equals(table)
    with pytest.raises(ValueError, match="the whole input"):
        found.with_model(model, tokens.flip(0), attention_mask=mask)
    assert found.to("meta").contributions.device.type == "meta"
