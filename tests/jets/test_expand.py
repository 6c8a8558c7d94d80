"""Algorithm 1 against hand-written expansions, convergence orders and invariances; and the cache that holds its terms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
import zoo
from torch import Tensor

from tl_jets import CallableModel, Decoder, JetCache, Norm, Path, ResidualNetwork, Trace, jet_expand
from tl_jets.calculus import full_precision
from tl_jets.jets import checks as checks_module
from tl_jets.jets import expand as expand_module

D, V, BATCH, POS = 6, 11, 2, 3


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(*stages: dict[str, Any], kind: str = "LN", transform: Any = None) -> ResidualNetwork:
    """A network of the given gammas with a random embedding and decoder."""
    decoder = Decoder(
        norm=Norm(kind, weight=1 + normal(D, seed=1, scale=0.3), bias=normal(D, seed=2, scale=0.3), eps=1e-3),
        W_U=normal(D, V, seed=3),
        b_U=normal(V, seed=4),
        transform=transform,
    )
    table = normal(V, D, seed=5)
    return ResidualNetwork(CallableModel(lambda tokens: table[tokens], stages, decoder))


def tanh_block(seed: int) -> Any:
    W_in, W_out, b = normal(D, 9, seed=seed, scale=0.5), normal(9, D, seed=seed + 50, scale=0.5), normal(D, seed=seed)
    return lambda x: torch.tanh(x @ W_in) @ W_out + b


TOKENS = torch.tensor([[1, 7, 3], [0, 10, 4]])
TWO_BLOCKS = ({"0_block": tanh_block(20)}, {"1_block": tanh_block(21)})


def test_the_papers_two_block_example():
    """Four distinct paths, each checked by hand at order 0, where a term is gamma of its center."""
    net = network(*TWO_BLOCKS)
    first = jet_expand(net, "0_block", centers=["embed"], order=0)
    second = jet_expand(net, "1_block", centers=first, order=0)
    assert [str(term) for term in second.terms] == [
        "embed",
        "embed > 0_block",
        "embed > 1_block",
        "embed > 0_block > 1_block",
    ]
    trace = net.trace(TOKENS)
    jets = second(trace)
    e, (f, g) = trace["embed"], (TWO_BLOCKS[0]["0_block"], TWO_BLOCKS[1]["1_block"])
    wanted = {"embed": e / 2, "embed > 0_block": f(e) / 2, "embed > 1_block": g(e) / 2}
    wanted["embed > 0_block > 1_block"] = g(f(e)) / 2
    for path, term in wanted.items():
        assert oracles.relative_error(jets[path], term) < 1e-12
    assert oracles.relative_error(jets.remainder, trace["final_post"] - sum(wanted.values())) < 1e-12


def test_identity_terms_are_the_centers_and_jets_the_papers():
    """For k >= 1: x_i themselves, and w_i (gamma(x_i) + D gamma(x_i)(h - x_i)), by reverse-mode differentiation."""
    net = network(*TWO_BLOCKS)
    trace = net.trace(TOKENS)
    exp = jet_expand(net, "1_block", centers=["embed", "0_block_out"], order=1, weights=[0.3, 0.7])
    jets, g, h = exp(trace), TWO_BLOCKS[1]["1_block"], trace["1_pre"]
    for weight, label in ((0.3, "embed"), (0.7, "0_block_out")):
        x = trace[label]
        assert torch.equal(jets[label], x)
        jacobian = torch.autograd.functional.jacobian(lambda row: g(row), x[0, 0])
        wanted = weight * (g(x[0, 0]) + jacobian @ (h - x)[0, 0])
        assert oracles.relative_error(jets[f"{label} > 1_block"][0, 0], wanted) < 1e-12
    # The centers sum to h, so that the remainder is what the jets leave of gamma(h) alone.
    left = g(h) - jets["embed > 1_block"] - jets["0_block_out > 1_block"]
    assert oracles.relative_error(jets.remainder, left) < 1e-12


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_polynomial_gammas_are_exact_at_their_degree(degree):
    A = normal(D, D, seed=9)

    def gamma(x: Tensor) -> Tensor:
        return (x @ A) ** degree + x.sum(-1, keepdim=True) * A[0]

    net = network({"0_block": tanh_block(3)}, {"1_block": gamma})
    trace = net.trace(TOKENS)
    exact = jet_expand(net, "1_block", centers=["embed", "0_block_out"], order=degree)(trace)
    assert exact.relative_remainder < 1e-10
    if degree > 1:
        short = jet_expand(net, "1_block", centers=["embed", "0_block_out"], order=degree - 1)(trace)
        assert short.relative_remainder > 1e-3


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("step", ["1_block", "ln_final"])
def test_remainder_falls_with_the_distance_of_the_centers(order, step):
    """Lemma 1: the remainder is of order max |x_i - h|^(k+1)."""
    net = network(*TWO_BLOCKS)
    trace = net.trace(TOKENS)
    stream = "1_pre" if step == "1_block" else "final_post"
    h, u = trace[stream], normal(2, BATCH, POS, D, seed=8)
    sizes = []
    for t in (0.02, 0.01):
        # Two centers that sum to h would be far from it: measure gamma's own remainder, without the identity's.
        centers = {f"c{i}": (lambda trace, i=i, t=t: h + t * u[i]) for i in range(2)}
        exp = jet_expand(net, step, centers=centers, order=order, weights=[0.4, 0.6])(trace)
        terms = [exp[path] for path in exp.labels if path.endswith(step)]
        truth = net.decoder.norm(h) if step == "ln_final" else TWO_BLOCKS[1]["1_block"](h)
        sizes.append(float((truth - sum(terms)).norm()))
    slope = math.log2(sizes[0] / sizes[1])
    assert order + 0.8 < slope < order + 1.5


def test_paths_of_the_decoder_carry_their_share_of_the_bias():
    net = network(*TWO_BLOCKS)
    trace = net.trace(TOKENS)
    exp = jet_expand(net, "ln_final", centers=net.components, order=0, weights=[0.2, 0.5, 0.3])(trace)
    total = sum(exp.logits(path) for path in exp)
    assert oracles.relative_error(total, exp.logits()) < 1e-12
    x, decoder = trace["0_block_out"], net.decoder
    wanted = 0.5 * (oracles.layer_norm(x, decoder.norm.weight, decoder.norm.bias, 1e-3) @ decoder.W_U + decoder.b_U)
    assert oracles.relative_error(exp.logits("0_block_out > ln_final"), wanted) < 1e-12


def test_at_the_true_stream_every_order_is_the_model():
    net = network(*TWO_BLOCKS)
    trace = net.trace(TOKENS)
    for order in range(3):
        exp = jet_expand(net, "ln_final", centers="final_post", order=order)(trace)
        assert oracles.relative_error(exp.logits(), trace.logits) < 1e-12


@pytest.mark.parametrize("order", [0, 1, 2])
def test_optimal_weights_of_an_inner_stage_leave_the_smallest_remainder(order):
    net = network(*TWO_BLOCKS)
    trace = net.trace(TOKENS)
    options = {"centers": ["embed", "0_block_out", "1_pre"], "order": order}
    if order == 0:
        options["centers"] = [
            "embed",
            "0_block_out",
            lambda trace: 0.3 * trace["embed"] + normal(BATCH, POS, D, seed=1),
        ]
    best = jet_expand(net, "1_block", weights="optimal", **options)(trace)
    assert float(best.gap.max()) < 1e-6
    sizes = best.remainder.norm(dim=-1)
    for seed in range(20):
        weights = torch.distributions.Dirichlet(torch.full((3,), 0.7, dtype=torch.float64)).sample()
        other = jet_expand(net, "1_block", weights=weights, **options)(trace)
        assert (other.remainder.norm(dim=-1) >= sizes - 1e-9).all(), seed


@pytest.mark.parametrize("objective", ["l2", "centered_l2", "kl"])
@pytest.mark.parametrize("order", [0, 1])
def test_optimal_weights_of_the_decoder_minimize_their_objective(objective, order):
    net = network(*TWO_BLOCKS)
    trace = net.trace(TOKENS)

    def score(jets: JetCache) -> Tensor:
        logits, truth = jets.logits(), trace.logits
        if objective == "kl":
            p = truth.log_softmax(-1)
            return (p.exp() * (p - logits.log_softmax(-1))).sum(-1)
        error = truth - logits
        return (error - (error.mean(-1, keepdim=True) if objective == "centered_l2" else 0)).norm(dim=-1)

    options = {"centers": net.components, "order": order}
    best = jet_expand(net, "ln_final", weights="optimal", objective=objective, **options)(trace)
    for weights in [*torch.eye(3, dtype=torch.float64), *torch.rand(15, 3, dtype=torch.float64)]:
        other = jet_expand(net, "ln_final", weights=weights / weights.sum(), **options)(trace)
        assert (score(other) >= score(best) - 1e-6).all()


def test_kl_weights_under_a_softcap_are_refused_and_under_a_scale_allowed():
    capped = network(*TWO_BLOCKS, transform=lambda logits: 3 * torch.tanh(logits / 3))
    options = {"centers": capped.components, "order": 0, "weights": "optimal", "objective": "kl"}
    with pytest.raises(NotImplementedError, match="without a final softcap"):
        jet_expand(capped, "ln_final", **options)(TOKENS)
    scaled = network(*TWO_BLOCKS, transform=lambda logits: logits * 0.25)
    jets = jet_expand(scaled, "ln_final", **options)(TOKENS)
    assert float(jets.gap.max()) < 1e-6


def test_permuting_centers_permutes_terms():
    net = network(*TWO_BLOCKS)
    trace = net.trace(TOKENS)
    labels = ["embed", "0_block_out", "1_pre"]
    one = jet_expand(net, "1_block", centers=labels, order=2)(trace)
    two = jet_expand(net, "1_block", centers=labels[::-1], order=2)(trace)
    assert set(one) == set(two)
    for path in one:
        assert torch.equal(one[path], two[path])


def test_batch_and_position_slices_commute_with_evaluation():
    net = network(*TWO_BLOCKS)
    exp = jet_expand(net, "ln_final", centers=net.components, order=2, weights="optimal")
    whole, part = exp(TOKENS), exp(TOKENS[1:, :2])
    for path in whole:
        sliced = whole.apply_slice_to_batch_dim(slice(1, None)).apply_slice_to_pos_dim(slice(0, 2))
        assert oracles.relative_error(sliced[path], part[path]) < 1e-8


def test_center_scale_moves_the_center_inside_gamma_only():
    net = network(*TWO_BLOCKS)
    trace = net.trace(TOKENS)
    exp = jet_expand(net, "1_block", centers=["embed", "0_block_out"], order=1, center_scale="match")(trace)
    x, h, g = trace["embed"], trace["1_pre"], TWO_BLOCKS[1]["1_block"]
    assert torch.equal(exp["embed"], x)
    centered = [value - value.mean(-1, keepdim=True) for value in (x, h)]
    moved = x * (centered[1].norm(dim=-1) / centered[0].norm(dim=-1))[..., None]
    wanted = 0.5 * oracles.nested_jvp_coefficients(g, moved, h - moved, 1).sum(0)
    assert oracles.relative_error(exp["embed > 1_block"], wanted) < 1e-10


def test_terms_are_differentiable_in_the_weights():
    net = network(*TWO_BLOCKS)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64, requires_grad=True)
    jets = jet_expand(net, "ln_final", centers=net.components, order=1, weights=weights)(TOKENS)
    jets.logits().square().sum().backward()
    assert weights.grad is not None and float(weights.grad.abs().min()) > 0


def test_trace_remembers_and_expansions_share_jets(monkeypatch):
    net = network(*TWO_BLOCKS)
    trace = net.trace(TOKENS)
    exp = jet_expand(net, "1_block", centers=["embed"], order=2)
    assert exp(trace).terms is exp(trace).terms and exp(trace).expansion is exp
    monkeypatch.setattr(expand_module, "jet", lambda *_: pytest.fail("the jets were computed twice"))
    jet_expand(net, "1_block", centers=["embed"], order=2, weights=[1.0])(trace)
    with pytest.raises(pytest.fail.Exception, match="twice"):
        jet_expand(net, "1_block", centers={"embed": lambda trace: 2 * trace["embed"]}, order=2)(trace)


def test_a_trace_keeps_no_expansion_alive():
    """Weights that are optimized, an expansion a step: what the trace holds must not grow with the steps."""
    net = network(*TWO_BLOCKS)
    trace = net.trace(TOKENS)
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for step in range(5):
        first = jet_expand(net, "0_block", centers=["embed", lambda t: 2 * t["embed"]], weights=weights.softmax(0))
        second = jet_expand(net, "1_block", centers=first, weights=weights.repeat(2).softmax(0))
        second(trace).remainder.square().sum().backward()
        assert (len(trace.memo), len(trace.evaluated)) == (5, 2), step  # writes and jets of two stages, and the sinks
    assert second in trace.evaluated and first in trace.evaluated
    del second
    # The jets of the last one have the terms of `first` as centers.
    assert len(trace.evaluated) == 1 and first in trace.evaluated


@pytest.mark.parametrize("spec", [s for s in zoo.available(zoo.CORE) if s.processing == "raw"], ids=str)
def test_folding_and_centering_change_no_path(spec):
    """Every path's logits, up to a constant a token; folding runs in float32."""
    processed = zoo.ModelSpec(spec.name, spec.world, "processed")
    if processed not in zoo.available([spec.name]):
        pytest.skip("this version cannot process the family")
    tokens = zoo.tokens(zoo.build(spec))
    found = []
    for model in (zoo.build(spec), zoo.build(processed)):
        net = ResidualNetwork(model, "block")
        inner = jet_expand(net, "1_block", centers=["0_pre", "1_pre"], order=1)
        final = jet_expand(net, "ln_final", centers=inner.terms[2:], order=1)
        logits = torch.stack([final(tokens).logits(path) for path in (str(t) for t in final.terms)])
        found.append(logits - logits.mean(-1, keepdim=True))
    assert found[0].shape[0] == 2
    assert oracles.relative_error(found[1], found[0]) < 2e-4  # derivatives amplify the float32 rounding of the weights


@pytest.mark.parametrize("spec", zoo.available(["gpt2", "pythia", "llama", "olmo2"]), ids=str)
def test_expansions_of_transformers_at_head_granularity(spec):
    """Every write of a stage is expanded; with one center, the stage's own stream, each is exact."""
    net = ResidualNetwork(zoo.build(spec), "head")
    trace = net.trace(zoo.tokens(net.view.model, batch=2, pos=5))
    jets = jet_expand(net, "L1H2", centers="1_pre", order=1)(trace)
    assert jets.relative_remainder < 1e-10
    assert f"1_pre > L1H{net.view.cfg.n_heads - 1}" in jets and "1_pre > 1_attn_bias" in jets
    assert oracles.relative_error(jets["1_pre > L1H2"], trace["L1H2_out"]) < 1e-10


def test_edits_by_hooks_are_terms_of_their_own():
    for spec in zoo.available(["gpt2"]):
        model = zoo.build(spec)
        net = ResidualNetwork(model)
        direction = torch.linspace(-1, 1, model.cfg.d_model, dtype=torch.float64)
        with model.hooks([("blocks.1.hook_resid_pre", lambda x, hook, v=direction: x + v)]):
            trace = net.trace(zoo.tokens(model))
            jets = jet_expand(net, "0_mlp", centers=["0_mid"], order=1)(trace)
            assert (
                oracles.relative_error(jets["edit:blocks.1.hook_resid_pre"], direction.expand_as(trace["0_pre"]))
                < 1e-12
            )
            assert jets.relative_remainder < 1e-10
            centers = [*net.components, "edit:blocks.1.hook_resid_pre"]
            assert jet_expand(net, "ln_final", centers=centers, order=1)(trace).check().passed


@pytest.mark.parametrize("spec", zoo.available(["llama"]), ids=str)
def test_expansions_of_a_bare_model_compose(spec):
    """Every call makes a network of its own; traces and terms go from one to the other."""
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    first = jet_expand(model, "0_mlp", centers=["embed", "0_attn_out"], order=1)
    second = jet_expand(model, "1_attn", centers=first, order=1)(tokens)
    net = ResidualNetwork(model)
    wanted = jet_expand(net, "1_attn", centers=jet_expand(net, "0_mlp", centers=["embed", "0_attn_out"], order=1))
    for path, term in wanted(net.trace(tokens)).items():
        assert torch.equal(second[path], term)
    assert second.check().passed


# The cache


def decoded() -> JetCache:
    net = network(*TWO_BLOCKS)
    return jet_expand(net, "ln_final", centers=net.components, order=1, weights="optimal")(TOKENS)


def test_cache_is_a_mapping_by_path():
    jets = decoded()
    assert jets.labels == list(jets) == list(jets.keys())
    assert len(jets) == 3 and "embed > ln_final" in jets and "nothing" not in jets
    assert torch.equal(jets[Path("embed", ("ln_final",))], jets["embed > ln_final"])
    assert jets.stack().shape == (3, BATCH, POS, D)
    assert torch.equal(jets.stack(["1_block_out > ln_final"])[0], jets["1_block_out > ln_final"])
    assert jets.weights.shape == (3, BATCH, POS)
    with pytest.raises(KeyError, match="No term 'nothing'; the terms are"):
        jets["nothing"]


def test_top_tokens_are_those_of_the_logits():
    net = network(*TWO_BLOCKS)
    jets = jet_expand(net, "ln_final", centers=net.components, order=1)(TOKENS)
    top = jets.top_tokens(4)
    for index, path in enumerate(jets):
        values, ids = jets.logits(path).topk(4)
        assert torch.equal(top.indices[index], ids)
        assert oracles.relative_error(top.values[index], values) < 1e-12


def test_cache_moves_and_slices_like_an_activation_cache():
    jets = decoded()
    single = jets.to(torch.float32)
    assert single["embed > ln_final"].dtype == single.weights.dtype == torch.float32
    assert jets["embed > ln_final"].dtype == torch.float64
    assert single.gap is jets.gap and jets.to("meta").gap.device.type == "meta"
    first = jets.apply_slice_to_batch_dim(slice(0, 1)).remove_batch_dim()
    assert first["embed > ln_final"].shape == (POS, D) and first.weights.shape == (3, POS)
    assert oracles.relative_error(first.remainder, jets.remainder[0]) < 1e-12
    assert oracles.relative_error(first.logits(), jets.logits()[0]) < 1e-12
    with pytest.raises(ValueError, match="needs a batch of 1; this cache holds 2"):
        jets.remove_batch_dim()


PROMPTS = ["w5 w17 w8 w30", "w11 w6", "w40 w41 w42"]  # of unequal length, so that two are padded


def of_prompts(spec: Any, step: str, **options: Any) -> tuple[JetCache, list[JetCache]]:
    """An expansion on all prompts together, and on each alone."""
    net = ResidualNetwork(zoo.build(spec))
    exp = jet_expand(net, step, centers=["embed", "0_attn_out", "0_mlp_out"], **options)
    return exp(PROMPTS), [exp(prompt) for prompt in PROMPTS]


def assert_same_tables(found: Any, wanted: Any) -> None:
    numbers = ["weight", "norm"]
    assert found.drop(columns=numbers).equals(wanted.drop(columns=numbers))
    assert found[numbers].to_numpy() == pytest.approx(wanted[numbers].to_numpy(), rel=1e-8)


@pytest.mark.parametrize(
    ("step", "options"),
    [("1_attn", {}), ("ln_final", {"weights": "optimal"}), ("1_mlp", {"linearize": "detached"})],
    ids=["inner", "decoder", "detached"],
)
@pytest.mark.parametrize("spec", [s for s in zoo.available(["gpt2", "llama"]) if s.processing == "raw"], ids=str)
def test_a_slice_is_the_cache_of_its_prompts(spec, step, options):
    whole, alone = of_prompts(spec, step, **options)
    assert whole.is_whole and whole.apply_slice_to_batch_dim(slice(None)).is_whole
    for index, prompt in enumerate(alone):
        for one in (whole.apply_slice_to_batch_dim([index]), whole.apply_slice_to_batch_dim(index)):
            assert not one.is_whole and one.valid.sum() == prompt.valid.sum()
            assert one.relative_remainder == pytest.approx(prompt.relative_remainder, rel=1e-8, abs=1e-12)
            assert_same_tables(one.to_dataframe(), prompt.to_dataframe())
            assert one.check().passed and one.check().sum_error < 1e-10
            if one.gap is not None:
                assert torch.equal(one.gap, whole.gap[index].expand_as(one.gap))
    turned = whole.apply_slice_to_batch_dim([2, 0])
    assert torch.equal(turned.tokens, whole.trace.tokens[[2, 0]]) and torch.equal(turned.valid, whole.valid[[2, 0]])
    table = turned.to_dataframe()
    assert_same_tables(table[table.batch == 0].reset_index(drop=True), alone[2].to_dataframe())
    again = turned.apply_slice_to_batch_dim(torch.tensor([False, True])).remove_batch_dim()
    assert again.prompts == 0
    assert_same_tables(again.to_dataframe(), alone[0].to_dataframe())


@pytest.mark.parametrize("spec", zoo.available(["gpt2"])[:1], ids=str)
def test_a_slice_of_positions_is_the_cache_there(spec):
    whole, _ = of_prompts(spec, "ln_final", weights="optimal")
    table = whole.to_dataframe()
    for index, positions in (
        ([3, 1], [3, 1]),
        ((1, 4, 2), [1, 3]),
        (slice(-2, None), [3, 4]),
        (torch.tensor([True, False, False, False, True]), [0, 4]),
        (torch.tensor([-1]), [4]),
        (2, 2),
    ):
        part = whole.apply_slice_to_pos_dim(index)
        assert part.positions == positions and torch.equal(part.tokens, whole.trace.tokens[:, positions])
        assert torch.equal(part.truth, whole.truth[:, positions]) and torch.equal(
            part.weights, whole.weights[..., positions]
        )
        rows = table[table.pos.isin([positions] if isinstance(positions, int) else positions)]
        order = ["batch", "pos", "path"]
        assert_same_tables(*(t.sort_values(order).reset_index(drop=True) for t in (part.to_dataframe(), rows)))
        keep = whole.valid.clone()
        keep[:, positions] = False
        keep = whole.valid & ~keep
        assert part.relative_remainder == pytest.approx(float(whole.remainder[keep].norm() / whole.truth[keep].norm()))
        assert part.check().passed and part.check().sum_error < 1e-10
    # In either order, and without a batch dimension, too.
    first = whole.apply_slice_to_batch_dim(1).apply_slice_to_pos_dim([2, 0])
    second = whole.apply_slice_to_pos_dim([2, 0]).apply_slice_to_batch_dim(1)
    assert torch.equal(first.truth, second.truth) and torch.equal(first.truth, whole.truth[1, [2, 0]])
    assert first.to_dataframe().equals(second.to_dataframe())
    cell = first.apply_slice_to_pos_dim(1)
    assert cell.truth.shape == whole.truth.shape[-1:] and cell.positions == 0 and cell.to_dataframe().pos.eq(0).all()
    assert cell.relative_remainder == pytest.approx(float(whole.remainder[1, 0].norm() / whole.truth[1, 0].norm()))
    assert cell.check().passed
    with pytest.raises(ValueError, match="check needs a real token"):
        whole.apply_slice_to_batch_dim(1).apply_slice_to_pos_dim(4).check()


@pytest.mark.usefixtures("as_users_run_it")
def test_slices_that_cannot_be_are_refused():
    jets = decoded()
    with pytest.raises(ValueError, match="batch dimension needs one"):
        jets.apply_slice_to_batch_dim(0).apply_slice_to_batch_dim(0)
    with pytest.raises(ValueError, match="batch dimension needs one"):
        jets.apply_slice_to_batch_dim(0).remove_batch_dim()
    with pytest.raises(ValueError, match="pos dimension needs one"):
        jets.apply_slice_to_pos_dim(0).apply_slice_to_pos_dim([0])
    for nothing in ([], slice(3, 3), None, True):
        with pytest.raises(ValueError, match="must keep some of its 3"):
            jets.apply_slice_to_pos_dim(nothing)
    with pytest.raises(IndexError):
        jets.apply_slice_to_batch_dim(2)


def test_table_has_a_row_a_path_and_position():
    jets = decoded()
    table = jets.to_dataframe()
    assert len(table) == 3 * BATCH * POS
    row = table[(table.path == "0_block_out > ln_final") & (table.batch == 1) & (table.pos == 2)].iloc[0]
    assert row.norm == pytest.approx(float(jets["0_block_out > ln_final"][1, 2].norm()))
    assert row.weight == pytest.approx(float(jets.weights[1, 1, 2]))
    assert row.top_token == str(int(jets.logits("0_block_out > ln_final")[1, 2].argmax()))
    net = network(*TWO_BLOCKS)
    inner = jet_expand(net, "1_block", centers=["embed", "1_pre"], order=1)(TOKENS).to_dataframe()
    assert (
        inner[inner.path == "embed"].weight.eq(1).all() and inner[inner.path == "embed > 1_block"].weight.eq(0.5).all()
    )


def noisy(jet: Any) -> Any:
    """Taylor arithmetic with errors of a hundredth, the same ones at every call."""

    def wrong(*args: Any) -> Any:
        series = jet(*args)
        return type(series)(series.coefficients + 0.01 * normal(*series.coefficients.shape, seed=3))

    return wrong


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("step", ["1_block", "ln_final"])
def test_check_passes_and_notices_a_broken_jet(order, step, monkeypatch):
    net = network(*TWO_BLOCKS)
    trace = net.trace(TOKENS)
    exp = jet_expand(net, step, centers=["embed", "1_pre"], order=order)
    jets = exp(trace)
    assert jets.check().passed and jets.check().term_error < 1e-13, jets.check()
    # In the terms alone, and in the terms and the check alike: only the slopes see the latter.
    if step == "1_block":
        with monkeypatch.context() as broken:
            broken.setattr(expand_module, "jet", noisy(expand_module.jet))
            wrong = exp(Trace(net, trace.recording))
        assert wrong.check().term_error > 1e-3 and not wrong.check().passed
        monkeypatch.setattr(checks_module, "jet", noisy(checks_module.jet))
        assert wrong.check().term_error < 1e-13 and not wrong.check().passed
    else:
        monkeypatch.setattr(checks_module, "jet", noisy(checks_module.jet))
        assert not jets.check().passed


CHECKED = [{"order": 0}, {"order": 1, "weights": "optimal"}, {"order": 2, "center_scale": "match"}]
CHECKED += [{"linearize": "detached"}]


@pytest.mark.parametrize("options", CHECKED, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize(("granularity", "step"), [("sublayer", "1_pre"), ("head", "1_pre"), ("sublayer", "ln_final")])
@pytest.mark.parametrize("spec", [s for s in zoo.available(["gpt2", "gemma2"]) if s.processing == "raw"], ids=str)
def test_check_notices_every_wrong_term(spec, granularity, step, options):
    net = ResidualNetwork(zoo.build(spec), granularity)
    size = net.view.cfg.d_model
    with net.view.model.hooks([("blocks.0.hook_resid_post", lambda x, hook: x + 0.1)]):
        trace = net.trace(zoo.tokens(net.view.model, batch=2, pos=4))
        centers = ["embed", "0_attn_bias" if granularity == "head" else "0_attn_out", "0_mlp_out"]
        cache = jet_expand(net, step, centers=centers, **options)(trace)
        found = cache.check()
        assert found.passed and found.term_error < 1e-11 and found.sum_error < 1e-11, found
        assert bool(found.slopes) == ("linearize" not in options)
        for label in cache.labels[:: max(1, len(cache) // 4)]:
            term = cache[label]
            wrong = term + 0.01 * max(float(term.abs().max()), 1e-4) * normal(size, seed=4)
            check = replace(cache, terms={**cache.terms, label: wrong}).check()
            assert check.term_error > 1e-4 and not check.passed, label
        first, second = cache.labels[0], cache.labels[-1]
        swapped = {first: cache[second], second: cache[first]}
        assert not replace(cache, terms={**cache.terms, **swapped}).check().passed
        assert not replace(cache, terms={**cache.terms, first: cache[first] * float("nan")}).check().passed
        assert not replace(cache, truth=1.01 * cache.truth).check().passed
        if "linearize" not in options:
            assert not replace(cache, weights=cache.weights.flip(0) * 0.9).check().passed


def test_check_in_float32():
    for spec in (s for s in zoo.available(["gpt2", "gemma2"]) if s.processing == "raw"):
        net = ResidualNetwork(zoo.build(spec, torch.float32), "head")  # which has biases of nothing but rounding
        trace = net.trace(zoo.tokens(net.view.model))
        for options in CHECKED:
            check = jet_expand(net, "1_pre", centers=["embed", "L0H1_out", "0_attn_bias"], **options)(trace).check()
            assert check.passed and check.term_error < 1e-5, (spec, options, check)


def test_check_notices_a_model_that_is_not_the_networks():
    jets = decoded()
    jets.trace.logits = jets.trace.logits + normal(V, seed=1)
    assert jets.check().sum_error > 1e-2 and not jets.check().passed


@pytest.mark.parametrize("spec", zoo.available(["gpt2", "llama"]), ids=str)
def test_terms_before_the_final_norm_work_with_logit_attrs_and_patching(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    net = ResidualNetwork(model)
    _, cache = model.run_with_cache(tokens)
    last = f"{len(model.blocks) - 1}_mlp"
    jets = jet_expand(net, last, centers=["embed", f"{last[0]}_mid"], order=1)(tokens)
    answers = zoo.tokens(model, seed=1)[:, -1]
    stack = torch.cat([jets.stack(), jets.remainder[None]])
    attrs = cache.logit_attrs(stack[:, :, -1], tokens=answers, pos_slice=-1)
    whole = cache.logit_attrs(cache["resid_post", -1][None, :, -1], tokens=answers, pos_slice=-1)
    assert oracles.relative_error(attrs.sum(0), whole[0]) < 1e-5
    # As the source of a patch: the terms and the remainder are the last stream.
    patch = [(f"blocks.{last[0]}.hook_resid_post", lambda stream, hook: stack.sum(0))]
    assert oracles.relative_error(model.run_with_hooks(tokens, fwd_hooks=patch), model(tokens)) < 1e-5


@pytest.mark.parametrize("spec", zoo.available(["gpt2", "llama", "pythia"]), ids=str)
def test_logit_attrs_whether_weights_are_folded_or_not(spec):
    """TransformerLens' own on the folded model is the oracle of terms of a stream; decoded terms' logits, of theirs."""
    model, folded = zoo.build(spec), zoo.build(zoo.ModelSpec(spec.name, spec.world, "processed"))
    tokens = zoo.tokens(model)
    net, last = ResidualNetwork(model), f"{len(model.blocks) - 1}_mlp"
    answers = zoo.tokens(model, seed=1)
    wanted = torch.stack([answers, answers.flip(0)], -1)
    options: dict[str, Any] = {"centers": ["embed", f"{last[0]}_attn_out"], "linearize": "detached"}
    jets = jet_expand(net, last, **options)(tokens)
    theirs = jet_expand(folded, last, **options)(tokens)
    with torch.no_grad(), full_precision():
        _, cache = folded.run_with_cache(tokens)
    expected = torch.stack([cache.logit_attrs(theirs.stack(), tokens=wanted[..., i]) for i in range(2)], -1)
    expected = (
        expected
        - torch.stack(
            [cache.logit_attrs(theirs.stack(), tokens=torch.full_like(answers, token)) for token in range(zoo.D_VOCAB)]
        ).mean(0)[..., None]
    )
    assert oracles.relative_error(jets.logit_attrs(wanted), expected) < 2e-6  # folded in float32
    assert oracles.relative_error(theirs.logit_attrs(wanted), expected) < 2e-6
    decoded = jet_expand(net, "ln_final", centers=["embed", "0_mlp_out"], order=1)(tokens)
    found = decoded.logit_attrs([[3, 5], [7, 1], [0, 2]])
    logits = torch.stack([decoded.logits(path) for path in decoded.labels])
    for i, (path, ids) in enumerate((path, ids) for path in range(2) for ids in ([3, 5], [7, 1], [0, 2])):
        mine = logits[path, i % 3]
        assert oracles.relative_error(found[path, i % 3], mine[:, ids] - mine.mean(-1, keepdim=True)) < 1e-10
    best = decoded.logit_attrs()[..., 0]
    own = model(tokens).argmax(-1)
    assert (
        oracles.relative_error(best, logits.gather(-1, own.expand(2, -1, -1)[..., None])[..., 0] - logits.mean(-1))
        < 1e-10
    )
    sliced = decoded.apply_slice_to_pos_dim([2]).logit_attrs(5)
    assert oracles.relative_error(sliced[:, :, 0, 0], (logits[..., 5] - logits.mean(-1))[:, :, 2]) < 1e-10
    with pytest.raises(ValueError, match="Attributions need a cache"):
        decoded.apply_slice_to_batch_dim(0).logit_attrs(5)


# Errors


def expect(error: type[Exception], words: str, **options: Any) -> None:
    net = network(*TWO_BLOCKS)
    defaults = {"step": "1_block", "centers": ["embed"], "order": 1}
    given = {**defaults, **options}
    with pytest.raises(error, match=words):
        jet_expand(net, given.pop("step"), **given)(TOKENS)


@pytest.mark.usefixtures("as_users_run_it")
def test_errors_say_what_must_hold():
    expect(ValueError, "A stage is named by one of its steps", step="7_mlp")
    expect(ValueError, "at least one center; got none", centers=[])
    expect(ValueError, r"Centers must have different names; got \['embed'\]", centers=["embed", "embed"])
    expect(ValueError, "A center's label must be a source, stream or write", centers=["9_mlp_out"])
    expect(TypeError, "A center must be a label, a term", centers=[3])
    expect(TypeError, "centers must be labels", centers=3)
    expect(ValueError, "order must be an integer >= 0; got -1", order=-1)
    expect(TypeError, "order must be an integer >= 0; got 1.5", order=1.5)
    expect(ValueError, "center_scale must be one of", center_scale="big")
    expect(ValueError, "objective must be one of", objective="l3")
    expect(ValueError, "weights must be 'uniform', 'optimal' or numbers", weights="best")
    expect(ValueError, "sum", weights=torch.tensor([0.5]))
    expect(ValueError, "one entry a center", weights=torch.tensor([0.5, 0.5]))
    expect(ValueError, "negative", centers=["embed", "1_pre"], weights=torch.tensor([1.5, -0.5]))
    expect(ValueError, r"must have shape \[center\] or \[center, batch, pos\]", weights=torch.ones(1, 4, 4))
    expect(ValueError, "must return a tensor", centers={"bad": lambda trace: trace["embed"][0]})
    expect(ValueError, "must be finite; bad returned NaN", centers={"bad": lambda trace: trace["embed"] * math.nan})
    expect(ValueError, "must have the streams' dtype", centers={"bad": lambda trace: trace["embed"].float()})


def test_logits_of_an_inner_stage_are_refused():
    net = network(*TWO_BLOCKS)
    jets = jet_expand(net, "1_block", centers=["embed"], order=1)(TOKENS)
    for read in (jets.logits, jets.top_tokens, jets.bias_weights):
        with pytest.raises(ValueError, match=r"belong to terms of the decoder; these are terms of 1_block"):
            read()


def test_a_trace_of_another_model_is_refused():
    one, other = network(*TWO_BLOCKS), network(*TWO_BLOCKS)
    trace: Trace = other.trace(TOKENS)
    with pytest.raises(ValueError, match="A trace must be of the same model"):
        jet_expand(one, "1_block", centers=["embed"])(trace)
