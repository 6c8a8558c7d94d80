"""`linearize="detached"` of expansions and lenses, against TransformerLens' attribution and models that hooks make affine."""

from __future__ import annotations

from typing import Any

import oracles
import overwritten
import pytest
import torch
import zoo
from overwritten import first_stream
from torch import Tensor

from tl_jets import CallableModel, Decoder, Norm, ResidualNetwork, iterative_jet_lens, jet_expand, joint_jet_lens
from tl_jets.calculus import full_precision
from tl_jets.core.measures import MEASURES

SMALL = [spec for spec in zoo.available(["gpt2", "llama"]) if spec.processing == "raw"]
FOLDED = [spec for spec in zoo.available(["gpt2", "pythia", "llama"]) if spec.processing == "processed"]
# Biases, parallel writes, norms after sublayers, softcaps, gates, no norm at all, no MLP.
FAMILIES = [
    spec
    for spec in zoo.available(["gpt2", "pythia", "olmo2", "gemma2", "cohere", "no_norm", "attn_only"])
    if spec.processing == "raw"
]
EPS = 1e-3  # of every family above


def run(model: Any, tokens: Tensor) -> Any:
    with torch.no_grad(), full_precision():
        return model.run_with_cache(tokens)


def final_of(model: Any, cache: Any) -> Tensor:
    return cache[f"blocks.{len(model.blocks) - 1}.hook_resid_post"]


def size(norm: Any, x: Tensor) -> Tensor:
    """What a norm divides by [..., 1]."""
    return (
        (norm.center(x).square().mean(-1, keepdim=True) + EPS).sqrt()
        if norm.kind != "none"
        else torch.ones_like(x[..., :1])
    )


# Expansions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", FAMILIES, ids=str)
@pytest.mark.parametrize("granularity", ["sublayer", "head"])
def test_a_chain_of_expansions_is_the_model(spec, granularity):
    """From the embeddings on, every stage expanded at all terms of the one before: nothing remains, anywhere."""
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=2, pos=5)
    logits, cache = run(model, tokens)
    network = ResidualNetwork(model, granularity)
    trace = network.trace(tokens)
    centers: Any = list(network.sources)
    for stage in network.stages[:2]:
        centers = jet_expand(network, stage.steps[0].label, centers=centers, linearize="detached")
        terms = centers(trace)
        assert oracles.relative_error(terms.stack().sum(0), trace[network.next_stream(stage)]) < 1e-12
        assert terms.labels == [str(term) for term in centers.terms]
    assert not any("_bias" in step for term in centers.terms for step in term.path.steps), "a bias reads nothing"
    rest = [step.write for stage in network.stages[2:] for step in stage.steps]
    decoded = jet_expand(network, "ln_final", centers=[centers, *rest], linearize="detached")(trace)
    final = final_of(model, cache)
    assert oracles.relative_error(decoded.stack().sum(0), network.decoder.norm(final)) < 1e-12
    found = sum(decoded.logits(path) for path in decoded.labels)
    assert oracles.relative_error(found, decoded.logits()) < 1e-12
    transform = network.decoder.transform
    assert oracles.relative_error(found if transform is None else transform(found), logits) < 1e-10
    assert decoded.relative_remainder < 1e-12 and decoded.check().passed


@pytest.mark.parametrize(
    "spec", [spec for spec in overwritten.SPECS if spec.name in ("gpt2", "llama", "gemma2")], ids=str
)
def test_a_term_is_the_write_of_an_overwritten_model(spec):
    """Hooks write the recorded scales, patterns and gates into other passes: writes at x_i, less those at zero."""
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=2, pos=5)
    hooks = overwritten.overwriting(model, tokens, spec.name in overwritten.GATED)
    network = ResidualNetwork(model)
    trace = network.trace(tokens)
    centers = {
        name: lambda trace, seed=seed: trace["embed"] + normal_like(trace["embed"], seed)
        for seed, name in enumerate("ab")
    }
    terms = jet_expand(network, "0_attn", centers=centers, linearize="detached")(trace)
    assert terms.labels == ["a", "b", "a > 0_attn", "b > 0_attn", "0_attn_bias"]

    def write(stream: Tensor) -> Tensor:
        box: list[Tensor] = []
        with torch.no_grad(), full_precision():
            first_stream(model, tokens, stream, [*hooks, ("blocks.0.hook_attn_out", lambda out, hook: box.append(out))])
        return box[-1]

    constant = write(torch.zeros_like(trace["embed"]))
    assert oracles.relative_error(terms["0_attn_bias"], constant) < 1e-12
    for name, center in centers.items():
        assert torch.equal(terms[name], center(trace))
        assert oracles.relative_error(terms[f"{name} > 0_attn"], write(center(trace)) - constant) < 1e-11
    # Two centers that do not sum to the stream: the rest of it goes the same way.
    left = trace["0_pre"] - terms["a"] - terms["b"]
    assert oracles.relative_error(terms.remainder, left + write(left) - constant) < 1e-11


def normal_like(x: Tensor, seed: int) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("spec", FOLDED, ids=str)
def test_at_the_decoder_it_is_direct_logit_attribution(spec, dtype):
    """TransformerLens' own, of a folded model: `logit_attrs` leaves the norm's gain out."""
    model = zoo.build(spec, dtype)
    tokens = zoo.tokens(model)
    _, cache = run(model, tokens)
    components, labels = cache.decompose_resid(return_labels=True)
    network = ResidualNetwork(model)
    expected = cache.logit_attrs(components, tokens=(answers := tokens.roll(-1, 1)))
    steps = [step.write for stage in network.stages for step in stage.steps]
    terms = jet_expand(network, "ln_final", centers=[*network.sources, *steps], linearize="detached")(tokens)
    assert len(labels) == len(terms) - 1
    logits = torch.stack([terms.logits(path) for path in terms.labels])
    found = logits.gather(-1, answers.expand(len(logits), -1, -1)[..., None])[..., 0]
    tolerance = 1e-10 if dtype is torch.float64 else 1e-6
    assert oracles.relative_error(found[:-1], expected) < tolerance
    # ... and what the attribution leaves out is one constant, the same everywhere.
    constant = (
        network.decoder.b_U if network.decoder.norm.bias is None else network.decoder.logits(network.decoder.norm.bias)
    )
    assert oracles.relative_error(found[-1], constant[answers]) < tolerance
    joint = joint_jet_lens(ResidualNetwork(model, "sublayer"), tokens, linearize="detached", top_k=3)
    best = joint.center_top_tokens(2)
    assert torch.equal(best.indices[:-1], logits[:-1].topk(2).indices)  # a constant of zeros has ties
    assert oracles.relative_error(best.values.to(dtype), logits.topk(2).values) < tolerance


@pytest.mark.parametrize("spec", [spec for spec in FAMILIES if spec.name in ("gpt2", "gemma2", "no_norm")], ids=str)
def test_the_order_0_jet_is_a_multiple_of_it(spec):
    """rms(h_L) / rms(x_i), centered where the norm centers, computed here from TransformerLens' cache."""
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=2, pos=5)
    _, cache = run(model, tokens)
    network = ResidualNetwork(model)
    labels = ["0_attn_out", "1_mlp_out"]
    norm = network.decoder.norm
    parts = torch.stack([cache["blocks.0.hook_attn_out"], cache["blocks.1.hook_mlp_out"]])
    ratio = size(norm, final_of(model, cache)) / size(norm, parts)
    assert {"gpt2": "LN", "gemma2": "RMS", "no_norm": "none"}[spec.name] == norm.kind
    detached = jet_expand(network, "ln_final", centers=labels, linearize="detached")(tokens)
    jets = jet_expand(network, "ln_final", centers=labels, order=0)(tokens)
    for i, label in enumerate(labels):
        path = f"{label} > ln_final"
        own = 2 * jets[path] - detached["ln_final_bias"]  # two jets of weight 1/2, each with the norm's bias
        assert oracles.relative_error(own, ratio[i] * detached[path]) < 1e-12
    if spec.name != "no_norm":
        assert float((ratio - 1).abs().min()) > 1e-3


def test_terms_of_jets_are_centers_too_and_back():
    model = zoo.build(SMALL[0])
    network = ResidualNetwork(model)
    trace = network.trace(zoo.tokens(model, batch=1, pos=4))
    jets = jet_expand(network, "0_attn", centers=list(network.sources), order=1)
    mixed = jet_expand(network, "0_mlp", centers=jets, linearize="detached")(trace)
    back = jet_expand(network, "1_attn", centers=mixed.expansion, order=0)(trace)
    assert mixed.labels[:2] == ["embed", "pos_embed"] and mixed.labels[-1] == "0_mlp_bias"
    assert len(back) == 2 * len(mixed)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_no_gradients_are_taken(context):
    model = zoo.build(SMALL[0])
    network = ResidualNetwork(model)
    tokens = zoo.tokens(model, batch=1, pos=4)
    expected = jet_expand(network, "0_attn", centers="embed", linearize="detached")(tokens)
    with context():
        found = jet_expand(network, "0_attn", centers="embed", linearize="detached")(tokens)
    assert all(torch.equal(found[path], expected[path]) for path in expected)
    assert not any(term.requires_grad for term in found.values())


def test_hooks_are_part_of_it():
    """An edit of the stream is a center of its own; an ablated head is part of the stage."""
    model = zoo.build(SMALL[0])
    network = ResidualNetwork(model)
    tokens = zoo.tokens(model, batch=1, pos=4)
    hooks = [("blocks.1.hook_resid_pre", lambda x, hook: x + 0.5), ("blocks.1.attn.hook_z", lambda z, hook: 0.5 * z)]
    with model.hooks(hooks):
        trace = network.trace(tokens)
        centers = [*network.sources, "0_attn_out", "0_mlp_out", *trace.edits("1_pre")]
        terms = jet_expand(network, "1_attn", centers=centers, linearize="detached")(trace)
    assert terms.relative_remainder < 1e-12
    assert len(centers) == 5
    plain = jet_expand(network, "1_attn", centers="0_attn_out", linearize="detached")(tokens)
    assert oracles.relative_error(plain["0_attn_out > 1_attn"], terms["0_attn_out > 1_attn"]) > 1e-2


def test_what_a_cache_shows():
    model = zoo.build(SMALL[0])
    network = ResidualNetwork(model)
    expansion = jet_expand(network, "1_mlp", centers=["1_pre", "1_attn_out"], linearize="detached")
    assert "detached, 5 terms" in repr(expansion)
    cache = expansion("w5 w6 w7")
    assert "1_mlp, detached; relative remainder" in repr(cache)
    assert cache.check().passed and cache.check().slopes == {}
    table = cache.to_dataframe()
    assert table.path.unique().tolist() == cache.labels == [str(term) for term in expansion.terms]
    assert bool((table.weight == 1).all())
    assert cache.weights.shape == (2, 1, 4) and bool((cache.weights == 1).all())
    decoded = jet_expand(network, "ln_final", centers=expansion, linearize="detached")("w5 w6 w7")
    assert decoded.bias_weights()[:, 0, 0].tolist() == [0.0] * 5 + [1.0]
    best = decoded.logits("ln_final_bias")[0, -1].argmax()
    assert decoded.to_dataframe().top_token.iloc[-1].strip() == model.tokenizer.decode(best)
    single = decoded.apply_slice_to_pos_dim(-1).remove_batch_dim()
    assert single.logits("ln_final_bias").shape == (zoo.D_VOCAB,)


def test_what_cannot_be_frozen_is_refused_by_name():
    embed = torch.nn.Embedding(5, 4, dtype=torch.float64).requires_grad_(False)
    decoder = Decoder(Norm("LN"), torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    network = ResidualNetwork(CallableModel(embed, [{"0_mlp": lambda x: x * x.flip(-1)}], decoder))
    expansion = jet_expand(network, "0_mlp", centers="embed", linearize="detached")
    with pytest.raises(NotImplementedError, match=r"affine .* 0_mlp"):
        expansion(torch.tensor([[0, 3]]))


@pytest.mark.usefixtures("as_users_run_it")
def test_options_of_jets_are_refused():
    model = zoo.build(SMALL[0])
    network = ResidualNetwork(model)
    tokens = zoo.tokens(model, batch=1, pos=4)
    of_weights = [{"weights": "uniform"}, {"weights": [1.0]}, {"weights": "optimal"}, {"objective": "l2"}]
    calls: list[tuple[Any, list[dict[str, Any]]]] = [
        (lambda **given: jet_expand(network, "ln_final", centers="embed", **given), of_weights),
        (lambda **given: iterative_jet_lens(network, tokens, **given), []),
        (lambda **given: joint_jet_lens(network, tokens, **given), of_weights),
    ]
    for call, options in calls:
        for given in [{"order": 1}, {"center_scale": "match"}, *options]:
            with pytest.raises(ValueError, match=r"Detached terms take no .*; got .*, but .* or use linearize='jet'"):
                call(linearize="detached", **given)
        with pytest.raises(ValueError, match=r"linearize must be one of .* got 'frozen'"):
            call(linearize="frozen")
        call(linearize="detached", order=0)
    with pytest.raises(ValueError, match=r"\['0_mlp_bias'\] are both"):
        jet_expand(network, "0_mlp", centers={"0_mlp_bias": lambda trace: trace["embed"]}, linearize="detached")


# Lenses -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", FAMILIES, ids=str)
def test_the_iterative_lens_is_the_logit_lens_at_the_models_own_scale(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    logits, cache = run(model, tokens)
    network = ResidualNetwork(model)
    lens = iterative_jet_lens(network, tokens, linearize="detached", top_k=zoo.D_VOCAB, targets=[7], incl_mid=True)
    norm, final = network.decoder.norm, final_of(model, cache)
    bias, truth = norm(torch.zeros_like(final)), network.decoder.logits(norm(final))
    transform = network.decoder.transform or (lambda x: x)
    assert lens.orders == [0] and "detached" in repr(lens)
    for i, label in enumerate(lens.labels):
        stream = (
            final if label == "final_post" else cache[f"blocks.{label.split('_')[0]}.hook_resid_{label.split('_')[1]}"]
        )
        # The logit lens by the norm as a black box, its own scale taken out and that of h_L put in.
        wanted = network.decoder.logits((norm(stream) - bias) * size(norm, stream) / size(norm, final) + bias)
        assert oracles.relative_error(lens.full_values[i, 0], wanted.sort(-1, descending=True).values) < 1e-11
        assert oracles.relative_error(lens.target_logits[i, 0, ..., 0], wanted[..., 7]) < 1e-11
        assert oracles.relative_error(lens.alpha[i, 0], 1 / size(norm, final)[..., 0]) < 1e-12
        log_p, log_q = transform(truth).log_softmax(-1), transform(wanted).log_softmax(-1)
        assert oracles.relative_error(lens.kl[i, 0], (log_p.exp() * (log_p - log_q)).sum(-1)) < 1e-10
    assert (
        float(lens.beta.abs().max()) == 0.0
        and float(lens.borrowed_share.max()) == 0.0
        and not bool(lens.borrowed.any())
    )
    assert bool(lens.rho.isnan().all()) and bool(lens.tail_bound.isnan().all())
    assert float(lens.kl[-1].max()) < 1e-10
    if network.decoder.transform is None:
        assert oracles.relative_error(lens.full_values[-1, 0], logits.sort(-1, descending=True).values) < 1e-10
    assert (
        len(lens.average()) == len(lens.labels) and len(lens.to_dataframe(top_k=1)) == len(lens.labels) * tokens.numel()
    )


@pytest.mark.parametrize("spec", SMALL, ids=str)
def test_differences_of_layers_are_what_writes_give(spec):
    """A write's direct attribution is the step of the lens over it: additive, as no jet's reading is."""
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    network = ResidualNetwork(model)
    lens = iterative_jet_lens(network, tokens, linearize="detached", targets=[7], incl_mid=True, top_k=1)
    writes = ["0_attn_out", "0_mlp_out", "1_attn_out"]
    terms = jet_expand(network, "ln_final", centers=writes, linearize="detached")(tokens)
    for i, write in enumerate(writes):
        step = lens.target_logits[i + 1, 0, ..., 0] - lens.target_logits[i, 0, ..., 0]
        assert oracles.relative_error(step, terms.logits(f"{write} > ln_final")[..., 7]) < 1e-11


@pytest.mark.parametrize("spec", SMALL, ids=str)
def test_the_control_of_the_iterative_lens(spec):
    """A random stream of the same length and angle, read in the same way: as good where the angle says it all."""
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    network = ResidualNetwork(model)
    lens = iterative_jet_lens(network, tokens, linearize="detached")
    assert lens.control is not None
    assert float((lens.control.kl[:-1] - lens.kl[:-1]).abs().min()) > 1e-6
    assert float(lens.control.kl[-1].max()) < 1e-10
    for name in MEASURES:
        assert getattr(lens.control, name).shape == getattr(lens.measures, name).shape
    # Lengths and angles in d_model are the layer's: where W_U is orthogonal, so are remainder and cosine.
    d_model = network.decoder.W_U.shape[0]
    decoder = Decoder(Norm("RMS"), torch.eye(d_model, dtype=torch.float64), torch.zeros(d_model, dtype=torch.float64))
    gammas = [{f"{i}_mlp": lambda x, i=i: torch.tanh(x.roll(i + 1, -1))} for i in range(2)]
    embed = torch.nn.Embedding(5, d_model, dtype=torch.float64).requires_grad_(False)
    plain = ResidualNetwork(CallableModel(embed, gammas, decoder))
    found = iterative_jet_lens(plain, torch.tensor([[0, 3, 1]]), linearize="detached")
    assert found.control is not None
    assert oracles.relative_error(found.control.remainder_norm, found.remainder_norm) < 1e-12
    assert oracles.relative_error(found.control.cosine, found.cosine) < 1e-12


@pytest.mark.parametrize("spec", FAMILIES, ids=str)
@pytest.mark.parametrize("granularity", ["block", "head"])
def test_the_joint_lens_is_the_model(spec, granularity):
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=2, pos=5)
    logits, cache = run(model, tokens)
    network = ResidualNetwork(model, granularity)
    joint = joint_jet_lens(network, tokens, linearize="detached", top_k=3)
    assert joint.labels[-1] == "ln_final_bias" and joint.objective == "detached" and joint.gap is None
    assert bool((joint.weights == 1).all()) and joint.weights.shape[0] == len(joint.labels)
    assert float(joint.kl.max()) < 1e-10 and float(joint.remainder_norm.max()) < 1e-10
    assert bool((joint.top1_agreement == 1).all())
    decoder = network.decoder
    W_U, b_U = (decoder.logit_scale * weight for weight in (decoder.W_U, decoder.b_U))
    additive = decoder.norm(final_of(model, cache)) @ W_U + b_U
    assert oracles.relative_error(joint.full_values, additive.topk(3).values) < 1e-10
    assert (
        torch.equal(joint.own_values, joint.full_values)
        or oracles.relative_error(joint.own_values, joint.full_values) < 1e-12
    )
    assert torch.equal(joint.top_ids[..., 0], logits.argmax(-1)) and not bool(joint.borrowed.any())
    # Every center's own reading: its logits without the constant, which the last center alone has.
    scale = 1 / size(decoder.norm, final_of(model, cache))
    found = joint.center_top_tokens(zoo.D_VOCAB)
    trace = network.trace(tokens)
    for i, label in enumerate(joint.labels[:-1]):
        own = decoder.norm.scale(decoder.norm.center(trace[label])) * scale @ W_U
        assert oracles.relative_error(found.values[i], own.sort(-1, descending=True).values) < 1e-10
    constant = (b_U if decoder.norm.bias is None else decoder.norm.bias @ W_U + b_U).sort(descending=True)
    assert oracles.relative_error(found.values[-1], constant.values.expand_as(found.values[-1])) < 1e-12
    assert float(joint.alpha[-1].abs().max()) == 0 and float(joint.beta.abs().max()) == 0
    assert len(joint.average()) == 4 and len(joint.to_dataframe()) == len(joint.labels) * tokens.numel()
    assert float(joint.control.kl.mean()) > 1e-2, "random components are not the model"
    for kinds in (("measures", "uniform"), ("control", "control_uniform")):  # all weights are 1
        one, other = (getattr(joint, kind) for kind in kinds)
        assert oracles.relative_error(one.remainder_norm, other.remainder_norm) < 1e-12


def test_padding_and_positions():
    model = zoo.build(SMALL[0])
    tokens, mask = zoo.padded(model, lengths=(6, 4))
    network = ResidualNetwork(model)
    whole = iterative_jet_lens(network, tokens, attention_mask=mask, linearize="detached", top_k=2)
    alone = iterative_jet_lens(network, tokens[1:, 2:], linearize="detached", top_k=2)
    assert bool(whole.kl[:, :, 1, :2].isnan().all())
    assert oracles.relative_error(whole.full_values[:, :, 1:, 2:], alone.full_values) < 1e-10
    last = joint_jet_lens(network, tokens, attention_mask=mask, linearize="detached", positions=-1)
    every = joint_jet_lens(network, tokens, attention_mask=mask, linearize="detached")
    assert oracles.relative_error(last.full_values, every.full_values[:, -1:]) < 1e-12
    terms = jet_expand(network, "0_attn", centers="embed", linearize="detached")(
        network.trace(tokens, attention_mask=mask)
    )
    short = jet_expand(network, "0_attn", centers="embed", linearize="detached")(tokens[1:, 2:])
    path = "embed > 0_attn"
    assert oracles.relative_error(terms[path][1:, 2:], short[path]) < 1e-10
