"""TransformerLens models as residual networks, against what a user would do with hooks, in both worlds."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import numpy
import oracles
import pytest
import torch
import transformers
import zoo
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tl_jets import ResidualNetwork
from tl_jets.adapters import blocks, parts
from tl_jets.adapters.reading import read_norm
from tl_jets.calculus import full_precision, jet

TOLERANCE = 1e-10
CORE = zoo.available(zoo.CORE)
ALL = CORE + [spec for spec in zoo.available(zoo.EXTRA) if spec.processing == "raw"]
UNSUPPORTED = {("bridge", "opt")}  # refused: its MLP is not a module


def supported(specs: list) -> list:
    return [spec for spec in specs if (spec.world, spec.name) not in UNSUPPORTED]


class _StopError(Exception):
    pass


def run_reading(model: Any, tokens: Tensor, read: str, write: dict[str, Any], **extra: Any) -> Tensor:
    """Run the whole model with streams overwritten by hooks, and read one activation: what a user would do by hand."""
    box: list[Tensor] = []

    def grab(tensor: Tensor, hook: Any) -> None:
        box.append(tensor)
        raise _StopError

    hooks = [(name, lambda tensor, hook, value=value: value) for name, value in write.items()]
    # Several models keep state on their modules only; a stopped forward pass leaves none behind.
    with full_precision(), model.hooks([*hooks, (read, grab)]), contextlib.suppress(_StopError):
        model(tokens, **extra)
    return box[-1]


def elsewhere(stream: Tensor, seed: int = 0) -> Tensor:
    """Another stream of the same size."""
    generator = torch.Generator().manual_seed(seed)
    return 0.7 * stream + 0.6 * stream.std() * torch.randn(stream.shape, generator=generator, dtype=stream.dtype)


def overwrites(network: ResidualNetwork, stage: Any, stream: Tensor) -> dict[str, Tensor]:
    """The hook that puts a stream in front of a stage."""
    layer, kind = stage.stream.split("_")
    return {f"blocks.{layer}.hook_resid_{kind}": stream}


@pytest.mark.parametrize("spec", supported(ALL), ids=str)
def test_streams_and_writes_are_the_models_own(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    network = ResidualNetwork(model)
    trace = network.trace(tokens)
    with torch.no_grad(), full_precision():
        logits, cache = model.run_with_cache(tokens)
    total = sum(trace[label] for label in network.components)
    assert oracles.relative_error(total, trace["final_post"]) < 1e-12
    for layer in range(len(model.blocks)):
        assert torch.equal(trace[f"{layer}_pre"], cache["resid_pre", layer])
        assert torch.equal(trace[f"{layer}_attn_out"], cache["attn_out", layer])
        if f"{layer}_mlp" in [step.label for step in network.steps]:
            assert torch.equal(trace[f"{layer}_mlp_out"], cache["mlp_out", layer])
    assert torch.equal(trace["final_post"], cache["resid_post", len(model.blocks) - 1])
    assert torch.equal(trace.logits, logits)


@pytest.mark.parametrize("spec", [spec for spec in supported(CORE) if spec.processing == "raw"], ids=str)
def test_a_stream_that_is_not_the_sum_of_its_writes_is_refused(spec, monkeypatch):
    """Blocks that write to the stream what no hook point shows, as in an architecture that is not understood."""
    model = zoo.fresh(spec)
    tokens, blocks = zoo.tokens(model), model.blocks
    ResidualNetwork(model).trace(tokens)

    def refused(module: Any, message: str) -> None:
        forward = module.forward

        def leaking(*args: Any, **options: Any) -> Any:
            out = forward(*args, **options)
            stream = out[0] if isinstance(out, tuple) else out
            stream = stream * (1 + 1e-8 * torch.linspace(-1, 1, stream.shape[-1], dtype=stream.dtype))
            return (stream, *out[1:]) if isinstance(out, tuple) else stream

        with monkeypatch.context() as patched:
            patched.setitem(vars(module), "forward", leaking)  # `setattr` of a bridge goes to what it wraps
            with pytest.raises(ValueError, match=message):
                ResidualNetwork(model).trace(tokens)

    said = "A stream must be the sum of what was written to it; {} differs by .* and no hook on {} explains it"
    refused(blocks[0], said.format("1_pre", "blocks.1.hook_resid_pre"))
    if spec.world == "bridge":  # inside the block, before its output's hook point
        for layer, stream in ((0, "1_pre"), (len(blocks) - 1, "final_post")):
            refused(blocks[layer].original_component, said.format(stream, f"blocks.{layer}.hook_resid_post"))
    ResidualNetwork(model).trace(tokens)


@pytest.mark.parametrize("spec", supported(ALL), ids=str)
def test_gammas_at_the_true_stream_are_bit_equal(spec):
    model = zoo.build(spec)
    network = ResidualNetwork(model)
    trace = network.trace(zoo.tokens(model))
    for stage in network.stages:
        with torch.no_grad():
            replayed = trace.stage_function(stage)(trace[stage.stream])
        for step, write in zip(stage.steps, replayed, strict=True):
            assert torch.equal(write, trace[step.write]), step.label


@pytest.mark.parametrize("spec", supported(ALL), ids=str)
def test_gammas_elsewhere_are_what_overwriting_the_stream_gives(spec):
    """The oracle runs the whole model with the stream replaced by a hook; gamma calls submodules only."""
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    network = ResidualNetwork(model)
    trace = network.trace(tokens)
    for stage in network.stages[-2:]:
        stream = elsewhere(trace[stage.stream])
        with torch.no_grad():
            found = trace.stage_function(stage)(stream)
        for step, write in zip(stage.steps, found, strict=True):
            name = f"blocks.{step.layer}.hook_{step.kind}_out"
            wanted = run_reading(model, tokens, name, overwrites(network, stage, stream))
            assert oracles.relative_error(write, wanted) < TOLERANCE, step.label
            assert oracles.relative_error(write, trace[step.write]) > 1e-3, "the other stream must matter"


@pytest.mark.parametrize("spec", supported(CORE), ids=str)
def test_block_gamma_is_the_block_without_its_identity(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    network = ResidualNetwork(model, "block")
    trace = network.trace(tokens)
    stage = network.stages[1]
    stream = elsewhere(trace[stage.stream])
    with torch.no_grad():
        found = trace.gamma("1_block")(stream)
    wanted = run_reading(model, tokens, "blocks.1.hook_resid_post", {"blocks.1.hook_resid_pre": stream}) - stream
    assert oracles.relative_error(found, wanted) < TOLERANCE


@pytest.mark.parametrize("spec", supported(CORE), ids=str)
@pytest.mark.parametrize("kind", ["attn", "mlp"])
def test_jets_of_sublayers_against_nested_differentiation(spec, kind):
    model = zoo.build(spec)
    network = ResidualNetwork(model)
    labels = [step.label for step in network.steps]
    if f"1_{kind}" not in labels:
        pytest.skip("the family has no such sublayer")
    trace = network.trace(zoo.tokens(model, batch=2, pos=5))
    stage = network.stage(f"1_{kind}")
    center, variate = trace["0_pre"], trace[stage.stream]
    gamma = trace.gamma(f"1_{kind}")
    found = jet(gamma, center, variate, order=3).coefficients
    with full_precision():
        wanted = oracles.nested_jvp_coefficients(gamma, center, variate - center, 3)
    assert oracles.relative_error(found, wanted) < TOLERANCE
    assert float(found[3].abs().max()) > 1e-6, "the third order must matter"


@pytest.mark.parametrize("spec", supported(CORE), ids=str)
def test_decoder_jets_against_nested_differentiation(spec):
    network = ResidualNetwork(zoo.build(spec))
    trace = network.trace(zoo.tokens(network.view.model))
    center, variate = trace["1_pre"], trace["final_post"]

    def decoder(stream: Tensor) -> Tensor:
        with full_precision():
            return network.view.model.ln_final(stream)

    found = jet(decoder, center, variate, order=3).coefficients
    with full_precision():
        wanted = oracles.nested_jvp_coefficients(network.decoder.norm, center, variate - center, 3)
    assert oracles.relative_error(found, wanted) < TOLERANCE


@pytest.mark.parametrize("spec", supported(ALL), ids=str)
def test_heads_and_bias_sum_to_the_attention_write(spec):
    model = zoo.build(spec)
    network = ResidualNetwork(model, "head")
    trace = network.trace(zoo.tokens(model))
    stage = network.stages[0]
    stream = elsewhere(trace["0_pre"])
    with torch.no_grad():
        writes = trace.stage_function(stage)(stream)
        attn = trace.network.at("sublayer").trace(trace.tokens).gamma("0_attn")(stream)
    heads = [index for index, step in enumerate(stage.steps) if step.kind in ("head", "attn_bias")]
    assert len(heads) == model.cfg.n_heads + 1
    assert oracles.relative_error(writes[heads].sum(0), attn) < 1e-12


@pytest.mark.parametrize("spec", supported(CORE), ids=str)
def test_a_head_is_what_its_value_vectors_carry(spec):
    """Without post-norm: the bias is constant, and removing head h at hook_z removes its write and its own constant."""
    model = zoo.build(spec)
    network = ResidualNetwork(model, "head")
    tokens = zoo.tokens(model)
    trace = network.trace(tokens)
    stage = network.stages[0]
    with torch.no_grad():
        here = trace.stage_function(stage)(trace["0_pre"])
        there = trace.stage_function(stage)(elsewhere(trace["0_pre"]))
        zero = torch.zeros_like(trace["0_pre"])
    bias = [step.kind for step in stage.steps].index("attn_bias")
    if network.view.post_norm(0) is not None:
        # Shares at the post-norm's own scale: no value biases here, so heads alone make the norm's input.
        z = run_reading(model, tokens, "blocks.0.attn.hook_z", {})
        parts = torch.einsum("bphe,hem->hbpm", z, model.blocks[0].attn.W_O)
        scale = here[: model.cfg.n_heads].sum(0) / parts.sum(0)
        assert oracles.relative_error(here[: model.cfg.n_heads], parts * scale) < 1e-8
        assert float(here[bias].abs().max()) < 1e-12
        return
    assert oracles.relative_error(here[bias], there[bias]) < 1e-10

    def without_head_2(z: Tensor, hook: Any) -> Tensor:
        z[:, :, 2] = 0
        return z

    with torch.no_grad(), model.hooks([("blocks.0.attn.hook_z", without_head_2)]):
        ablated = network.at("sublayer").trace(tokens)["0_attn_out"]
        at_zero = network.at("sublayer").trace(tokens).gamma("0_attn")(zero)
    whole_at_zero = network.at("sublayer").trace(tokens).gamma("0_attn")(zero)
    constant = whole_at_zero - at_zero  # what head 2 gives at a zero normalized input
    assert oracles.relative_error(trace["0_attn_out"] - ablated, here[2] + constant) < TOLERANCE


NOT_THE_SUM = "Attention must be the sum of its heads and a constant; in block 1 of"


@pytest.mark.parametrize("spec", supported(CORE), ids=str)
def test_heads_that_are_not_the_models_are_refused(spec, monkeypatch):
    """The bias is what heads leave of the write, so that any heads add up to it: what they leave must not read the stream."""
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    grab = parts._z_and_out

    def reordered(view: Any, calls: Any, layer: int, stream: Tensor) -> tuple[Tensor, Tensor]:
        z, out = grab(view, calls, layer, stream)
        return (z.flip(2) if layer == 1 else z), out

    monkeypatch.setattr(parts, "_z_and_out", reordered)
    trace = ResidualNetwork(model, "head").trace(tokens)
    assert trace["L0H1_out"].shape == trace["0_pre"].shape
    with pytest.raises(NotImplementedError, match=NOT_THE_SUM):
        trace["L1H1_out"]


@pytest.mark.parametrize("spec", supported(CORE), ids=str)
def test_heads_under_a_hook_on_their_sum(spec):
    """What a hook takes of the sum is nobody's share, and refused; a constant that it adds is the bias's; heads are the heads'."""
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    network = ResidualNetwork(model, "head")
    trace = network.trace(tokens)
    plain = {label: trace[label] for label in ("L0H1_out", "L1H1_out", "1_attn_bias", "1_attn_out")}
    points = [name for name in ("blocks.1.hook_attn_out", "blocks.1.attn.hook_out") if name in model.hook_dict]
    for name in points:
        with model.hooks([(name, lambda tensor, hook: 1.01 * tensor)]):
            trace = network.trace(tokens)
            if name.endswith("attn_out") or network.view.post_norm(1) is None:
                assert oracles.relative_error(trace["1_attn_out"], 1.01 * plain["1_attn_out"]) < TOLERANCE
            with pytest.raises(NotImplementedError, match=f"{NOT_THE_SUM}.* Use granularity='sublayer'"):
                trace["L1H1_out"]
            assert oracles.relative_error(trace["L0H1_out"], plain["L0H1_out"]) < TOLERANCE
            assert network.at("sublayer").trace(tokens).gamma("1_attn")(trace["1_pre"]).shape == trace["1_pre"].shape
    direction = torch.linspace(-1, 1, model.cfg.d_model, dtype=torch.float64)
    with model.hooks([("blocks.1.hook_attn_out", lambda tensor, hook: tensor + direction)]):
        trace = network.trace(tokens)
        assert oracles.relative_error(trace["L1H1_out"], plain["L1H1_out"]) < TOLERANCE
        found = trace["1_attn_bias"] - plain["1_attn_bias"]
        assert oracles.relative_error(found, direction.expand_as(found)) < TOLERANCE

    def without_head_2(z: Tensor, hook: Any) -> Tensor:
        z[:, :, 2] = 0
        return z

    with model.hooks([("blocks.1.attn.hook_z", without_head_2)]):
        trace = network.trace(tokens)
        assert not trace["L1H2_out"].any()
        if network.view.post_norm(1) is None:
            assert oracles.relative_error(trace["L1H1_out"], plain["L1H1_out"]) < TOLERANCE


@pytest.mark.parametrize("spec", zoo.available(["gpt2_attn_result"]), ids=str)
def test_heads_under_a_hook_on_their_results_are_refused(spec):
    model = zoo.build(spec)

    def without_head_2(result: Tensor, hook: Any) -> Tensor:
        result[:, :, 2] = 0
        return result

    with model.hooks([("blocks.1.attn.hook_result", without_head_2)]):
        trace = ResidualNetwork(model, "head").trace(zoo.tokens(model))
        with pytest.raises(NotImplementedError, match=NOT_THE_SUM):
            trace["L1H1_out"]


@pytest.mark.skipif(
    zoo.HookedTransformer is None, reason="the bridge's models with attention sinks have routed experts"
)
def test_heads_beside_an_attention_sink():
    """Rows of the pattern sum to less than one, and heads are what they are all the same."""
    options = zoo._OWN | {"use_attention_sinks": True, "dtype": torch.float64, "device": "cpu"}
    with zoo._quiet():
        model = zoo.HookedTransformer(zoo.HookedTransformerConfig(**options), move_to_device=False)
    zoo.randomize(model)
    model.eval().requires_grad_(False)
    tokens = zoo.tokens(model)
    _, cache = model.run_with_cache(tokens)
    rows = cache["pattern", 1].sum(-1)
    assert float(rows.max()) < 1 - 1e-3 and float(rows.std()) > 0.05
    trace = ResidualNetwork(model, "head").trace(tokens)
    z, z_at_zero = cache["z", 1], activation_at_zero(model, tokens)
    parts = torch.einsum("bphe,hem->hbpm", z - z_at_zero, model.blocks[1].attn.W_O)
    constant = torch.einsum("bphe,hem->bpm", z_at_zero, model.blocks[1].attn.W_O) + model.blocks[1].attn.b_O
    assert oracles.relative_error(trace.writes(trace.network.stages[2])[:-1], parts) < TOLERANCE
    assert oracles.relative_error(trace["1_attn_bias"], constant) < TOLERANCE


def activation_at_zero(model: Any, tokens: Tensor) -> Tensor:
    """hook_z of block 1 with its stream overwritten by zeros."""
    return run_reading(
        model, tokens, "blocks.1.attn.hook_z", {"blocks.1.hook_resid_pre": torch.zeros(*tokens.shape, 24).double()}
    )


POST_NORMED = [spec for spec in supported(ALL) if spec.name in ("gemma2", "gemma3", "olmo2", "sandwich")]


def points_of_post_norms(network: ResidualNetwork, model: Any) -> list[str]:
    """Names of the hook points inside block 1's norms after attention and MLP."""
    modules = [network.view._post_norm_module(1, which) for which in ("attn", "mlp")]
    points = {id(point) for module in modules for point in module.modules()}
    return [name for name, point in model.hook_dict.items() if id(point) in points and name.startswith("blocks.1.ln")]


@pytest.mark.parametrize("spec", POST_NORMED, ids=str)
def test_norms_after_a_sublayer_are_read_before_hooks_come(spec, monkeypatch):
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    network, plain = ResidualNetwork(model, "head"), ResidualNetwork(model, "head").trace(tokens)
    labels = ("L1H1_out", "1_attn_bias", "L1N17_out", "1_mlp_bias")
    wanted = {label: plain[label] for label in labels}
    points = points_of_post_norms(network, model)
    assert len(points) >= 4
    hooks = [(name, lambda tensor, hook: tensor) for name in points]
    monkeypatch.setattr(blocks, "read_norm", None)  # nothing is read any more
    with model.hooks(hooks):
        trace = network.trace(tokens)
        for label in labels:
            assert oracles.relative_error(trace[label], wanted[label]) < TOLERANCE, label
    edited = [(name, lambda tensor, hook: 1.01 * tensor) for name in points if name.endswith("hook_normalized")]
    with model.hooks(edited):
        trace = network.trace(tokens)
        with pytest.raises(NotImplementedError, match=NOT_THE_SUM):
            trace["L1H1_out"]
        with pytest.raises(NotImplementedError, match="all neurons and b_out are off"):
            trace["L1N17_out"]
    monkeypatch.undo()
    with model.hooks(hooks):
        late = ResidualNetwork(model, "head")
        trace = late.trace(tokens)
        assert torch.equal(trace["1_attn_out"], plain["1_attn_out"])
        with pytest.raises(ValueError, match="Build the ResidualNetwork before"):
            trace["L1H1_out"]
    assert torch.equal(late.trace(tokens)["L1H1_out"], wanted["L1H1_out"])


def test_norms_after_a_sublayer_follow_changes_of_their_weights():
    for spec in (spec for spec in POST_NORMED if spec.name == "gemma2" and spec.processing == "raw"):
        model = zoo.fresh(spec)
        network = ResidualNetwork(model, "head")
        for parameter in network.view._post_norm_module(1, "attn").parameters():
            parameter.mul_(3)
        tokens = zoo.tokens(model)
        wanted = ResidualNetwork(model, "head").trace(tokens)["L1H1_out"]
        assert torch.equal(network.trace(tokens)["L1H1_out"], wanted)


@pytest.mark.parametrize("name", ["gpt2", "pythia", "gpt_neo"])
def test_folding_value_biases_changes_no_head(name):
    spec = next(spec for spec in zoo.available([name]) if spec.world == zoo.available([name])[-1].world)
    if spec.world == "hooked":
        raw, folded = (zoo.fresh(zoo.ModelSpec(name, "hooked", "raw")) for _ in range(2))
        folded.fold_value_biases(folded.state_dict())
        state = folded.fold_value_biases(folded.state_dict())
        folded.load_state_dict(state)
    else:
        raw, folded = (zoo.fresh(zoo.ModelSpec(name, "bridge", "raw")) for _ in range(2))
        folded.process_weights(
            fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=True
        )
        folded.to(torch.float64)
    tokens = zoo.tokens(raw)
    raw_trace, folded_trace = (ResidualNetwork(model, "head").trace(tokens) for model in (raw, folded))
    for head in range(raw.cfg.n_heads):
        label = f"L1H{head}_out"
        assert oracles.relative_error(raw_trace[label], folded_trace[label]) < 1e-5  # folding runs in float32
    assert oracles.relative_error(raw_trace["1_attn_bias"], folded_trace["1_attn_bias"]) < 1e-5


@pytest.mark.parametrize("spec", supported(CORE), ids=str)
def test_left_padding_changes_nothing_for_real_tokens(spec):
    model = zoo.build(spec)
    tokens, mask = zoo.padded(model)
    network = ResidualNetwork(model)
    trace = network.trace(tokens, attention_mask=mask)
    assert torch.equal(trace.valid, mask.bool())
    for row in range(len(tokens)):
        alone = network.trace(tokens[row : row + 1, mask[row].bool()])
        for label in ("0_attn_out", "1_pre", "final_post"):
            padded = trace[label][row, mask[row].bool()]
            assert oracles.relative_error(padded, alone[label][0]) < 1e-9, label
    center, variate = trace["0_pre"], trace["1_pre"]
    found = jet(trace.gamma("1_attn"), center, variate, order=2).coefficients
    assert torch.isfinite(found[:, mask.bool()]).all()


@pytest.mark.parametrize("spec", supported(CORE), ids=str)
def test_jets_follow_the_users_hooks(spec):
    """Inside `with model.hooks(...)` streams, gammas and jets are those of the edited model."""
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=2, pos=5)
    network = ResidualNetwork(model)
    plain = network.trace(tokens)

    def ablate(z: Tensor, hook: Any) -> Tensor:
        z[:, :, 1] = 0
        return z

    def damp(value: Tensor, hook: Any) -> Tensor:
        return 0.5 * value

    hooks = [("blocks.0.attn.hook_z", ablate), ("blocks.1.hook_attn_out", damp)]
    with full_precision(), torch.no_grad():
        wanted = model.run_with_hooks(tokens, fwd_hooks=hooks)
    with model.hooks(hooks):
        trace = network.trace(tokens)
        assert torch.equal(trace.logits, wanted)
        assert oracles.relative_error(trace["1_attn_out"], plain["1_attn_out"]) > 1e-3
        center, variate = trace["0_pre"], trace["1_pre"]
        gamma = trace.gamma("1_attn")
        found = jet(gamma, center, variate, order=2).coefficients
    unedited = jet(network.trace(tokens).gamma("1_attn"), center, variate, order=2).coefficients
    assert oracles.relative_error(found, 0.5 * unedited) < TOLERANCE
    with pytest.raises(ValueError, match="under the hooks under which it was made"):
        trace.gamma("1_attn")


@pytest.mark.parametrize("spec", supported(CORE), ids=str)
@pytest.mark.parametrize("place", ["pre", "mid", "post"])
def test_steering_the_stream_is_a_labelled_edit(spec, place):
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    network = ResidualNetwork(model)
    hook_name = f"blocks.1.hook_resid_{place}"
    if place == "mid" and "1_mid" not in network.streams:
        pytest.skip("the family has no such stream")
    direction = torch.linspace(-1, 1, model.cfg.d_model, dtype=torch.float64)
    hooks = [(hook_name, lambda stream, hook: stream + direction)]
    with full_precision(), torch.no_grad():
        wanted = model.run_with_hooks(tokens, fwd_hooks=hooks)
    with model.hooks(hooks):
        trace = network.trace(tokens)
        assert torch.equal(trace.logits, wanted)
        for stage in network.stages:
            trace.stage_function(stage)  # the self-check runs
        total = sum(trace[label] for label in network.components)
        edits = [label for stream in network.streams for label in trace.edits(stream)]
        total = total + sum(trace[label] for label in edits)
        assert oracles.relative_error(total, trace["final_post"]) < 1e-12
        if place == "mid" and spec.world == "bridge":
            assert edits == []  # the skip does not see it: it is part of the MLP's gamma
            return
        assert edits == [f"edit:{hook_name}"]
        assert oracles.relative_error(trace[edits[0]], direction.expand_as(trace["0_pre"])) < 1e-12


def test_a_ready_cache_gives_the_same_network():
    for spec in zoo.available(["gpt2", "llama"]):
        model = zoo.build(spec)
        tokens = zoo.tokens(model)
        _, cache = model.run_with_cache(tokens)
        network = ResidualNetwork(model)
        trace, own = network.trace(tokens, cache=cache), network.trace(tokens)
        for label in network.labels:
            assert oracles.relative_error(trace[label], own[label]) < 1e-6
        found = trace.gamma("1_mlp")(trace["1_pre"])
        assert oracles.relative_error(found, own.gamma("1_mlp")(own["1_pre"])) < 1e-6


def cache_of(model: Any, tokens: Tensor, hooks: Any = (), **extra: Any) -> Any:
    with full_precision(), model.hooks(list(hooks)):
        return model.run_with_cache(tokens, **extra)[1]


CACHED = [spec for spec in supported(ALL) if spec.processing == "raw"]


@pytest.mark.parametrize("spec", CACHED, ids=str)
def test_a_cache_of_other_tokens_is_refused(spec):
    """One token differs, or two prompts are swapped; the refusal costs the first attention, and leaves the model as it was."""
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    network = ResidualNetwork(model)
    before, cache = model(tokens), cache_of(model, tokens)
    other = tokens.clone()
    other[1, 3] = 60 if tokens[1, 3] != 60 else 59
    reached: list[str] = []
    watch = [("blocks.1.hook_resid_pre", lambda tensor, hook: reached.append(hook.name))]
    with model.hooks(watch), pytest.raises(ValueError, match=r"hook_resid_pre is not .* first at prompt 1, position 3"):
        network.trace(other, cache=cache)
    with pytest.raises(ValueError, match=r"A cache must be of the same input; .* first at prompt 0, position 0"):
        network.trace(tokens.flip(0), cache=cache)
    own = network.trace(tokens, cache=cache)
    assert reached == [] and torch.equal(own["final_post"], cache["resid_post", len(model.blocks) - 1])
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("spec", [spec for spec in CACHED if spec.name in zoo.CORE], ids=str)
def test_a_cache_under_another_mask_is_refused(spec):
    """Learned positions show it in the first stream, rotary ones in what the first attention writes. Padding may differ."""
    model = zoo.build(spec)
    tokens, mask = zoo.padded(model)
    network = ResidualNetwork(model)
    repadded = torch.where(mask.bool(), tokens, 5)
    trace = network.trace(repadded, attention_mask=mask, cache=cache_of(model, tokens, attention_mask=mask))
    own = network.trace(tokens, attention_mask=mask)
    assert oracles.relative_error(trace["final_post"][trace.valid], own["final_post"][own.valid]) < 1e-9
    where = "hook_resid_pre" if "pos_embed" in network.sources else "hook_attn_out"
    # Rotary positions are relative: without a mask the first prompt, which is not padded, is the same.
    with pytest.raises(ValueError, match=rf"{where} is not the model's, first at prompt 1"):
        network.trace(tokens, attention_mask=mask, cache=cache_of(model, tokens, attention_mask=torch.ones_like(mask)))


@pytest.mark.parametrize(
    "name", ["hook_embed", "blocks.0.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.0.hook_attn_out"]
)
def test_a_cache_is_read_under_the_hooks_that_made_it(name):
    for spec in [spec for spec in CACHED if spec.name in ("gpt2", "llama", "gemma2")]:
        model = zoo.build(spec)
        tokens = zoo.tokens(model)
        network = ResidualNetwork(model)
        hooks = [(name, lambda tensor, hook: tensor + torch.linspace(-0.1, 0.3, tensor.shape[-1], dtype=tensor.dtype))]
        cache = cache_of(model, tokens, hooks)
        with pytest.raises(ValueError, match="under the hooks that are active now"):
            network.trace(tokens, cache=cache)
        with model.hooks(hooks):
            trace, own = network.trace(tokens, cache=cache), network.trace(tokens)
            assert torch.equal(trace["final_post"], own["final_post"]) and trace.labels == own.labels
            with pytest.raises(ValueError, match="under the hooks that are active now"):
                network.trace(tokens, cache=cache_of(zoo.fresh(spec), tokens))


def test_each_caches_steps_are_compared_with_replays():
    """A hook on a later layer leaves the beginning alone: the steps that it edits are refused, whatever was checked before."""
    model = zoo.build(zoo.available(["gpt2"])[0])
    tokens = zoo.tokens(model)
    network = ResidualNetwork(model)
    network.trace(tokens, cache=cache_of(model, tokens)).gamma("1_mlp")
    network.trace(tokens).gamma("1_mlp")
    edited = cache_of(model, tokens, [("blocks.1.hook_mlp_out", lambda tensor, hook: 1.01 * tensor)])
    trace = network.trace(tokens, cache=edited)
    trace.gamma("0_mlp")
    with pytest.raises(ValueError, match="1_mlp is off by"):
        trace.gamma("1_mlp")


@pytest.mark.parametrize(
    "spec", [spec for spec in CACHED if spec.name in ("gpt2", "llama", "gemma2", "bloom")], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_caches_of_any_precision(spec, dtype):
    """Of a half-precision model, and kept in half or single precision: other tokens show in each."""
    exact = zoo.build(spec)
    tokens = zoo.tokens(exact)
    wanted = ResidualNetwork(exact).trace(tokens)
    made_in = zoo.fresh(spec, torch.float32).to(dtype) if dtype is torch.bfloat16 else exact
    for model in {made_in, exact}:
        cache = {name: value.to(dtype) for name, value in cache_of(model, tokens).items() if value.is_floating_point()}
        network = ResidualNetwork(model)
        trace = network.trace(tokens, cache=cache)
        error = oracles.relative_error(trace["final_post"], wanted["final_post"])
        assert error < {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 0.05}[dtype]
        with pytest.raises(ValueError, match="first at prompt 2, position 6"):
            network.trace(torch.cat([tokens.flatten()[:-1], tokens[0, :1]]).reshape(tokens.shape), cache=cache)


def test_a_cache_of_other_shape_or_without_streams_is_refused():
    model = zoo.build(zoo.available(["gpt2"])[0])
    tokens = zoo.tokens(model)
    network = ResidualNetwork(model)
    with pytest.raises(ValueError, match="of the same tokens with its batch dimension"):
        network.trace(tokens, cache=cache_of(model, tokens[:, :5]))
    with pytest.raises(ValueError, match="must hold every stream and write"):
        network.trace(tokens, cache=cache_of(model, tokens, names_filter=lambda name: "attn_out" in name))
    # The sources are the model's own where the cache has none.
    cache = {name: value for name, value in cache_of(model, tokens).items() if name.startswith("blocks")}
    trace, own = network.trace(tokens, cache=cache), network.trace(tokens)
    assert all(torch.equal(trace[label], own[label]) for label in ("embed", "pos_embed", "0_pre"))


@pytest.mark.parametrize("spec", zoo.available(["gpt2", "llama", "pythia"]), ids=str)
def test_replays_leave_the_model_as_it_was(spec):
    model = zoo.fresh(spec)
    tokens = zoo.tokens(model)
    before = model(tokens)
    network = ResidualNetwork(model, "head")
    trace = network.trace(tokens)
    jet(trace.stage_function(network.stages[0]), trace["0_pre"] * 0.9, trace["0_pre"], order=2)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert torch.equal(copy.deepcopy(model)(tokens), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", zoo.available(["gpt2", "llama", "pythia", "gemma2"]), ids=str)
def test_half_precision_models_compute_in_float32(spec, dtype):
    if spec.processing == "processed":
        pytest.skip("raw is enough")
    half = zoo.fresh(spec, torch.float32).to(dtype)
    full = copy.deepcopy(half).to(torch.float32)
    tokens = zoo.tokens(half)
    trace, wanted = ResidualNetwork(half).trace(tokens), ResidualNetwork(full).trace(tokens)
    assert trace["final_post"].dtype == torch.float32
    assert oracles.relative_error(trace["final_post"], wanted["final_post"]) < 1e-4
    found = jet(trace.gamma("1_mlp"), trace["0_pre"], trace["1_pre"], order=1).value
    assert found.dtype == torch.float32
    assert (
        oracles.relative_error(found, jet(wanted.gamma("1_mlp"), wanted["0_pre"], wanted["1_pre"], order=1).value)
        < 1e-3
    )


@pytest.mark.parametrize("spec", supported(ALL), ids=str)
def test_norms_are_read_from_the_module(spec):
    model = zoo.build(spec)
    cfg, ln_final = model.cfg, getattr(model, "ln_final", None)
    norm = read_norm(ln_final, cfg, cfg.d_model, torch.device("cpu"), torch.float64)
    stream = torch.randn(2, 3, cfg.d_model, dtype=torch.float64)
    if ln_final is not None:
        with full_precision():
            assert oracles.relative_error(norm(stream), ln_final(stream)) < 1e-12


def test_unsupported_models_are_refused_by_name():
    model = zoo.fresh(zoo.available(["gpt2"])[0])
    model.train()
    with pytest.raises(ValueError, match=r"evaluation mode .* Call model.eval\(\)"):
        ResidualNetwork(model)
    model.eval()
    marked = copy.deepcopy(model)
    marked.cfg.is_encoder_decoder = True
    with pytest.raises(NotImplementedError, match="Decoder-only"):
        ResidualNetwork(marked)
    marked = copy.deepcopy(model)
    marked.cfg.load_in_4bit = True
    trace = ResidualNetwork(marked).trace(zoo.tokens(marked))  # streams can be read
    with pytest.raises(NotImplementedError, match="quantized weights"):
        trace.gamma("0_mlp")
    with pytest.raises(TypeError, match="must be a TransformerLens TransformerBridge or HookedTransformer"):
        ResidualNetwork(torch.nn.Linear(2, 2))


@pytest.mark.usefixtures("as_users_run_it")
def test_bad_input_is_refused():
    model = zoo.build(zoo.available(["gpt2"])[0])
    network = ResidualNetwork(model)
    tokens = zoo.tokens(model)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.60; got 3\.\.61"):
        network.trace(torch.tensor([[3, 61]]))
    with pytest.raises(ValueError, match="context of 32 tokens; got 33"):
        network.trace(torch.full((1, 33), 3))
    with pytest.raises(TypeError, match="must be integers"):
        network.trace(torch.randn(1, 3))
    with pytest.raises(ValueError, match=r"one row \[pos\] a prompt, pos >= 1; got a row of shape \(\)"):
        network.trace([[1, 2], 3])
    with pytest.raises(ValueError, match="pos >= 1"):
        network.trace(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="got an empty one"):
        network.trace("")
    with pytest.raises(ValueError, match="attention_mask must have the tokens' shape"):
        network.trace(tokens, attention_mask=torch.ones(1, 2, dtype=torch.long))
    trace = network.trace(tokens)
    with pytest.raises(ValueError, match="takes a stream of shape"):
        trace.gamma("1_mlp")(trace["1_mid"][:, :4])
    with pytest.raises(ValueError, match="A label must be one of"):
        trace["9_pre"]
    with pytest.raises(ValueError, match="A stage is named by"):
        trace.gamma("9_mlp")


def test_a_hook_on_the_decoder_is_refused():
    for spec in zoo.available(["gpt2", "llama"]):
        model = zoo.build(spec)
        network = ResidualNetwork(model)
        hooks = [("ln_final.hook_normalized", lambda value, hook: 2 * value)]
        with model.hooks(hooks), pytest.raises(ValueError, match="a hook edits ln_final"):
            network.trace(zoo.tokens(model))
        with model.hooks(hooks), pytest.raises(ValueError, match="no hooks inside it"):
            ResidualNetwork(model)


@pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")
@pytest.mark.parametrize("world", sorted({spec.world for spec in ALL}))
def test_prompts_of_unequal_length_are_padded_on_the_right(world):
    model = zoo.load_stories(world)
    network = ResidualNetwork(model)
    prompts = ["Once upon a time", "Lily and Tom went to the park to play", "The"]
    trace = network.trace(prompts)
    for row, prompt in enumerate(prompts):
        alone = network.trace(prompt)
        length = alone.tokens.shape[1]
        assert torch.equal(trace.tokens[row, :length], alone.tokens[0])
        assert trace.valid[row].sum() == length
        assert oracles.relative_error(trace["final_post"][row, :length], alone["final_post"][0]) < 1e-5
    with pytest.raises(ValueError, match="context of 512 tokens"):
        network.trace("play " * 600)


@pytest.mark.parametrize("spec", [s for s in ALL if (s.world, s.name) in UNSUPPORTED], ids=str)
def test_what_cannot_be_replayed_is_refused(spec):
    trace = ResidualNetwork(zoo.build(spec)).trace(zoo.tokens(zoo.build(spec)))
    with pytest.raises(NotImplementedError, match="never calls"):
        trace.gamma("0_mlp")


def test_encoder_decoders_are_refused_by_name():
    t5 = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    hf = transformers.T5ForConditionalGeneration(t5)
    model = TransformerBridge.boot_transformers("tiny", hf_model=hf, tokenizer=zoo.tokenizer(), device="cpu")
    with pytest.raises(NotImplementedError, match="Decoder-only"):
        ResidualNetwork(model.eval())


def interpolated_coefficients(f: Any, center: Tensor, direction: Tensor, order: int) -> Tensor:
    """Taylor coefficients of t -> f(center + t direction), from a Chebyshev interpolant of 24 real nodes on [-1, 1]."""
    nodes = torch.cos(torch.pi * (torch.arange(24, dtype=torch.float64) + 0.5) / 24)
    with torch.no_grad(), full_precision():
        values = torch.stack([f(center + t * direction) for t in nodes])
    fit = numpy.polynomial.chebyshev.chebfit(nodes.numpy(), values.flatten(1).numpy(), 23)
    monomials = numpy.stack([numpy.polynomial.chebyshev.cheb2poly(column) for column in fit.T])
    return torch.tensor(monomials[:, : order + 1]).T.reshape(order + 1, *values.shape[1:])


ANALYTIC = [spec for spec in CORE if spec.processing == "raw" and spec.name != "olmo"]  # OLMo clips q, k and v


@pytest.mark.parametrize("spec", ANALYTIC, ids=str)
def test_sublayer_jets_to_order_six_against_interpolation(spec):
    """No differentiation at all in the oracle: the model is evaluated at 24 points of a segment."""
    network = ResidualNetwork(zoo.build(spec))
    trace = network.trace(zoo.tokens(network.view.model, batch=2, pos=4))
    for step in network.steps[:2]:
        stream = trace[network.stage(step.label).stream]
        direction = 0.08 * elsewhere(stream)
        gamma = trace.gamma(step.label)
        found = jet(gamma, stream, stream + direction, order=6).coefficients
        wanted = interpolated_coefficients(gamma, stream, direction, 6)
        assert oracles.relative_error(found, wanted) < TOLERANCE, step.label
        assert float(found[6].abs().max()) > 10 * TOLERANCE * float(1 + found.abs().max()), "order 6 must show"


@pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")
@pytest.mark.parametrize("world", sorted({spec.world for spec in ALL}))
def test_a_trained_model_in_float64(world):
    model = zoo.load_stories(world, torch.float64)
    network = ResidualNetwork(model, "head")
    trace = network.trace("Once upon a time, there was a little girl")
    for stage in network.stages:
        trace.stage_function(stage)
    center, variate = trace["1_pre"], trace["4_pre"]
    gamma = network.at("sublayer").trace(trace.tokens).gamma("4_attn")
    found = jet(gamma, center, variate, order=2).coefficients
    with full_precision():
        wanted = oracles.nested_jvp_coefficients(gamma, center, variate - center, 2)
    assert oracles.relative_error(found, wanted) < TOLERANCE
