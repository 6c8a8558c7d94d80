"""All paths of a model: exact detached ones and Algorithm 2, against eq. 5, hand-frozen models, composed expansions, counting."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import oracles
import overwritten
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tl_jets import CallableModel, Decoder, Norm, Path, ResidualNetwork, Trace, detached_jacobian, jet_expand
from tl_jets.calculus import full_precision
from tl_jets.core.frozen_network import FrozenNetwork
from tl_jets.core.protocol import frozen_biases
from tl_jets.paths import evaluation
from tl_jets.paths import expansion as exponential_module
from tl_jets.paths.cache import PathCache
from tl_jets.paths.expansion import PathExpansion, exponential_expansion
from tl_jets.paths.graph import PathGraph, Source, count_text

D, V = 6, 11
TOKENS = torch.tensor([[1, 7, 3], [0, 10, 4]])
CORE = zoo.available(zoo.CORE)
FAMILIES = [
    spec
    for spec in zoo.available()
    # Processed weights are frozen in the same way: a family with LayerNorm, one with RMSNorm, one with norms after sublayers.
    if (spec.processing == "raw" or spec.name in ("gpt2", "llama", "gemma2"))
    # HF's Bloom differentiates its activation itself; OPT's MLP is no module, so that no stage can be replayed.
    and (spec.world, spec.name) not in (("bridge", "bloom"), ("bridge", "opt"))
]
RAW = [spec for spec in CORE if spec.processing == "raw"]
# One of each kind: sequential and parallel blocks, LayerNorm and RMSNorm, norms after sublayers.
KINDS = [spec for spec in RAW if spec.name in ("gpt2", "pythia", "llama", "gemma2")]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(*stages: dict[str, Any], norm: Norm | None = None, embeds: int = 1) -> ResidualNetwork:
    """A network of the given gammas with random embeddings and a random decoder."""
    if norm is None:
        norm = Norm("LN", weight=1 + normal(D, seed=1, scale=0.3), bias=normal(D, seed=2, scale=0.3), eps=1e-3)
    decoder = Decoder(norm=norm, W_U=normal(D, V, seed=3), b_U=normal(V, seed=4))
    tables = {name: normal(V, D, seed=5 + i) for i, name in enumerate(("embed", "pos_embed")[:embeds])}
    sources = {name: lambda tokens, table=table: table[tokens] for name, table in tables.items()}
    return ResidualNetwork(CallableModel(sources, stages, decoder))


def detached(net: Any, **options: Any) -> PathExpansion:
    return exponential_expansion(net, linearize="detached", **options)


def tanh_block(seed: int) -> Any:
    W_in, W_out, b = normal(D, 9, seed=seed, scale=0.5), normal(9, D, seed=seed + 50, scale=0.5), normal(D, seed=seed)
    return lambda x: torch.tanh(x @ W_in) @ W_out + b


THREE_STAGES = (
    {"0_attn": tanh_block(20), "0_mlp": tanh_block(21)},
    {"1_mlp": tanh_block(22)},
    {"2_attn": tanh_block(23)},
)


# The graph: counting, listing, filtering -----------------------------------------------------------------------------


def brute_force(
    stages: list[list[str]], start: int, through: list[set[str]], avoiding: set[str], most: int | None
) -> set:
    """Every choice of one step or none a stage, kept if it meets the conditions."""
    found = set()
    for choice in itertools.product(*[[None, *steps] for steps in stages[start:]]):
        steps = tuple(step for step in choice if step is not None)
        met = not avoiding & set(steps) and all(labels & set(steps) for labels in through)
        if met and (most is None or len(steps) <= most):
            found.add(("embed", *steps, "ln_final"))
    return found


@given(st.data())
def test_counts_and_lists_are_those_of_brute_force(data):
    stages = [
        [f"{layer}_{kind}" for kind in data.draw(st.sampled_from([["attn"], ["mlp"], ["attn", "mlp"]]))]
        for layer in range(data.draw(st.integers(1, 4)))
    ]
    every = [step for steps in stages for step in steps]
    labels = st.sets(st.sampled_from(every), min_size=1)
    through = data.draw(st.lists(labels, max_size=2))
    avoiding = data.draw(st.sets(st.sampled_from(every), max_size=2))
    most = data.draw(st.none() | st.integers(0, 3))
    start = data.draw(st.integers(0, len(stages)))
    kept = tuple(tuple(step for step in steps if step not in avoiding) for steps in stages)
    graph = PathGraph(kept, (Source("embed", start),), tuple(frozenset(labels) for labels in through), most)
    wanted = brute_force(stages, start, through, avoiding, most)
    listed = [(path.source, *path.steps) for path in graph]
    assert len(listed) == len(set(listed)) == graph.count
    assert set(listed) == wanted
    assert [len(path) for path in listed] == sorted(len(path) for path in listed)
    assert list(graph.count_by_length) == [
        sum(len(p) == n + 2 for p in wanted) for n in range(len(graph.count_by_length))
    ]
    for path in brute_force(stages, 0, [], set(), None):
        assert (" > ".join(path) in graph) == (path in wanted)
    # Prefixes before every stage that some path completes, and those that take a step of it.
    place = {step: i for i, steps in enumerate(stages) for step in steps}
    for stage, (n, moving) in enumerate(graph.prefixes()):
        before = (
            {tuple(step for step in path[1:-1] if place[step] < stage) for path in wanted} if stage >= start else set()
        )
        assert n == len(before)
        takes = {
            tuple(step for step in path[1:-1] if place[step] < stage)
            for path in wanted
            if stage == len(stages) or any(place[step] == stage for step in path[1:-1])
        }
        assert moving == (len(takes) if stage >= start else 0)


def deep(n_layers: int = 64, per_stage: int = 1) -> ResidualNetwork:
    def refuse(x: Tensor) -> Tensor:
        raise AssertionError("a symbolic expansion must not evaluate anything")

    stages: list[dict[str, Any]] = []
    for layer in range(n_layers):
        stages += (
            [{f"{layer}_attn": refuse}, {f"{layer}_mlp": refuse}] if per_stage == 1 else [{f"{layer}_block": refuse}]
        )
    return network(*stages)


def test_deep_networks_are_counted_and_listed_without_being_made():
    jets = exponential_expansion(deep())
    assert jets.count == 2**128
    assert [str(path) for path in itertools.islice(jets, 3)] == [
        "embed > ln_final",
        "embed > 0_attn > ln_final",
        "embed > 0_mlp > ln_final",
    ]
    assert len(list(itertools.islice(jets, 1000))) == 1000
    assert "embed > 0_attn > 17_mlp > 63_mlp > ln_final" in jets
    assert (
        "embed > 17_mlp > 0_attn > ln_final" not in jets
        and "embed > 0_attn" not in jets
        and "0_attn > ln_final" not in jets
    )
    # With biases: one source a stage, whose paths pass through the later stages, and the decoder's.
    exact = detached(deep())
    assert exact.count == 2**128 + (2**128 - 1) + 1
    assert exact.count_by_length[:2] == (1 + 128 + 1, 128 + 127 * 128 // 2)
    assert detached(deep(), avoiding="attn", sources="embed").count == 2**64
    assert detached(deep(), through=["5_attn", "60_mlp"], sources="embed").count == 2**126
    assert detached(deep(), max_length=2, sources="embed").count == 1 + 128 + 128 * 127 // 2
    assert detached(deep(), through="mlp", avoiding="attn", max_length=1, sources="embed").count == 64
    text = str(exact)
    assert text.startswith("6.80e38 detached paths of callables, 128 stages\n  embed > ln_final\n")
    assert "3.40e38 from embed, 3.40e38 from 129 biases" in repr(exact)
    assert count_text(2**20) == "1,048,576"


def test_paths_are_hashable_and_know_their_length():
    paths = list(detached(network(*THREE_STAGES)))
    assert len(set(paths)) == len(paths)
    assert Path.parse("embed > 0_mlp > 1_mlp > ln_final").length == 2
    assert Path("ln_final_bias").length == Path("embed", ("ln_final[1]",)).length == 0


def test_filters_by_kind_of_transformers():
    spec = zoo.available(["pythia"])[0]
    model = zoo.build(spec)  # three parallel blocks of four heads: stages of two writes, or of five
    sublayer, head = ResidualNetwork(model), ResidualNetwork(model, "head")
    assert exponential_expansion(sublayer).count == 3**3
    assert exponential_expansion(head).count == (1 + 4 + 1 + 1) ** 3  # the attention bias is a write
    assert detached(head, sources="embed").count == (1 + 4 + 1) ** 3  # the attention bias is a source
    assert (
        detached(head, sources="embed", avoiding="head").count == detached(head, sources="embed", avoiding="attn").count
    )
    assert detached(head, sources="embed", through="1_attn").count == 4 * 6**2
    assert detached(head, avoiding="bias").count == detached(head, sources="embed").count
    assert exponential_expansion(sublayer, avoiding="attn").count == 2**3
    assert "1_attn_bias > 2_mlp > ln_final" in detached(head)
    assert "ln_final_bias" in detached(head) and "ln_final_bias > ln_final" not in detached(head)


# Detached paths: exact ---------------------------------------------------------------------------------------------------


def products(maps: dict[int, tuple[str, Tensor, Tensor]], value: Tensor, start: int, label: str) -> dict[str, Tensor]:
    """Eq. 5: every product of matrices on the way, from one source."""
    found = {}
    for choice in itertools.product([False, True], repeat=len(maps) - start):
        taken = [maps[start + i] for i, take in enumerate(choice) if take]
        term = value
        for _, A, _ in taken:
            term = term @ A
        found[" > ".join([label, *(step for step, _, _ in taken), "ln_final"])] = term
    return found


@pytest.mark.parametrize("n_stages", [2, 3, 4])
def test_linear_residual_networks_are_eq_5_path_by_path(n_stages):
    maps = {i: (f"{i}_block", normal(D, D, seed=i, scale=0.6), normal(D, seed=30 + i)) for i in range(n_stages)}
    stages = [{label: lambda x, A=A, b=b: x @ A + b} for label, A, b in maps.values()]
    net = network(*stages, norm=Norm("none"), embeds=2)
    trace = net.trace(TOKENS)
    paths = detached(net)(trace)
    wanted = {}
    for source in ("embed", "pos_embed"):
        wanted |= products(maps, trace[source], 0, source)
    for i, (label, _, b) in maps.items():
        wanted |= products(maps, b.expand_as(trace["embed"]), i + 1, f"{label}_bias")
    assert set(paths) == set(wanted) | {"ln_final_bias"}
    assert len(paths) == paths.expansion.count == 2 * 2**n_stages + (2**n_stages - 1) + 1
    for path, term in wanted.items():
        assert oracles.relative_error(paths[path], term) < 1e-13, path
        assert oracles.relative_error(paths.logits(path), term @ net.decoder.W_U) < 1e-13
    assert oracles.relative_error(paths.logits("ln_final_bias"), net.decoder.b_U.expand(2, 3, V)) < 1e-13


def by_hand(seed: int) -> tuple[Any, Any]:
    """A gated MLP behind an RMSNorm, and the same as a matrix a position with scale and gate held at a point."""
    w = 1 + normal(D, seed=seed, scale=0.3)
    gate, up, down, b = (
        normal(D, 9, seed=seed + 1),
        normal(D, 9, seed=seed + 2),
        normal(9, D, seed=seed + 3),
        normal(D, seed=seed),
    )

    def scale(x: Tensor) -> Tensor:
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)

    def write(x: Tensor) -> Tensor:
        normed = x * scale(x) * w
        return (torch.nn.functional.silu(normed @ gate) * (normed @ up)) @ down + b

    def frozen_at(h: Tensor) -> Any:
        g = (h * scale(h) * w) @ gate
        factor, s = g / (1 + torch.exp(-g)), scale(h)
        return lambda x: (((x * s * w) @ up) * factor) @ down, b

    return write, frozen_at


def test_paths_of_a_gated_network_are_those_of_maps_frozen_by_hand():
    blocks = [by_hand(seed) for seed in (40, 50, 60)]
    weight, bias = 1 + normal(D, seed=1, scale=0.3), normal(D, seed=2)
    net = network(*({f"{i}_mlp": write} for i, (write, _) in enumerate(blocks)), norm=Norm("RMS", weight, bias, 1e-3))
    trace = net.trace(TOKENS)
    frozen = [frozen_at(trace[f"{i}_pre"]) for i, (_, frozen_at) in enumerate(blocks)]
    h = trace["final_post"]
    paths = detached(net)(trace)

    def wanted(value: Tensor, steps: tuple[int, ...]) -> Tensor:
        for step in steps:
            value = frozen[step][0](value)
        return value * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-3) * weight

    for n in range(4):
        for steps in itertools.combinations(range(3), n):
            label = " > ".join(["embed", *(f"{i}_mlp" for i in steps), "ln_final"])
            assert oracles.relative_error(paths[label], wanted(trace["embed"], steps)) < 1e-12, label
    assert (
        oracles.relative_error(paths["0_mlp_bias > 2_mlp > ln_final"], wanted(frozen[0][1].expand_as(h), (2,))) < 1e-12
    )
    assert oracles.relative_error(paths["ln_final_bias"], bias.expand_as(h)) < 1e-14
    total = sum(paths.logits(path) for path in paths)
    assert oracles.relative_error(total, trace.logits) < 1e-12


CASES = [(spec, "sublayer") for spec in FAMILIES]
CASES += [(spec, "head") for spec in RAW] + [(spec, "block") for spec in KINDS]


@pytest.mark.parametrize(("spec", "granularity"), CASES, ids=str)
def test_paths_sum_to_the_model_in_every_family(spec, granularity):
    """The model's own logits are the oracle: no remainder is used."""
    net = ResidualNetwork(zoo.build(spec), granularity)
    trace = net.trace(zoo.tokens(net.view.model, batch=2, pos=5))
    paths = detached(net, max_paths=10**5)(trace)
    assert len(paths) == paths.expansion.count == len(set(paths.expansion))
    total = paths.stack().sum(0) @ net.decoder.W_U + paths.weights.sum(0)[..., None] * net.decoder.b_U
    total = net.decoder.logit_scale * total
    total = total if net.decoder.transform is None else net.decoder.transform(total)
    with torch.no_grad(), full_precision():
        own = net.view.model(trace.tokens)
    assert oracles.relative_error(total, own) < 1e-10
    assert paths.check().sum_error < 1e-10
    assert max(paths.remainders.values()) < 1e-12


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_single_paths_are_products_of_materialized_jacobians(spec):
    net = ResidualNetwork(zoo.build(spec))
    trace = net.trace(zoo.tokens(net.view.model, batch=2, pos=4))
    paths = detached(net)(trace)

    def matrix(wrt: str, output: str) -> Tensor:
        return detached_jacobian(net, trace, wrt=wrt, output=output, positions=None, ordinary=False).materialize()

    last = net.stages[-1]
    step, first = last.steps[-1], net.stages[0].steps[0]
    value = trace["embed"]
    for stage, taken in ((net.stages[0], first), (last, step)):
        value = torch.einsum("bovtd,btd->bov", matrix(stage.stream, taken.write), value)
    final = matrix("final_post", "ln_final")
    wanted = torch.einsum("bovtd,btd->bov", final, value)
    assert oracles.relative_error(paths[f"embed > {first.label} > {step.label} > ln_final"], wanted) < 1e-11
    direct = torch.einsum("bovtd,btd->bov", final, trace["embed"])
    assert oracles.relative_error(paths["embed > ln_final"], direct) < 1e-11


OVERWRITTEN = [spec for spec in overwritten.SPECS if spec.name in ("gpt2", "llama", "pythia", "olmo2")]


@pytest.mark.parametrize("spec", OVERWRITTEN, ids=str)
def test_sums_of_paths_are_those_of_models_with_constant_factors(spec):
    """Paths through a head, or through none: by forward passes of the model itself with overwritten factors and writes."""
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=2, pos=5)
    hooks = overwritten.overwriting(model, tokens, spec.name in overwritten.GATED)
    net = ResidualNetwork(model, "head")
    trace = net.trace(tokens)
    last = f"blocks.{len(model.blocks) - 1}.hook_resid_post"

    def final(scale: float, extra: list) -> Tensor:
        box: list[Tensor] = []
        first = ("blocks.0.hook_resid_pre", lambda own, hook: scale * own)
        with (
            torch.no_grad(),
            full_precision(),
            model.hooks([first, *hooks, *extra, (last, lambda x, hook: box.append(x))]),
        ):
            model(tokens)
        return box[-1]

    def linear(extra: list) -> Tensor:
        return final(1.0, extra) - final(0.0, extra)

    def cut(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, :, 1] = 0.25
        return z

    norm = net.decoder.norm
    h = norm.center(trace["final_post"])
    scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + norm.eps)

    def decoded(values: Tensor) -> Tensor:
        return norm.scale(norm.center(values)) * scale

    starts = list(net.sources)
    through = detached(net, through="L1H1", sources=starts, max_paths=10**5)(trace)
    wanted = decoded(linear([]) - linear([("blocks.1.attn.hook_z", cut)]))
    assert oracles.relative_error(sum(through.values()), wanted) < 1e-11
    constant = [
        (f"blocks.{layer}.hook_mlp_out", lambda own, hook: torch.ones_like(own)) for layer in range(len(model.blocks))
    ]
    without = detached(net, avoiding="mlp", sources=starts, max_paths=10**5)(trace)
    assert oracles.relative_error(sum(without.values()), decoded(linear(constant))) < 1e-11
    assert float(sum(without.values()).norm() / sum(through.values()).norm()) > 0.1


@pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")
@pytest.mark.parametrize("world", ["bridge", *(["hooked"] if zoo.HookedTransformer is not None else [])])
def test_all_1024_paths_of_stories260k_sum_to_the_model(world):
    model = zoo.load_stories(world, torch.float64)
    net = ResidualNetwork(model)
    prompt = "Once upon a time, there was a little girl named Lily. She loved to play"
    paths = detached(net)(prompt)
    assert len(paths) == 1024
    with torch.no_grad(), full_precision():
        own = model(prompt)
    total = paths.stack().sum(0) @ net.decoder.W_U + paths.weights.sum(0)[..., None] * net.decoder.b_U
    assert oracles.relative_error(total, own) < 1e-10
    assert float((total - own).abs().max()) < 1e-10


def test_heads_of_a_path_add_up_to_its_sublayer():
    for spec in zoo.available(["gpt2", "gemma2"]):
        if spec.processing != "raw":
            continue
        model = zoo.build(spec)
        tokens = zoo.tokens(model, batch=2, pos=5)
        head, sublayer = ResidualNetwork(model, "head"), ResidualNetwork(model)
        whole = detached(sublayer)(tokens)
        heads = range(model.cfg.n_heads)
        parts = detached(head, through="1_mlp", avoiding=["1_attn", "0_mlp"])(tokens)
        found = sum(parts[f"embed > L0H{h} > 1_mlp > ln_final"] for h in heads)
        assert oracles.relative_error(found, whole["embed > 0_attn > 1_mlp > ln_final"]) < 1e-11
        if "0_attn_bias > 1_mlp > ln_final" in whole:
            assert (
                oracles.relative_error(parts["0_attn_bias > 1_mlp > ln_final"], whole["0_attn_bias > 1_mlp > ln_final"])
                < 1e-11
            )


@pytest.mark.parametrize("spec", [s for s in zoo.available(["gpt2", "pythia", "llama"]) if s in FAMILIES], ids=str)
def test_left_padding_and_batches_change_no_path(spec):
    if spec in zoo.NAN_UNDER_LEFT_PADDING:
        pytest.skip("the model itself gives NaN there")
    model = zoo.build(spec)
    net = ResidualNetwork(model)
    tokens, mask = zoo.padded(model, (7, 4))
    paths = detached(net, max_length=2)(tokens, attention_mask=mask)
    assert paths.relative_remainder < 0.9
    for row, length in enumerate((7, 4)):
        alone = detached(net, max_length=2)(tokens[row : row + 1, -length:])
        for path in alone:
            assert oracles.relative_error(paths[path][row : row + 1, -length:], alone[path]) < 1e-10, path
    assert paths.valid.tolist() == mask.bool().tolist()
    last = detached(net, max_length=2)(tokens, attention_mask=mask, positions=-1)
    assert last.truth.shape == (2, 1, model.cfg.d_model) and last.columns == [6]
    for path in paths:
        assert oracles.relative_error(last[path][:, 0], paths[path][:, -1]) < 1e-12


@pytest.mark.parametrize("spec", [s for s in KINDS if s.name in ("gpt2", "llama")], ids=str)
def test_edits_and_hooks_of_the_user_are_in_the_paths(spec):
    model = zoo.build(spec)
    net = ResidualNetwork(model)
    tokens = zoo.tokens(model, batch=2, pos=5)
    direction = torch.linspace(-1, 1, model.cfg.d_model, dtype=torch.float64)
    plain = detached(net)(tokens)

    def ablate(z: Tensor, hook: Any) -> Tensor:
        assert z.shape[:2] == tokens.shape, "the user's hook must see the user's input only"
        z = z.clone()
        z[:, :, 0] = 0
        return z

    hooks = [("blocks.1.hook_resid_pre", lambda x, hook: x + direction), ("blocks.0.attn.hook_z", ablate)]
    expansion = detached(net)
    with model.hooks(hooks):
        trace = net.trace(tokens)
        paths = expansion(trace)
        jets = exponential_expansion(net, order=1, max_length=1)(trace)
    edit = "edit:blocks.1.hook_resid_pre"
    assert f"{edit} > 1_mlp > ln_final" in paths and f"{edit} > 1_mlp > ln_final" in jets
    assert f"{edit} > 0_mlp > ln_final" not in paths
    total = sum(paths.logits(path) for path in paths)
    assert oracles.relative_error(total, trace.logits) < 1e-10
    assert oracles.relative_error(paths["embed > 0_attn > ln_final"], plain["embed > 0_attn > ln_final"]) > 1e-3
    norm, h = net.decoder.norm, trace["final_post"]
    scale = torch.rsqrt(norm.center(h).pow(2).mean(-1, keepdim=True) + norm.eps)
    assert oracles.relative_error(paths[f"{edit} > ln_final"], norm.scale(norm.center(direction)) * scale) < 1e-12
    # Without the hooks the trace is of another model, frozen already or not.
    for other in (trace, Trace(net, trace.recording)):
        with pytest.raises(ValueError, match="under the hooks under which it was made"):
            detached(net)(other)


def test_what_cannot_be_frozen_is_refused_by_name():
    bloom = zoo.build(zoo.ModelSpec("bloom", "bridge", "raw"))
    with pytest.raises(NotImplementedError, match=r"affine.*mlp.*BloomForCausalLM.*off by"):
        detached(bloom)(zoo.tokens(bloom))
    net = network({"0_block": lambda x: x * x.flip(-1)})
    with pytest.raises(NotImplementedError, match=r"affine.*0_block of callables"):
        detached(net)(TOKENS)
    for spec in zoo.available(["gpt2"])[:1]:
        model = zoo.build(spec)
        head = ResidualNetwork(model, "head")
        with model.hooks([("blocks.0.hook_attn_out", lambda x, hook: 2 * x)]):
            with pytest.raises(NotImplementedError, match="Use granularity='sublayer'"):
                detached(head)(zoo.tokens(model))
            assert detached(ResidualNetwork(model))(zoo.tokens(model)).check().passed


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_float32(spec):
    model = zoo.build(spec, torch.float32)
    paths = detached(ResidualNetwork(model))(zoo.tokens(model))
    assert paths.truth.dtype is torch.float32
    assert paths.relative_remainder < 1e-5 and paths.check().sum_error < 1e-4


def test_every_prefix_is_carried_once_and_chunks_change_nothing(monkeypatch):
    spec = zoo.available(["llama"])[0]
    net = ResidualNetwork(zoo.build(spec))
    trace = net.trace(zoo.tokens(net.view.model, batch=2, pos=4))
    whole = detached(net, sources="embed")(trace)
    sizes: list[int] = []
    plain = evaluation.through_stage

    def counted(graph: Any, stages: Any, prefixes: Any, values: Tensor, stage: int) -> Any:
        sizes.append(len(prefixes))
        return plain(graph, stages, prefixes, values, stage)

    monkeypatch.setattr(evaluation, "through_stage", counted)
    monkeypatch.setattr(exponential_module, "chunk_size", lambda like: 3)
    parts = detached(net, sources="embed")(trace)
    assert sum(sizes) == 2 ** len(net.stages) - 1 and max(sizes) == 3
    assert list(parts) == list(whole)
    for path in whole:
        assert oracles.relative_error(parts[path], whole[path]) < 1e-13
    assert parts.remainders == pytest.approx(whole.remainders, abs=1e-13)


def test_filters_change_no_path_and_the_rest_is_the_remainder():
    spec = zoo.available(["gpt2"])[0]
    net = ResidualNetwork(zoo.build(spec))
    trace = net.trace(zoo.tokens(net.view.model, batch=2, pos=5))
    whole = detached(net)(trace)
    some = detached(net, through=["0_mlp", "attn"], max_length=3)(trace)
    labels = [p for p in whole if "0_mlp > " in p and "_attn >" in p and Path.parse(p).length <= 3]
    assert set(some) == set(labels) and 0 < len(labels) < len(whole)
    for path in some:
        assert oracles.relative_error(some[path], whole[path]) < 1e-12
    rest = sum(whole.logits(path) for path in whole if path not in some)
    assert oracles.relative_error(some.remainder_logits(), rest) < 1e-10
    assert detached(net, avoiding="attn")(trace).keys() == {p for p in whole if "_attn >" not in p}


# The largest paths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", ["length", "effect"])
@pytest.mark.parametrize("positions", [-1, None])
def test_top_is_the_largest_by_logits(rank, positions):
    spec = zoo.available(["pythia"])[0]
    net = ResidualNetwork(zoo.build(spec))
    trace = net.trace(zoo.tokens(net.view.model, batch=2, pos=5))
    targets = [3, 8]
    whole = detached(net)(trace, positions=positions)
    sizes = {}
    for path in whole:
        logits = whole.logits(path)
        logits = logits - logits.mean(-1, keepdim=True)
        sizes[path] = float(logits.norm() if rank == "length" else logits[..., targets].abs().sum())
    wanted = sorted(sizes, key=lambda path: -sizes[path])
    ranked: dict[str, Any] = {"top": 7, "rank": rank, "targets": targets if rank == "effect" else None}
    top = detached(net, **ranked)(trace, positions=positions)
    assert list(top) == wanted[:7] and top.is_exhaustive and len(top) == 7
    rest = sum(whole.logits(path) for path in wanted[7:])
    assert oracles.relative_error(top.remainder_logits(), rest) < 1e-10
    beam = detached(net, max_paths=30, **ranked)(trace, positions=positions)
    assert not beam.is_exhaustive
    assert len(set(beam) & set(wanted[:7])) >= 6
    for path in beam:
        assert oracles.relative_error(beam[path], whole[path]) < 1e-12
    found = [sizes[path] for path in beam]
    assert found == sorted(found, reverse=True)
    assert top.lost is None and beam.lost is not None and f"dropped {beam.lost[0]}" in repr(beam)
    if rank == "effect":
        prefix, score = beam.lost
        stage_of = {step.label: s for s, stage in enumerate(net.stages) for step in stage.steps}
        begun = [path for path in whole if path.startswith(f"{prefix} > ")]
        onward = {path: stage_of.get(path[len(prefix) + 3 :].split(" > ")[0], len(net.stages)) for path in begun}
        sums = [sum(whole.logits(path) for path in begun if onward[path] >= s) for s in range(len(net.stages) + 1)]
        sums = [float((x - x.mean(-1, keepdim=True))[..., targets].abs().sum()) for x in sums]
        assert any(score == pytest.approx(x) for x in (*sums, sizes[f"{prefix} > ln_final"]))


def test_top_of_jets_is_the_largest():
    net = network(*THREE_STAGES)
    whole = exponential_expansion(net, order=1)(TOKENS)
    table = whole.statistics().largest(4, "norm")
    top = exponential_expansion(net, order=1, top=4)(TOKENS, positions=[0])
    one = exponential_expansion(net, order=1)(TOKENS, positions=[0])
    sizes = {p: float((one.logits(p) - one.logits(p).mean(-1, keepdim=True)).norm()) for p in one}
    assert list(top) == sorted(sizes, key=lambda path: -sizes[path])[:4]
    assert len(table) == 4


def test_a_beam_goes_where_no_enumeration_can():
    blocks = {i: tanh_block(100 + i) for i in range(40)}
    net = network(*({f"{i}_block": lambda x, f=f: 0.3 * f(x)} for i, f in blocks.items()))
    expansion = detached(net, top=12, max_paths=800, rank="effect")
    assert expansion.count == 2**41
    paths = expansion(TOKENS, positions=-1)
    assert len(paths) == 12 and not paths.is_exhaustive
    assert all(path in expansion for path in paths)
    filtered = detached(net, top=5, through=["3_block", "7_block"], max_length=4, max_paths=400)(TOKENS, positions=-1)
    assert len(filtered) == 5 and all("3_block" in p and "7_block" in p for p in filtered)


# Algorithm 2 -------------------------------------------------------------------------------------------------------------


def composed(
    net: ResidualNetwork, trace: Any, order: int, scale: Any
) -> tuple[dict[str, Tensor], dict[str, float], Any]:
    """Algorithm 2 by composing Algorithm 1 stage after stage."""
    centers: Any = list(net.sources)
    remainders = {}
    for stage in net.stages:
        expansion = jet_expand(net, stage.stream, centers=centers, order=order, center_scale=scale)
        remainders[net.next_stream(stage)] = expansion(trace).relative_remainder
        centers = expansion
    last = jet_expand(net, "ln_final", centers=centers, order=order, center_scale=scale)(trace)
    return last.terms, remainders | {"ln_final": last.relative_remainder}, last


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("scale", ["none", "match"])
def test_jets_are_algorithm_1_composed(order, scale):
    net = network(*THREE_STAGES, embeds=2)
    trace = net.trace(TOKENS)
    wanted, remainders, last = composed(net, trace, order, scale)
    paths = exponential_expansion(net, order, center_scale=scale)(trace)
    assert set(paths) == set(wanted) and len(paths) == 2 * 3 * 2 * 2
    for path, term in wanted.items():
        assert oracles.relative_error(paths[path], term) < 1e-13, path
        assert oracles.relative_error(paths.logits(path), last.logits(path)) < 1e-13
    assert paths.remainders == pytest.approx(remainders, rel=1e-9, abs=1e-14)
    assert oracles.relative_error(paths.remainder, last.remainder) < 1e-12
    assert oracles.relative_error(paths.logits(), last.logits()) < 1e-12


@pytest.mark.parametrize("granularity", ["block", "sublayer", "head"])
@pytest.mark.parametrize("spec", zoo.available(["gpt2", "pythia", "llama"]), ids=str)
def test_jets_of_transformers_are_algorithm_1_composed(spec, granularity):
    if spec.processing != "raw" or (granularity == "head" and spec.name != "gpt2"):
        pytest.skip("one of each is enough")
    net = ResidualNetwork(zoo.build(spec), granularity)
    options = {"max_length": 1} if granularity == "head" else {}
    trace = net.trace(zoo.tokens(net.view.model, batch=2, pos=4))
    paths = exponential_expansion(net, 1, **options)(trace)
    if granularity == "head":
        first = jet_expand(net, net.stages[0].stream, centers=list(net.sources), order=1)
        second = jet_expand(net, net.stages[1].stream, centers=first, order=1)
        term = second(trace)["embed > 0_mlp"]
        weight = 1 / exponential_expansion(net, 1).count
        wanted = weight * oracles.nested_jvp_coefficients(net.decoder.norm, term, trace["final_post"] - term, 1).sum(0)
        assert oracles.relative_error(paths["embed > 0_mlp > ln_final"], wanted) < 1e-10
        return
    wanted, remainders, _ = composed(net, trace, 1, "none")
    for path, term in wanted.items():
        assert oracles.relative_error(paths[path], term) < 1e-12, path
    assert paths.remainders == pytest.approx(remainders, rel=1e-9)


def test_at_order_0_a_path_is_the_nested_gammas():
    net = network(*THREE_STAGES)
    trace = net.trace(TOKENS)
    paths = exponential_expansion(net, 0)(trace)
    first, second = THREE_STAGES[0]["0_mlp"], THREE_STAGES[2]["2_attn"]
    # Weights 1, 1/3, 1/6 and 1/12: a term is divided at every stage, passed through or not.
    inner = first(trace["embed"]) / 3
    outer = second(inner) / 6
    assert oracles.relative_error(paths["embed > 0_mlp > 2_attn > ln_final"], net.decoder.norm(outer) / 12) < 1e-12


def test_linear_networks_leave_no_remainder_at_order_1():
    """Sums are exact there though single paths are not eq. 5 (each carries the whole stream)."""
    matrices = [normal(D, D, seed=i) for i in range(3)]
    stages = [{f"{i}_block": lambda x, A=A: x @ A} for i, A in enumerate(matrices)]
    net = network(*stages, norm=Norm("none"))
    paths = exponential_expansion(net, 1)(TOKENS)
    assert max(paths.remainders.values()) < 1e-13
    assert exponential_expansion(net, 0)(TOKENS).remainders["ln_final"] > 0.3
    exact = detached(net)(TOKENS)
    assert oracles.relative_error(paths["embed > 2_block > ln_final"], exact["embed > 2_block > ln_final"]) > 0.1


def test_filters_keep_the_weights_and_renormalizing_spreads_them():
    net = network(*THREE_STAGES)
    trace = net.trace(TOKENS)
    for order in (0, 1):
        whole = exponential_expansion(net, order)(trace)
        some = exponential_expansion(net, order, avoiding="attn", max_length=1)(trace)
        assert list(some) == ["embed > ln_final", "embed > 0_mlp > ln_final", "embed > 1_mlp > ln_final"]
        for path in some:
            assert oracles.relative_error(some[path], whole[path]) < 1e-13
        assert float(some.weights[0, 0, 0]) == pytest.approx(1 / 12)
    spread = exponential_expansion(net, 1, avoiding="attn", max_length=1, renormalize=True)(trace)
    assert float(spread.weights[:, 0, 0].sum()) == pytest.approx(1)
    # Only the embedding is expanded at the second stage: it has all of the weight.
    write, x, h = THREE_STAGES[1]["1_mlp"], trace["embed"], trace["1_pre"]
    inner = oracles.nested_jvp_coefficients(write, x, h - x, 1).sum(0)
    wanted = oracles.nested_jvp_coefficients(net.decoder.norm, inner, trace["final_post"] - inner, 1).sum(0) / 3
    assert oracles.relative_error(spread["embed > 1_mlp > ln_final"], wanted) < 1e-12
    zeroth = exponential_expansion(net, 0, avoiding="attn", max_length=1, renormalize=True)(trace)
    # At order 0 every kept term is divided: by 1 at the first stage, 2 at the second, 3 at the third and at the decoder.
    assert oracles.relative_error(zeroth["embed > 1_mlp > ln_final"], net.decoder.norm(write(x) / 2 / 3) / 3) < 1e-12


def test_degrees_of_a_path_sum_to_it():
    net = network(*THREE_STAGES)
    trace = net.trace(TOKENS)
    expansion = exponential_expansion(net, 2, split_degrees=True)
    whole, split = exponential_expansion(net, 2)(trace), expansion(trace)
    assert expansion.count == 3 * len(whole) == len(split) == len(list(expansion))
    assert "embed > 1_mlp > ln_final[2]" in expansion and "embed > 1_mlp > ln_final" not in expansion
    assert "embed > 1_mlp > ln_final[3]" not in expansion
    for path in whole:
        degrees = [split[f"{path}[{degree}]"] for degree in range(3)]
        assert oracles.relative_error(sum(degrees), whole[path]) < 1e-12
        logits = sum(split.logits(f"{path}[{degree}]") for degree in range(3))
        assert oracles.relative_error(logits, whole.logits(path)) < 1e-12
    x = jet_expand(net, "0_mlp", centers=["embed"], order=2)(trace)["embed > 0_mlp"]
    wanted = oracles.nested_jvp_coefficients(net.decoder.norm, x, trace["final_post"] - x, 2) / 12
    for degree in range(3):
        assert oracles.relative_error(split[f"embed > 0_mlp > ln_final[{degree}]"], wanted[degree]) < 1e-12


# The cache ---------------------------------------------------------------------------------------------------------------


def cached() -> PathCache:
    return detached(network(*THREE_STAGES))(TOKENS)


def test_the_result_is_a_cache_by_path():
    paths = cached()
    assert paths[Path("embed", ("1_mlp", "ln_final"))] is paths["embed > 1_mlp > ln_final"]
    assert paths.labels == [str(path) for path in paths.expansion]
    assert paths.stack().shape == (len(paths), 2, 3, D) and paths.weights.shape == (len(paths), 2, 3)
    assert oracles.relative_error(paths.logits(), sum(paths.logits(p) for p in paths)) < 1e-12
    top = paths.top_tokens(2).indices
    assert torch.equal(top[3], paths.logits(paths.labels[3]).topk(2).indices)
    assert "detached paths of [2, 3, 6]" in repr(paths)
    with pytest.raises(KeyError, match="No term 'nothing'"):
        paths["nothing"]


def test_the_cache_moves_and_slices():
    paths = cached()
    single = paths.to(torch.float32)
    assert isinstance(single, PathCache) and single.truth.dtype is torch.float32 and single.valid.dtype is torch.bool
    first = paths.apply_slice_to_batch_dim(slice(0, 1)).remove_batch_dim()
    assert first.truth.shape == (3, D) and first.relative_remainder < 1e-13
    last = paths.apply_slice_to_pos_dim(slice(1, 3))
    assert oracles.relative_error(last.logits("embed > ln_final"), paths.logits("embed > ln_final")[:, 1:]) < 1e-13
    for part in (first, last, paths.apply_slice_to_pos_dim([2, 0]), paths.apply_slice_to_batch_dim([1, 0, 1])):
        assert part.check().passed and part.check().sum_error < 1e-13
    with pytest.raises(ValueError, match=r"Statistics need a cache .* has shape \[3, 6\]"):
        first.statistics()


@pytest.mark.parametrize("spec", zoo.available(["llama"])[:1], ids=str)
def test_what_was_left_over_is_that_of_the_slice(spec):
    paths = exponential_expansion(ResidualNetwork(zoo.build(spec)), 1)(["w5 w17 w8 w30", "w11 w6"])
    rest, truth, real = paths.remainder, paths.truth, paths.valid
    streams = {stream: value for stream, value in paths.remainders.items() if stream != "ln_final"}
    assert streams and paths.remainders["ln_final"] == pytest.approx(float(rest[real].norm() / truth[real].norm()))
    at = paths.apply_slice_to_pos_dim([2, 1])
    share = rest[:, 1:3][real[:, 1:3]].norm() / truth[:, 1:3][real[:, 1:3]].norm()
    assert at.remainders == streams | {"ln_final": pytest.approx(float(share))} and at.positions == [2, 1]
    # The sums of prefixes are of both prompts.
    second = paths.apply_slice_to_batch_dim([1])
    share = rest[1][real[1]].norm() / truth[1][real[1]].norm()
    assert second.remainders == {"ln_final": pytest.approx(float(share))}
    assert second.relative_remainder == pytest.approx(float(share))


def test_a_trace_remembers_and_a_prompt_keeps_no_graph():
    net = network(*THREE_STAGES)
    trace, expansion = net.trace(TOKENS), detached(net)
    assert expansion(trace) is expansion(trace)
    assert expansion(trace, positions=-1).truth.shape == (2, 1, D)
    assert not expansion(TOKENS).trace.memo
    with torch.inference_mode():
        assert oracles.relative_error(expansion(TOKENS).logits(), expansion(trace).logits()) < 1e-13


def test_check_notices_a_model_that_is_not_the_paths():
    paths = cached()
    assert paths.check().passed and paths.check().sum_error < 1e-13
    for label in paths.labels[::5]:
        wrong = replace(paths, terms={**paths.terms, label: paths[label] + 0.01 * normal(D, seed=1)})
        assert not wrong.check().passed
    paths.trace.logits = paths.trace.logits + normal(V, seed=1)
    assert not paths.check().passed
    with pytest.raises(ValueError, match="Look at `remainders`"):
        exponential_expansion(network(*THREE_STAGES))(TOKENS).check()
    with pytest.raises(ValueError, match="Look at `remainders`"):
        detached(network(*THREE_STAGES), max_length=1)(TOKENS).check()


# Errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_run_it")
def test_errors_say_what_must_hold():
    net = network(*THREE_STAGES)

    def expect(error: type[Exception], words: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(error, match=words):
            exponential_expansion(net, *arguments, **options)(TOKENS)

    expect(ValueError, "order must be an integer >= 0; got -1", -1)
    expect(TypeError, "order must be an integer >= 0; got 1.5", 1.5)
    expect(ValueError, "linearize must be one of", linearize="both")
    expect(ValueError, "rank must be one of", rank="size")
    expect(ValueError, "center_scale must be one of", center_scale="big")
    expect(ValueError, "top must be an integer >= 1; got 0", top=0)
    expect(TypeError, "max_paths must be an integer >= 1; got '3'", max_paths="3")
    expect(ValueError, "max_length must be None or an integer >= 0; got -1", max_length=-1)
    expect(ValueError, "A filter must name steps, sources, or kinds of them; got '9_mlp'", through="9_mlp")
    expect(ValueError, "A filter must name steps, sources, or kinds of them; got 'head'", avoiding=["head"])
    expect(ValueError, "Paths start at sources: .* got '0_mlp'. Here the sources are 'embed'", sources="0_mlp")
    expect(ValueError, "Filters must leave a path; through=.'0_attn', '0_mlp'", through=["0_attn", "0_mlp"])
    expect(ValueError, "are options of jets; detached paths have no weights", linearize="detached", renormalize=True)
    words = r"At most max_paths = 10 paths are evaluated; here are 12 \(by number of writes: 1 of 0, 4 of 1, 5 of 2"
    expect(ValueError, words, max_paths=10)
    expect(ValueError, "Narrow them with max_length=, through=, avoiding=", max_paths=10, top=3)
    with pytest.raises(ValueError, match=r"here are 6\.80e38"):
        detached(deep())(TOKENS)
    with pytest.raises(ValueError, match=r"must have different labels; got .'0_mlp_bias'. more than once"):
        detached(network({"0_mlp": torch.tanh, "0_mlp_bias": torch.tanh}))
    with pytest.raises(ValueError, match="not zero"):
        detached(network({"0_mlp": torch.tanh}), sources="0_mlp_bias")(TOKENS)
    with pytest.raises(ValueError, match="A trace must be of the same model"):
        detached(net)(network(*THREE_STAGES).trace(TOKENS))


@pytest.mark.parametrize("spec", zoo.available(zoo.CORE), ids=str)
def test_constants_that_a_model_does_not_have_are_no_sources(spec):
    """Known from the weights: before evaluation the sources are those of the evaluated, frozen network."""
    model = zoo.build(spec)
    network = ResidualNetwork(model)
    found = exponential_expansion(network, linearize="detached")
    there = FrozenNetwork.of(network.trace(zoo.tokens(model))).sources
    assert {source.label for source in found.graph.sources} == set(there)
    bare = [label for labels in frozen_biases(network.stages) for label, _ in labels if label not in there]
    # Filters may name what is absent: what they keep is the same as without it.
    same = exponential_expansion(network, linearize="detached", avoiding=["bias", *bare])
    assert {source.label for source in same.graph.sources} == set(network.sources)
    if bare:
        with pytest.raises(ValueError, match="Filters must leave a path"):
            exponential_expansion(network, linearize="detached", sources=bare)


def test_a_constant_that_a_hook_adds_is_a_source_all_the_same():
    model = zoo.build(next(spec for spec in zoo.available(["llama"]) if spec.processing == "raw"))
    network = ResidualNetwork(model)
    paths = exponential_expansion(network, linearize="detached")
    assert "0_mlp_bias > ln_final" not in paths
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda value, hook: value + 1.0)]):
        cache = paths(zoo.tokens(model))
        assert "0_mlp_bias > ln_final" in cache.labels and cache.check().sum_error < 1e-9
        assert cache.expansion.is_complete
