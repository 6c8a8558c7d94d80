"""Reorganized order-1 jets against eq. 5, tangents by torch.func, and the plain jets in Taylor arithmetic."""

from __future__ import annotations

import itertools
import math
from typing import Any

import oracles
import pytest
import torch
import zoo
from torch import Tensor

from tl_jets import CallableModel, Decoder, Norm, Path, ResidualNetwork, jet_expand
from tl_jets.calculus import full_precision
from tl_jets.paths import reorganized as module
from tl_jets.paths.reorganized import reorganized_expansion

D, V, BATCH, POS = 6, 11, 2, 3
TOKENS = torch.tensor([[1, 7, 3], [0, 10, 4]])
TOLERANCE = 1e-10


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NORM = Norm("LN", weight=1 + normal(D, seed=1, scale=0.3), bias=normal(D, seed=2, scale=0.3), eps=1e-3)
PLAIN = Norm("none", weight=1 + normal(D, seed=1, scale=0.3))


def network(*stages: dict[str, Any], norm: Norm = NORM, b_U: Tensor | None = None, embeds: int = 1) -> ResidualNetwork:
    decoder = Decoder(norm=norm, W_U=normal(D, V, seed=3), b_U=normal(V, seed=4) if b_U is None else b_U)
    tables = {name: normal(V, D, seed=5 + i) for i, name in enumerate(("embed", "pos_embed")[:embeds])}
    sources = {name: lambda tokens, table=table: table[tokens] for name, table in tables.items()}
    return ResidualNetwork(CallableModel(sources, stages, decoder))


def matrix(seed: int) -> Tensor:
    return normal(D, D, seed=seed, scale=0.7)


def affine(seed: int, bias: bool = False) -> Any:
    """x -> mix positions, then a matrix: as linear as attention with a frozen pattern."""
    pattern = torch.tensor([[1.0, 0, 0], [0.4, 0.6, 0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    b = normal(D, seed=seed + 7) if bias else torch.zeros(D, dtype=torch.float64)
    return lambda x: torch.einsum("qk,bkd->bqd", pattern, x) @ matrix(seed) + b


def mix(x: Tensor) -> Tensor:
    return affine(40)(x) @ torch.linalg.inv(matrix(40))


def tanh_block(seed: int) -> Any:
    """An MLP whose write depends on earlier positions, too, with biases."""
    W_in, W_out = normal(D, 9, seed=seed, scale=0.5), normal(9, D, seed=seed + 50, scale=0.5)
    b_in, b_out = normal(9, seed=seed + 1), normal(D, seed=seed)
    return lambda x: torch.tanh((x + 0.3 * x.cumsum(1)) @ W_in + b_in) @ W_out + b_out


# Linear networks: eq. 5 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 3, 4, 5, 6])
def test_every_path_of_a_linear_network_is_a_product_of_matrices(depth):
    """2^depth paths, mixing positions; the plain jets' terms are not, path by path (only their sum is)."""
    net = network(
        *({f"{i}_block": affine(10 + i)} for i in range(depth)), norm=PLAIN, b_U=torch.zeros(V, dtype=torch.float64)
    )
    trace = net.trace(TOKENS)
    paths = reorganized_expansion(net)(trace)
    wanted = {}
    for taken in itertools.product([False, True], repeat=depth):
        value = trace["embed"]
        for i in range(depth):
            value = mix(value) @ matrix(10 + i) if taken[i] else value
        steps = [f"{i}_block" for i in range(depth) if taken[i]]
        wanted[str(Path("embed", (*steps, "ln_final")))] = value * PLAIN.weight
    assert len(wanted) == 2**depth and set(paths) - set(wanted) == {"rest > ln_final"}
    for label, value in wanted.items():
        assert oracles.relative_error(paths[label], value) < TOLERANCE, label
        assert float(value.norm()) > 1e-3
    assert paths.relative_remainder < 1e-12 and paths["rest > ln_final"].norm() < 1e-10
    if depth == 2:
        first = jet_expand(net, "0_block", centers=["embed"], order=1)
        plain = jet_expand(net, "1_block", centers=first, order=1)(trace)
        assert (
            oracles.relative_error(
                plain["embed > 0_block > 1_block"], mix(mix(trace["embed"]) @ matrix(10)) @ matrix(11)
            )
            > 0.1
        )


def test_biases_and_sources_that_are_no_centers_are_paths_of_their_own():
    """Two embeddings of which one is expanded at, affine steps in parallel, weights that differ by position."""
    stages = ({"0_attn": affine(10, bias=True), "0_mlp": affine(11, bias=True)}, {"1_mlp": affine(12, bias=True)})
    net = network(*stages, norm=PLAIN, embeds=2)
    trace = net.trace(TOKENS)
    biases = {
        f"{name}_bias": f(torch.zeros(BATCH, POS, D, dtype=torch.float64)) for s in stages for name, f in s.items()
    }
    first = reorganized_expansion(net, "0_mlp", centers=["embed"])
    second = reorganized_expansion(net, "1_mlp", centers=first)
    paths = reorganized_expansion(net, centers=second)(trace)
    E, P, w = trace["embed"], trace["pos_embed"], PLAIN.weight
    A, B, C = (lambda x, seed=seed: mix(x) @ matrix(seed) for seed in (10, 11, 12))
    wanted = {
        "embed > 0_attn > ln_final": A(E) * w,
        "embed > 0_mlp > 1_mlp > ln_final": C(B(E)) * w,
        "0_attn_bias > ln_final": biases["0_attn_bias"] * w,
        "0_mlp_bias > 1_mlp > ln_final": C(biases["0_mlp_bias"]) * w,
        "1_mlp_bias > ln_final": biases["1_mlp_bias"] * w,
        # What was not given is in the rest, and what the steps make of it.
        "rest > ln_final": (P + A(P) + B(P) + C(P + A(P) + B(P))) * w,
    }
    for label, value in wanted.items():
        assert oracles.relative_error(paths[label], value) < TOLERANCE, label
    assert len(paths) == 6 + (2 * 2 + 1) + 2  # centers, biases, rest and the decoder's own
    assert torch.equal(paths.logits("ln_final_bias")[0, 0], net.decoder.b_U)
    assert oracles.relative_error(sum(paths.logits(label) for label in paths), trace.logits) < TOLERANCE
    # Whatever the weights of the centers are.
    weights = torch.rand(2, BATCH, POS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = reorganized_expansion(net, "0_mlp", centers=["embed", "pos_embed"], weights=weights / weights.sum(0))(trace)
    assert oracles.relative_error(one["pos_embed > 0_attn"], A(P)) < TOLERANCE
    assert oracles.relative_error(one["0_attn_bias"], biases["0_attn_bias"]) < TOLERANCE


# Nonlinear stages, by torch.func ---------------------------------------------------------------------------------------


def by_hand(gamma: Any, centers: list[Tensor], weights: list[Any], sources: list[Tensor], at: list[Tensor]) -> list:
    """p_j for centers, then M r for the other sources."""
    zero = gamma(torch.zeros_like(sources[0]))

    def tangent(i: int, u: Tensor) -> Tensor:
        return torch.func.jvp(gamma, (at[i],), (u,))[1]

    found = [sum(w * tangent(i, u) for i, w in enumerate(weights)) for u in sources]
    for j, (w, x) in enumerate(zip(weights, at, strict=True)):
        found[j] = found[j] + w * (gamma(x) - zero - tangent(j, x))
    del centers
    return found


@pytest.mark.parametrize("center_scale", ["none", "match"])
def test_paths_of_a_nonlinear_stage_are_their_own_write_and_what_tangents_make_of_them(center_scale):
    block = tanh_block(21)
    net = network({"0_block": tanh_block(20)}, {"1_block": block}, embeds=2)
    trace = net.trace(TOKENS)
    centers, carried = ["embed", "0_block_out"], {"half": lambda trace: trace["pos_embed"] / 2}
    exp = reorganized_expansion(
        net, "1_block", centers=centers, carried=carried, weights=[0.3, 0.7], center_scale=center_scale
    )
    paths = exp(trace)
    h, half = trace["1_pre"], trace["pos_embed"] / 2
    values = [trace[label] for label in centers]
    scales = [1.0, 1.0]
    if center_scale == "match":
        center = lambda x: x - x.mean(-1, keepdim=True)  # noqa: E731
        scales = [center(h).norm(dim=-1, keepdim=True) / center(x).norm(dim=-1, keepdim=True) for x in values]
    at = [s * x for s, x in zip(scales, values, strict=True)]
    rest = h - sum(values) - half
    wanted = by_hand(block, values, [0.3, 0.7], [*values, half, rest], at)
    for label, value in zip([*centers, "half", "rest"], wanted, strict=True):
        assert oracles.relative_error(paths[f"{label} > 1_block"], value) < TOLERANCE, label
    assert oracles.relative_error(paths["rest"], rest) < TOLERANCE
    assert oracles.relative_error(paths["1_block_bias"], block(torch.zeros_like(h))) < TOLERANCE
    plain = jet_expand(net, "1_block", centers=centers, order=1, weights=[0.3, 0.7], center_scale=center_scale)(trace)
    jets = sum(plain[f"{label} > 1_block"] for label in centers)
    found = sum(value for label, value in paths.items() if label.endswith(" > 1_block") or label == "1_block_bias")
    assert oracles.relative_error(found, jets) < TOLERANCE
    assert oracles.relative_error(paths.remainder, block(h) - jets) < TOLERANCE, "truncation alone"
    assert paths.check().passed and paths.check().sum_error < 1e-12


@pytest.mark.parametrize("kind", ["LN", "RMS", "none"])
def test_decoded_paths_against_differentiated_norms(kind):
    weight, bias = 1 + normal(D, seed=1, scale=0.3), normal(D, seed=2, scale=0.3)
    net = network({"0_block": tanh_block(20)}, norm=Norm(kind, weight=weight, bias=bias, eps=1e-2), embeds=2)
    trace = net.trace(TOKENS)
    paths = reorganized_expansion(net, centers=["embed", "0_block_out"], weights=[0.25, 0.75])(trace)
    norms = {"LN": oracles.layer_norm, "RMS": oracles.rms_norm, "none": lambda x, w, b, eps: x * w + b}

    def gamma(x: Tensor) -> Tensor:
        return norms[kind](x, weight, bias, 1e-2)

    values = [trace["embed"], trace["0_block_out"]]
    wanted = by_hand(gamma, values, [0.25, 0.75], [*values, trace["pos_embed"]], values)
    for label, value in zip(["embed", "0_block_out", "rest"], wanted, strict=True):
        assert oracles.relative_error(paths[f"{label} > ln_final"], value) < TOLERANCE, label
    assert oracles.relative_error(paths["ln_final_bias"], bias.expand(BATCH, POS, D)) < TOLERANCE
    plain = jet_expand(net, "ln_final", centers=["embed", "0_block_out"], order=1, weights=[0.25, 0.75])(trace)
    assert oracles.relative_error(paths.logits(), plain.logits()) < TOLERANCE
    assert paths.check().passed and paths.check().sum_error < 1e-12


def test_the_recursion_is_the_stages_composed():
    stages = ({"0_attn": tanh_block(20), "0_mlp": tanh_block(21)}, {"1_mlp": tanh_block(22)})
    net = network(*stages)
    trace = net.trace(TOKENS)
    exp = reorganized_expansion(net)
    first = reorganized_expansion(net, "0_attn", centers=["embed"])
    second = reorganized_expansion(net, "1_pre", centers=first)
    composed = reorganized_expansion(net, "final_post", centers=second)(trace)
    paths = exp(trace)
    assert paths.labels == composed.labels
    assert all(torch.equal(paths[label], composed[label]) for label in paths)
    assert [str(term) for term in exp.terms] == paths.labels[: len(exp)] and len(exp) == 6
    # The first stage by hand: one center, the whole stream.
    e, (f, g) = trace["embed"], stages[0].values()
    zero = torch.zeros_like(e)
    one = first(trace)
    assert oracles.relative_error(one["embed > 0_attn"], f(e) - f(zero)) < TOLERANCE
    assert oracles.relative_error(one["0_mlp_bias"], g(zero)) < TOLERANCE
    # The second: what the first missed (nothing) and what it missed itself.
    missed = trace["final_post"] - sum(v for label, v in second(trace).items() if not label.startswith("rest"))
    ln = lambda x: oracles.layer_norm(x, NORM.weight, NORM.bias, 1e-3)  # noqa: E731
    centers = [second(trace)[str(term)] for term in second.terms]
    wanted = sum(torch.func.jvp(ln, (x,), (missed,))[1] / len(centers) for x in centers)
    assert oracles.relative_error(paths["rest > ln_final"], wanted) < TOLERANCE
    assert paths.remainders.keys() == {"0_pre", "1_pre", "final_post", "ln_final"}
    assert math.isclose(paths.remainders["final_post"], float(missed.norm() / trace["final_post"].norm()), rel_tol=1e-9)
    # A term is a center of any other expansion.
    again = jet_expand(net, "ln_final", centers=second, order=1)(trace)
    assert len(again) == len(second) and torch.equal(
        exp.sources(trace)["embed > 1_mlp"], second["embed > 1_mlp"].evaluate(trace)
    )


def test_optimal_weights_leave_less_than_uniform_ones():
    net = network({"0_block": tanh_block(20)}, {"1_block": tanh_block(21)})
    trace = net.trace(TOKENS)
    uniform, optimal = (
        reorganized_expansion(net, "1_block", centers=["embed", "0_block_out"], weights=weights)(trace)
        for weights in ("uniform", "optimal")
    )
    assert optimal.remainder.norm() < 0.98 * uniform.remainder.norm()
    plain = jet_expand(net, "1_block", centers=["embed", "0_block_out"], order=1, weights="optimal")(trace)
    assert oracles.relative_error(optimal.weights, plain.weights) < 1e-12 and optimal.gap is not None
    assert optimal.check().passed


def test_a_stage_that_cannot_be_transposed_is_done_in_taylor_arithmetic(monkeypatch):
    class Doubled(torch.autograd.Function):
        """Differentiates itself, and wrongly: the graph and Taylor arithmetic must not agree."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 2 * grads[0]

    block = tanh_block(21)
    for f in (lambda x: block(Doubled.apply(x)) if type(x) is Tensor and x.requires_grad else block(x), block):
        net = network({"0_block": f})
        trace = net.trace(TOKENS)
        paths = reorganized_expansion(net, "0_block", centers={"a": lambda t: t["embed"] / 3})(trace)
        wanted = by_hand(block, [], [1.0], [trace["embed"] / 3, trace["embed"] * 2 / 3], [trace["embed"] / 3])
        assert oracles.relative_error(paths["a > 0_block"], wanted[0]) < TOLERANCE
        assert oracles.relative_error(paths["rest > 0_block"], wanted[1]) < TOLERANCE

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(module.GraphMap, "apply_rows", broken)
    net = network({"0_block": block})
    paths = reorganized_expansion(net, "0_block", centers={"a": lambda t: t["embed"] / 3})(net.trace(TOKENS))
    assert oracles.relative_error(paths["rest > 0_block"], wanted[1]) < TOLERANCE


# TransformerLens models ------------------------------------------------------------------------------------------------

FAMILIES = [
    spec
    for spec in zoo.available([*zoo.CORE, "bloom", "phi3", "sandwich", "granite"])
    if (spec.processing == "raw" or spec.name in ("gpt2", "gemma2", "llama"))
    and (spec.world, spec.name) != ("bridge", "opt")
]


@pytest.mark.parametrize("spec", FAMILIES, ids=str)
def test_a_stage_of_every_family_sums_to_its_jets_and_has_tangents_by_differences(spec):
    """The sum against Taylor arithmetic, the rest's path against central differences of the model's own sublayer."""
    net = ResidualNetwork(zoo.build(spec))
    trace = net.trace(zoo.tokens(net.view.model, batch=2, pos=5))
    for stage in net.stages[1:3]:
        # Two centers of three: the rest is not zero.
        labels = ["embed", "0_attn_out"]
        paths = reorganized_expansion(net, stage.stream, centers=labels, weights=[0.4, 0.6])(trace)
        plain = jet_expand(net, stage.stream, centers=labels, order=1, weights=[0.4, 0.6])(trace)
        jets = sum(v for label, v in plain.items() if " > " in label)
        found = sum(v for label, v in paths.items() if " > " in label or label.endswith("_bias"))
        assert oracles.relative_error(found, jets) < TOLERANCE
        gammas, h = trace.stage_function(stage), trace[stage.stream]
        centers = [trace[label] for label in labels]
        rest, step = h - sum(centers), 1e-5
        if float(rest.norm()) < 1e-6:
            continue
        with torch.no_grad():
            wanted = sum(
                w * (gammas(x + step * rest) - gammas(x - step * rest)) / (2 * step)
                for w, x in zip((0.4, 0.6), centers, strict=True)
            )
        for index, taken in enumerate(stage.steps):
            # Central differences: the third derivative times step^2.
            assert oracles.relative_error(paths[f"rest > {taken.label}"], wanted[index]) < 1e-6, taken.label


@pytest.mark.parametrize(
    "spec", [s for s in zoo.available(["gpt2", "gemma2", "pythia"]) if s.processing == "raw"], ids=str
)
def test_all_paths_of_a_model_with_padding_hooks_and_heads(spec):
    model = zoo.build(spec)
    tokens, mask = zoo.padded(model)

    def steer(stream: Tensor, hook: Any) -> Tensor:
        return stream + 0.5

    dtype_safe = (spec.world, spec.name) not in {(s.world, s.name) for s in zoo.NAN_UNDER_LEFT_PADDING}
    hooks = [("blocks.0.hook_resid_pre", steer), ("blocks.1.hook_resid_pre", steer)]
    with model.hooks(hooks), full_precision():
        net = ResidualNetwork(model)
        trace = net.trace(tokens, attention_mask=mask) if dtype_safe else net.trace(tokens)
        paths = reorganized_expansion(net, max_centers=512)(trace, positions=[-2, -1])
        for label in ("edit:blocks.1.hook_resid_pre > ln_final", "edit:blocks.0.hook_resid_pre > 0_attn > ln_final"):
            assert label in paths, label
        assert paths.columns == [5, 6]
        whole = reorganized_expansion(net, max_centers=512)(trace)
        assert whole.check().passed and whole.check().sum_error < TOLERANCE
        total = sum(whole.logits(path) for path in whole) + whole.remainder_logits()
        cap = net.decoder.transform or (lambda x: x)
        assert oracles.relative_error(cap(total)[trace.valid], trace.logits[trace.valid]) < 1e-9
        heads = ResidualNetwork(net, "head")
        fine = reorganized_expansion(heads, "0_attn_bias", centers=list(heads.sources))(heads.trace(tokens[:, 2:]))
        assert "embed > L0H1" in fine and not any("> 0_attn_bias" in path for path in fine)
        if spec.name != "gemma2":  # which has no biases
            assert oracles.relative_error(fine["0_attn_bias"], fine.trace["0_attn_bias"]) < TOLERANCE
    table = paths.to_dataframe()
    places = {n - back for n in trace.valid.sum(1).tolist() for back in (1, 2)}  # within each prompt
    assert set(table["pos"]) == places and table["path"].nunique() == len(paths)
    lengths = paths.statistics(by="length")
    assert (
        abs(
            float(lengths.share.sum(0)[lengths.valid].mean())
            - float(paths.statistics().share.sum(0)[lengths.valid].mean())
        )
        < 1e-9
    )


def test_float32_and_inference_mode():
    model = zoo.fresh(zoo.ModelSpec("gpt2", "bridge", "raw"), torch.float32)
    tokens = zoo.tokens(model)
    exact = reorganized_expansion(zoo.build(zoo.ModelSpec("gpt2", "bridge", "raw")), "1_attn")(tokens)
    with torch.inference_mode():
        found = reorganized_expansion(model, "1_attn")(tokens)
    for label in exact:
        assert oracles.relative_error(found[label].double(), exact[label]) < 1e-4, label


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_refused():
    net = network(*({f"{i}_block": tanh_block(20 + i)} for i in range(60)))
    with pytest.raises(ValueError, match=r"at most max_centers = 256 .* here are 1\.15e18"):
        reorganized_expansion(net)
    assert len(reorganized_expansion(net, "2_block")) == 8
    with pytest.raises(ValueError, match="at most max_centers = 1 "):
        reorganized_expansion(net, "1_block", centers=["embed", "0_block_out"], max_centers=1)
    with pytest.raises(ValueError, match="weights without centers must be 'uniform' or 'optimal'"):
        reorganized_expansion(net, "1_block", weights=[1.0])
    exp = reorganized_expansion(net, "1_block")
    with pytest.raises(ValueError, match="Centers may hold one reorganized expansion"):
        reorganized_expansion(net, "2_block", centers=[exp, reorganized_expansion(net, "0_block")])
    with pytest.raises(ValueError, match="positions are chosen where paths are decoded"):
        exp(TOKENS, positions=0)
    small = network({"0_block": tanh_block(20)})
    with pytest.raises(ValueError, match="check needs a whole cache"):
        reorganized_expansion(small)(TOKENS, positions=0).check()
    rough = network({"0_block": lambda x: x / x.norm(dim=-1, keepdim=True)})
    with pytest.raises(ValueError, match="must be finite for a stream of zero"):
        reorganized_expansion(rough, "0_block", centers=["embed"])(TOKENS)
    assert "ReorganizedExpansion(ln_final of callables at 2 centers, 2 paths" in repr(reorganized_expansion(small))
    assert "reorganized order-1 jet paths" in repr(reorganized_expansion(small)(TOKENS))
