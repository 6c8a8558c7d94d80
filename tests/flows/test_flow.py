"""Flows against a program of their own: TransformerLens hooks, autograd and numpy's nodes; and against path patching by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
import zoo
from live_memory import peak_bytes
from transformer_lens.model_bridge import TransformerBridge

import tl_jets as tj
from tl_jets.calculus import full_precision
from tl_jets.flows import two_runs
from tl_jets.interventions.replays import NotReplayedError, replayed

PROMPTS = ["This function is available on Unix and", "This is"]


def models(*names, processing="raw"):
    """Specs of some families, or of all."""
    return [spec for spec in zoo.available(list(names) or None) if spec.processing == processing]


def cache_of(model, tokens, hooks=()):
    found = {}
    kinds = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z")
    names = [f"blocks.{layer}.{kind}" for layer in range(model.cfg.n_layers) for kind in kinds]
    savers = [(name, lambda value, hook, name=name: found.__setitem__(name, value.detach().clone())) for name in names]
    with torch.no_grad(), full_precision():
        logits = model.run_with_hooks(tokens, fwd_hooks=[*hooks, *savers])
    return found, logits


def centered_logit(logits, token):
    return logits[:, -1, token] - logits[:, -1].mean(-1)


def stage_write(model, tokens, layer, kind, stream):
    """What a sublayer of a sequential block writes at any stream: hooks put it where the sublayer reads."""
    found = {}
    block = f"blocks.{layer}.hook_"
    hooks = [(block + "resid_pre", lambda value, hook: stream)]
    if kind == "mlp":
        hooks.append((block + "attn_out", lambda value, hook: torch.zeros_like(value)))
    hooks.append((f"{block}{kind}_out", lambda value, hook: found.__setitem__("write", value.clone())))
    with full_precision():
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    return found["write"]


def flows_by_hand(model, tokens, hooks, token, count):
    """Flows by write, their effect, and the flow of the edited component, with `count` nodes in every stage."""
    clean, logits = cache_of(model, tokens)
    other, changed = cache_of(model, tokens, hooks)
    places, weights = np.polynomial.legendre.leggauss(count)
    nodes = list(zip((places + 1) / 2, weights / 2, strict=True))
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"

    def mean_gradient(function, name, at=None):
        before, after = (at(c) if at else c[name] for c in (clean, other))
        total = torch.zeros_like(before)
        for place, weight in nodes:
            with torch.enable_grad():
                x = (before + place * (after - before)).requires_grad_(True)
                total += weight * torch.autograd.grad(function(x), x)[0]
        return total

    def value(stream):
        with full_precision():
            logits = model.run_with_hooks(tokens, fwd_hooks=[(last, lambda value, hook: stream)])
        return centered_logit(logits, token).sum()

    g, flows = mean_gradient(value, last), {}
    for layer in reversed(range(model.cfg.n_layers)):
        for kind in ("mlp", "attn"):
            name = f"blocks.{layer}.hook_{kind}_out"
            flows[f"{layer}_{kind}_out"] = (g * (other[name] - clean[name])).sum((1, 2))

            def mid(cache, layer=layer):
                return cache[f"blocks.{layer}.hook_resid_pre"] + cache[f"blocks.{layer}.hook_attn_out"]

            g = g + mean_gradient(
                lambda x, g=g, layer=layer, kind=kind: (g * stage_write(model, tokens, layer, kind, x)).sum(),
                f"blocks.{layer}.hook_resid_pre",
                mid if kind == "mlp" else None,
            )
    return flows, centered_logit(changed, token) - centered_logit(logits, token)


@pytest.mark.parametrize("spec", models("gpt2", "llama"), ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_flows_are_those_of_a_program_of_hooks_and_autograd(spec, count):
    model, token = zoo.build(spec), 11
    tokens = zoo.tokens(model, batch=2)
    hooks = tj.ablation_hooks(model, "0_attn")
    wanted, effect = flows_by_hand(model, tokens, hooks, token, count)
    found = tj.flow(model, tokens, hooks, targets=token, nodes=count, tolerance=100.0)
    assert torch.allclose(found.effect[:, 0, 0], effect, atol=1e-9)
    assert found.labels[0] == "0_attn_out" and found.nodes == [count] * len(found.stages)
    for label, own in zip(found.labels, found.flow[:, :, 0, 0], strict=True):
        assert torch.allclose(own, wanted[label], atol=1e-9), label
    assert set(found.labels) == set(wanted) and float(found.gap.abs().max()) > 1e-6


@pytest.mark.parametrize("spec", zoo.available(), ids=str)
def test_an_ablation_of_every_family_is_explained_to_the_tolerance(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=2)
    hooks = tj.ablation_hooks(model, "0_attn", mode="mean", reference=tokens)
    if spec.name == "opt" and spec.world == "bridge":
        with pytest.raises(NotImplementedError, match="A replay calls the mlp component of block 1"):
            tj.flow(model, tokens, hooks)
        return
    with torch.no_grad(), full_precision():
        before, after = model(tokens), model.run_with_hooks(tokens, fwd_hooks=hooks)
    found = tj.flow(model, tokens, hooks, targets=5, granularity="sublayer")
    assert bool(found.closed.all())
    if found.unit == "logits":
        effect = centered_logit(after, 5) - centered_logit(before, 5)
        assert torch.allclose(found.effect[:, 0, 0], effect, atol=1e-8)
    effect = found.effect
    assert torch.allclose(found.edit.sum(0), effect, rtol=1.1 * found.tolerance, atol=1e-10)  # where it starts
    assert torch.allclose(found.edit.sum(0) - effect, found.gap.sum(0), atol=1e-9)
    assert torch.allclose(found.direct.sum(0) - effect, found.gap[-1], atol=1e-9)  # where it ends
    cuts = found.cuts().set_index(["stage", "batch"])
    assert np.allclose(cuts["edited_later"], 0, atol=1e-9)  # the only edit is at the first stage
    assert np.allclose(cuts["carried"] - cuts["gap"], effect[cuts.index.get_level_values("batch"), 0, 0])


def uncapped(model, logits):
    """Logits before the softcap of the model, if it has one."""
    cap = getattr(model.cfg, "output_logits_soft_cap", None) or 0.0
    return cap * torch.atanh(logits / cap) if cap > 0 else logits


MORE = [zoo.ModelSpec(name, "bridge", "raw") for name in (zoo.FAMILIES if zoo.MAJOR > 3 else ())]


@pytest.mark.parametrize("measure", ["kl", "logit difference"])
@pytest.mark.parametrize("spec", [s for s in models() if s.name != "opt" or s.world != "bridge"] + MORE, ids=str)
def test_divergences_and_logit_differences_of_every_family_are_those_of_its_own_logits(spec, measure):
    """Their effects, by the model; their mean gradients at the last stream, by the model run on from there."""
    model, count = zoo.build(spec), 3
    tokens = zoo.tokens(model, batch=2)
    hooks = tj.ablation_hooks(model, "0_attn", mode="mean", reference=tokens)
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    kinds = [kind for kind in ("attn", "mlp") if f"blocks.0.hook_{kind}_out" in model.hook_dict]
    names = [last, *(f"blocks.{layer}.hook_{kind}_out" for layer in range(model.cfg.n_layers) for kind in kinds)]

    def run(hooks):
        saved = {}
        savers = [(name, lambda x, hook, name=name: saved.__setitem__(name, x.clone())) for name in names]
        with full_precision():
            logits = model.run_with_hooks(tokens, fwd_hooks=[*hooks, *savers])[:, -1]
        return saved, logits

    with torch.no_grad():
        (before, clean), (after, _) = run([]), run(hooks)
    p = clean.log_softmax(-1)

    def value(stream):
        logits = run([(last, lambda x, hook: stream)])[1]
        if measure == "kl":
            return (p.exp() * (p - logits.log_softmax(-1))).sum(-1)
        logits = uncapped(model, logits)
        return logits[:, 5] - logits[:, 9]

    options = {"measure": "kl"} if measure == "kl" else {"targets": 5, "against": 9}
    found = tj.flow(model, tokens, hooks, nodes=count, tolerance=1e9, granularity="sublayer", **options)
    assert found.measure == measure and found.unit.startswith("nats" if measure == "kl" else "logits")
    assert torch.allclose(found.effect[:, 0, 0], value(after[last]) - value(before[last]), atol=1e-9)
    assert float(found.effect.abs().min()) > 1e-7
    places, weights = np.polynomial.legendre.leggauss(count)
    g = torch.zeros_like(before[last])
    for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
        with torch.enable_grad():
            x = (before[last] + place * (after[last] - before[last])).requires_grad_(True)
            g += weight * torch.autograd.grad(value(x).sum(), x)[0]
    for label, own in zip(found.labels, found.direct[:, :, 0, 0], strict=True):
        layer, kind = label.split("_")[:2]
        name = f"blocks.{layer}.hook_{kind}_out"
        wanted = (g * (after[name] - before[name])).sum((1, 2))
        assert torch.allclose(own, wanted, atol=1e-8 + 1e-7 * float(wanted.abs().max())), label
    exact = tj.flow(model, tokens, hooks, granularity="sublayer", **options)
    closed = exact.closed.expand_as(exact.effect)  # kinks may keep small effects of large parts open, which is said
    assert bool(closed.all()) or (model.cfg.act_fn == "relu" and bool(closed.any()) and exact.cancellation.max() > 50)
    assert torch.allclose(exact.edit.sum(0)[closed], exact.effect[closed], rtol=0.011, atol=1e-10)


@pytest.mark.parametrize("spec", models("llama", "pythia", "gemma2"), ids=str)
def test_heads_neurons_positions_and_batches_add_up(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=2)
    options = {"targets": [5, 9], "nodes": 4, "tolerance": 100.0, "positions": [2, -1]}
    hooks = tj.ablation_hooks(model, "L0H1")
    whole = tj.flow(model, tokens, hooks, granularity="sublayer", **options)
    heads = tj.flow(model, tokens, hooks, granularity="head", by_position=True, **options)
    parts = tj.flow(tj.ResidualNetwork(model, "sublayer", ["L1N3", "L1N8"]), tokens, hooks, **options)
    blocks = tj.flow(model, tokens, hooks, granularity="block", **options)
    assert heads.effect.shape == (2, 2, 2) and torch.equal(heads.effect, whole.effect)
    assert torch.allclose(heads.by_position.sum(-1), heads.flow)
    frame = heads.by_position_dataframe()
    assert frame["flow"].tolist() == heads.by_position.flatten().tolist() and torch.equal(
        heads.prompt_tokens[:, 1], tokens
    )
    assert frame["write_pos"].tolist() == [w for _ in range(heads.flow.numel()) for w in range(tokens.shape[1])]
    with pytest.raises(ValueError, match="by_position=True"):
        tj.flow(model, tokens, hooks, **options).by_position_dataframe()
    assert tj.concat([heads, heads]).by_position_dataframe()["flow"].sum() == pytest.approx(2 * frame["flow"].sum())
    assert torch.allclose(blocks.effect, whole.effect)
    for label in whole.labels:
        layer, kind = label.split("_")[:2]
        own = [f"L{layer}H", f"{layer}_attn_bias"] if kind == "attn" else [f"L{layer}N", f"{layer}_mlp"]
        for finer in (heads, parts):
            chosen = [i for i, name in enumerate(finer.labels) if name == label or name.startswith(tuple(own))]
            assert torch.allclose(finer.flow[chosen].sum(0), whole.flow[whole.labels.index(label)], atol=1e-9), label
    assert "L1N3_out" in parts.labels and "1_mlp_rest_out" in parts.labels
    # the head that was ablated bears the edit, and no other part of its layer
    edited = [heads.labels[i] for i in range(len(heads.labels)) if bool((heads.edit[i].abs() > 1e-9).any())]
    if spec.name == "gemma2":  # the norm after attention rescales every head
        assert "L0H1_out" in edited and all(label.startswith("L0H") for label in edited)
    else:
        assert edited == ["L0H1_out"]
    alone = tj.flow(model, tokens[1:], tj.ablation_hooks(model, "L0H1"), granularity="head", **options)
    assert torch.allclose(alone.flow[:, 0], heads.flow[:, 1], atol=1e-9)


@pytest.mark.parametrize("spec", models("gpt2", "pythia"), ids=str)
def test_changes_of_heads_are_the_same_read_off_the_passes_and_replayed(spec, monkeypatch):
    """Value biases are constants of heads, which cancel; not where one of the two runs kept no heads."""
    model = zoo.build(spec)
    tokens, hooks = zoo.tokens(model, batch=2), tj.ablation_hooks(model, "0_mlp")
    options = {"targets": 5, "nodes": 2, "tolerance": 1e9, "granularity": "head"}
    found = tj.flow(model, tokens, hooks, **options)
    without_heads = tj.ResidualNetwork(model, "sublayer").trace(tokens)
    mixed = tj.flow(tj.ResidualNetwork(model, "head"), without_heads, hooks, **options)
    view = type(tj.ResidualNetwork(model).view)
    monkeypatch.setattr(view, "recorded_writes", lambda *args, **kwargs: None)
    replayed = tj.flow(model, tokens, hooks, **options)
    for other in (mixed, replayed):
        of_heads = [i for i, label in enumerate(found.labels) if "bias" not in label]
        where = [other.labels.index(found.labels[i]) for i in of_heads]
        assert len(of_heads) > 5 and torch.allclose(other.flow[where], found.flow[of_heads], atol=1e-10)


@pytest.mark.parametrize("spec", models("gpt2", "llama"), ids=str)
def test_the_edit_of_a_patched_head_is_all_its_own(spec):
    """Also where the patch, a constant, replaces what the head writes at a zero stream."""
    model, name = zoo.build(spec), "blocks.0.attn.hook_z"
    tokens, other = (zoo.tokens(model, batch=2, seed=seed) for seed in (0, 3))
    patch = cache_of(model, other)[0][name][:, :, 1]

    def set_head(z, hook):
        z = z.clone()
        z[:, :, 1] = patch
        return z

    found = tj.flow(model, tokens, [(name, set_head)], targets=5, granularity="head", tolerance=1e-3)
    edited = [found.labels[i] for i in range(len(found.labels)) if bool((found.edit[i].abs() > 1e-9).any())]
    assert edited == ["L0H1_out"] and torch.allclose(found.edit[0], found.effect, rtol=2e-3)


@pytest.mark.parametrize("granularity", ["sublayer", "head"])
@pytest.mark.parametrize("spec", models("gpt2", "llama"), ids=str)
def test_low_precision_is_near_the_same_weights_in_float64(spec, granularity):
    options = {"targets": 5, "nodes": 4, "tolerance": 100.0, "granularity": granularity}
    exact_model = zoo.fresh(spec, torch.bfloat16).to(torch.float64)
    tokens = zoo.tokens(exact_model, batch=2)
    exact = tj.flow(exact_model, tokens, tj.ablation_hooks(exact_model, "0_mlp"), **options)
    for dtype, error in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        model = zoo.fresh(spec, torch.bfloat16).to(dtype)
        found = tj.flow(model, tokens, tj.ablation_hooks(model, "0_mlp"), **options)
        assert found.labels == exact.labels
        assert float((found.flow - exact.flow).abs().max()) < error * float(exact.flow.abs().max())


@pytest.mark.parametrize("edges", [False, True])
def test_memory_grows_with_layers_as_two_traces_do(edges):
    def peaks(n_layers):
        config = transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=n_layers, n_head=4)
        hf = transformers.GPT2LMHeadModel(config)
        hf.config.architectures = ["GPT2LMHeadModel"]
        zoo.randomize(hf)
        bridge = TransformerBridge.boot_transformers(
            "random", hf_model=hf.eval(), tokenizer=zoo.tokenizer(), device="cpu"
        )
        network, tokens = tj.ResidualNetwork(bridge), torch.arange(60)[None]
        # The first MLP, so that all stages change; the target is in the last layer.
        hooks = tj.ablation_hooks(network, "0_mlp")
        run = lambda: tj.flow(network, tokens, hooks, targets=5, nodes=2, tolerance=1e9, edges=edges)  # noqa: E731
        run()  # checks that are made once
        return peak_bytes(run), peak_bytes(lambda: [network.trace(tokens), network.trace(tokens)])

    small, large = peaks(2), peaks(8)
    assert large[0] - small[0] < (1.5 if edges else 1.05) * (large[1] - small[1])


@pytest.mark.parametrize("spec", models("gpt2", "llama"), ids=str)
def test_padding_changes_nothing(spec):
    if spec in zoo.NAN_UNDER_LEFT_PADDING:
        pytest.skip("this model gives NaN under left padding in float64")
    model = zoo.build(spec)
    tokens, mask = zoo.padded(model)
    hooks = tj.ablation_hooks(model, "1_mlp")
    options = {"targets": 5, "nodes": 3, "tolerance": 100.0}
    found = tj.flow(model, tokens, hooks, attention_mask=mask, **options)
    for row in range(len(tokens)):
        alone = tj.flow(model, tokens[row : row + 1, mask[row].bool()], hooks, **options)
        assert torch.allclose(found.flow[:, row], alone.flow[:, 0], atol=1e-9)


@pytest.mark.parametrize("spec", models("gpt2", "llama"), ids=str)
def test_edits_of_streams_and_other_prompts_are_where_the_effect_starts(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=1)
    name, push = "blocks.1.hook_resid_pre", torch.linspace(-1, 1, model.cfg.d_model, dtype=torch.float64)

    def steer(stream, hook):
        stream[:, 2:] = stream[:, 2:] + push
        return stream

    for intervention in ([(name, steer)], (name, steer)):
        found = tj.flow(model, tokens, intervention, targets=5, against=9, tolerance=1e-3)
        assert found.labels[0] == f"edit:{name}" and found.measure == "logit difference"
        assert torch.allclose(found.edit[0], found.effect, rtol=2e-3)
        assert not bool((found.edit[1:].abs() > 1e-9).any())
    corrupted = tokens.clone()
    corrupted[0, 3] = 7
    for other in (corrupted, tj.ResidualNetwork(model).trace(corrupted)):
        found = tj.flow(model, tokens, other, measure="kl", tolerance=1e-3)
        with torch.no_grad(), full_precision():
            p, q = (model(x)[0, -1].log_softmax(-1) for x in (tokens, corrupted))
        assert torch.allclose(found.effect[0, 0, 0], (p.exp() * (p - q)).sum()) and found.unit == "nats"
        assert found.labels[0] == "embed" and torch.allclose(found.edit[0], found.effect, rtol=2e-3)


@pytest.mark.parametrize("spec", models("gpt2", "llama"), ids=str)
@pytest.mark.parametrize("granularity", ["sublayer", "head"])
def test_the_check_is_path_patching_by_hand(spec, granularity):
    model, token = zoo.build(spec), 5
    tokens = zoo.tokens(model, batch=1)
    hooks = tj.ablation_hooks(model, "0_mlp")
    found = tj.flow(model, tokens, hooks, targets=token, granularity=granularity, check=2, tolerance=100.0)
    assert len(found.check) >= 2 and "0_mlp_out" not in set(found.check["component"])
    (clean, logits), (other, changed) = cache_of(model, tokens), cache_of(model, tokens, hooks)
    before, after = centered_logit(logits, token), centered_logit(changed, token)
    for _, row in found.check.iterrows():
        label = row["component"]
        layer = label[0] if granularity == "sublayer" or not label.startswith("L") else label[1]
        point = (
            f"blocks.{layer}.attn.hook_z" if label.startswith("L") else f"blocks.{layer}.hook_{label.split('_')[1]}_out"
        )
        part = (slice(None), slice(None), int(label[3])) if label.startswith("L") else slice(None)

        def patch(cache, point=point, part=part):
            def set_part(value, hook):
                value = value.clone()
                value[part] = cache[point][part]
                return value

            return point, set_part

        restored = centered_logit(cache_of(model, tokens, [*hooks, patch(clean)])[1], token)
        moved = centered_logit(cache_of(model, tokens, [patch(other)])[1], token)
        assert row["restored"] == pytest.approx(float(after - restored), abs=1e-9)
        assert row["moved"] == pytest.approx(float(moved - before), abs=1e-9)
        assert row["mediated"] == pytest.approx((row["restored"] + row["moved"]) / 2)
    agreement = found.agreement()
    error = (found.check["flow"] - found.check["mediated"]).abs().sum() / found.check["mediated"].abs().sum()
    assert float(agreement["relative_error"].iloc[0]) == pytest.approx(error)
    ranks = found.check["flow"].rank().corr(found.check["mediated"].rank())
    assert float(agreement["spearman"].iloc[0]) == pytest.approx(ranks)


@pytest.fixture(scope="module")
def tinydocs():
    return tj.load_tinydocs()


def test_open_effects_are_marked_and_not_shown(tinydocs):
    hooks = tj.ablation_hooks(tinydocs, "0_mlp")
    with pytest.warns(UserWarning, match="1 of 1 effects stay open: the error of the nodes is up to .*% of the effect"):
        found = tj.flow(tinydocs, PROMPTS[0], hooks, nodes=1)
    assert "1 OPEN: their flows explain nothing" in repr(found) and not found.to_dataframe()["closed"].any()
    with pytest.raises(ValueError, match=r"Flows explain an effect if their gap is at most 1\.00% of it"):
        found.top()
    closed = tj.flow(tinydocs, PROMPTS[0], hooks)
    assert "OPEN" not in repr(closed) and "not checked by path patching" in repr(closed)
    top = closed.top(3)
    assert len(top) == 3 and top["flow"].abs().is_monotonic_decreasing
    assert top["flow"].abs().iloc[-1] >= closed.flow.abs().sort(dim=0, descending=True).values[3, 0, 0, 0]


def test_the_users_own_hooks_stay(tinydocs):
    doubled = [("blocks.2.hook_mlp_out", lambda write, hook: 2 * write)]
    hooks = tj.ablation_hooks(tinydocs, "0_mlp")
    plain = tj.flow(tinydocs, PROMPTS[0], hooks)
    with tinydocs.hooks(fwd_hooks=doubled):
        before, after = (
            tinydocs(PROMPTS[0])[0, -1].double(),
            tinydocs.run_with_hooks(PROMPTS[0], fwd_hooks=hooks)[0, -1],
        )
        found = tj.flow(tinydocs, PROMPTS[0], hooks)
    answer = int(before.argmax())
    effect = (after.double() - before)[answer] - (after.double() - before).mean()
    assert torch.allclose(found.effect[0, 0, 0], effect, atol=1e-4)
    assert not torch.allclose(found.effect, plain.effect, atol=1e-2)
    assert bool(found.closed.all()) and torch.allclose(found.edit.sum(0), found.effect, rtol=0.01)


def test_results_are_saved_and_averaged(tinydocs, tmp_path):
    found = tj.flow(tinydocs, PROMPTS, tj.ablation_hooks(tinydocs, "0_mlp"), check=2)
    loaded = tj.load(found.save(tmp_path / "flow.safetensors"))
    assert repr(loaded) == repr(found) and loaded.check.equals(found.check)
    assert torch.equal(loaded.flow, found.flow) and loaded.cuts().equals(found.cuts())
    average = found.average(include_sinks=True).set_index("component")
    assert average.loc["2_mlp_out", "flow"] == pytest.approx(float(found.flow[found.labels.index("2_mlp_out")].mean()))
    assert "<table" in found._repr_html_()


@pytest.mark.parametrize(
    ("intervention", "options", "message"),
    [
        ("This", {}, "the same numbers of prompts and tokens"),
        ([], {}, "list of TransformerLens hooks"),
        ([("blocks.0.hook_mlp_out", lambda w, hook: w), 3], {}, "list of TransformerLens hooks"),
        (
            [("blocks.0.hook_mlp_out", lambda w, hook: torch.randn_like(w))],
            {},
            "must do the same in every forward pass",
        ),
        (None, {"against": " the"}, "need targets"),
        (None, {"measure": "kl", "targets": " the"}, "takes neither"),
        (None, {"measure": "loss"}, "measure must be one of"),
        (None, {"targets": [" the", " a"], "against": " the"}, "one token to compare with"),
        (None, {"tolerance": 0}, "share of the effect above 0"),
        (None, {"nodes": 0}, "nodes must be an integer >= 1"),
        (None, {"positions": 99}, "positions must lie in"),
    ],
)
def test_what_cannot_be_explained_is_refused(as_users_run_it, tinydocs, intervention, options, message):
    if intervention is None:
        intervention = tj.ablation_hooks(tinydocs, "0_mlp")
    with pytest.raises(ValueError, match=message):
        tj.flow(tinydocs, PROMPTS[0], intervention, **options)
    assert not any(point.fwd_hooks for point in tinydocs.hook_dict.values())


def test_two_runs_can_be_passed_and_must_be_of_the_clean_trace(tinydocs):
    network = tj.ResidualNetwork(tinydocs, "head")
    clean, hooks = network.trace(PROMPTS[0]), tj.ablation_hooks(tinydocs, "0_mlp")
    runs = two_runs.TwoRuns(network, clean, hooks)
    found, wanted = tj.flow(network, clean, runs), tj.flow(network, clean, hooks)
    assert torch.equal(found.flow, wanted.flow) and found.labels == wanted.labels
    for given in ((network, PROMPTS[0]), (tinydocs, clean)):
        with pytest.raises(ValueError, match="must be of the clean trace and the granularity"):
            tj.flow(*given, runs)


def test_agreement_needs_a_check(tinydocs):
    with pytest.raises(ValueError, match="Pass check=20, say"):
        tj.flow(tinydocs, PROMPTS[0], tj.ablation_hooks(tinydocs, "0_mlp")).agreement()


@pytest.mark.parametrize("spec", models("gpt2", "llama"), ids=str)
def test_stacked_nodes_are_those_one_at_a_time(spec, monkeypatch):
    model = zoo.build(spec)
    tokens, hooks = zoo.tokens(model, batch=2), tj.ablation_hooks(model, "0_attn")
    options = {"targets": [5, 9], "nodes": 5, "tolerance": 100.0, "positions": [2, -1]}
    stacked = tj.flow(model, tokens, hooks, **options)
    calls = []
    monkeypatch.setattr(two_runs, "replayed", lambda *args: calls.append(1) or replayed(*args))
    assert len(tj.flow(model, tokens, hooks, **options).stages) == len(calls) + 1  # five nodes in one call a stage
    for size in (1, 2):
        monkeypatch.setattr(two_runs, "stack_size", lambda trace, size=size: size)
        assert torch.allclose(tj.flow(model, tokens, hooks, **options).flow, stacked.flow, atol=1e-10)

    def refuses(*args):
        raise NotReplayedError

    monkeypatch.setattr(two_runs, "replayed", refuses)
    assert torch.allclose(tj.flow(model, tokens, hooks, **options).flow, stacked.flow, atol=1e-10)


def test_heads_are_checked_under_hooks_that_take_one_length_only(tinydocs):
    length = tinydocs.to_tokens(PROMPTS[0]).shape[1]
    hooks = tj.ablation_hooks(tinydocs, "1_mlp", positions=list(range(1, length)))
    network = tj.ResidualNetwork(tinydocs, "head")
    found = tj.flow(network, PROMPTS[0], hooks, check=2)
    assert found.check["component"].str.startswith("L").any() and float(found.agreement()["spearman"].iloc[0]) > 0.9


def test_only_hooked_blocks_are_edited(tinydocs):
    network = tj.ResidualNetwork(tinydocs)
    found = tj.flow(network, PROMPTS[0], tj.ablation_hooks(network, ["0_mlp", "2_attn"]))
    edited = (found.edit != 0).flatten(1).any(1).tolist()
    assert [label for label, own in zip(found.labels, edited, strict=True) if own] == ["0_mlp_out", "2_attn_out"]
    by_input = tj.flow(network, "This function is", "This module is")
    assert torch.equal(by_input.edit[1:], torch.zeros_like(by_input.edit[1:])) and by_input.labels[0] == "embed"


@pytest.mark.parametrize("name", ["hook_resid_mid", "ln1.hook_in", "ln2.hook_in"])
@pytest.mark.parametrize("spec", [spec for spec in models("gpt2", "qwen2") if spec.world == "bridge"], ids=str)
def test_a_hook_that_edits_the_stream_where_a_sublayer_reads_it_is_told_so(spec, name):
    model, name = zoo.build(spec), f"blocks.0.{name}"
    tokens = zoo.tokens(model, batch=2)

    def in_place(x, hook):
        return x.add_(torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype))

    with pytest.raises(ValueError, match=rf"A hook on .*{name}.* in place.* return a new tensor .* hook_resid_pre"):
        tj.flow(model, tokens, [(name, in_place)], targets=5)
    hooks = [(name, lambda x, hook: in_place(x.clone(), hook))]  # the sublayer alone reads it
    with torch.no_grad(), full_precision():
        effect = centered_logit(model.run_with_hooks(tokens, fwd_hooks=hooks), 5) - centered_logit(model(tokens), 5)
    found = tj.flow(model, tokens, hooks, targets=5)
    assert torch.allclose(found.effect[:, 0, 0], effect, atol=1e-8) and float(effect.abs().min()) > 1e-3
    assert found.labels[0] == ("0_attn_out" if "ln1" in name else "0_mlp_out") and bool(found.closed.all())
    assert torch.allclose(found.edit[0], found.effect, rtol=0.011)


def test_an_intervention_that_reaches_no_prompt_is_said():
    """Positions of hooks are columns of the padded row: the last one of a shorter prompt is padding."""
    model = zoo.build(models("llama")[0])
    hooks = tj.ablation_hooks(model, "0_mlp", positions=[-1])
    with pytest.warns(
        UserWarning, match=r"moves no target of prompts \[1\]: it does nothing there, or acts on padding"
    ):
        found = tj.flow(model, ["w3 w4 w5 w6", "w6 w7"], hooks, tolerance=0.05)
    assert float(found.effect[1].abs().max()) == 0 and float(found.effect[0].abs().min()) > 0
    for factor in (1.0, 1 + torch.finfo(torch.float64).eps):  # two runs may differ in the last bits
        with pytest.warns(UserWarning, match=r"moves no target of prompts \[0\]"):
            tj.flow(model, "w3 w4 w5 w6", [("blocks.0.hook_mlp_out", lambda write, hook, by=factor: write * by)])
