"""Our hooks beside others that write in place, as TransformerLens' own patching does: before them and after them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformer_lens.patching as patching
import zoo
from torch import Tensor

from tl_jets import ResidualNetwork
from tl_jets.calculus import full_precision
from tl_jets.interventions.hooks import ablation_hooks, patch_hooks, without_path
from tl_jets.interventions.steering import steering_hooks

SPECS = [spec for spec in zoo.available(["gpt2", "llama"]) if spec.processing == "raw"]
STEPS = ["0_mlp", "1_attn", "L0H2", "L1N5"]
POINTS = ["blocks.0.hook_mlp_out", "blocks.1.hook_attn_out", "blocks.0.attn.hook_z", "blocks.1.mlp.hook_post"]
PARTS = [None, None, 2, slice(5, 6)]


def run(model: Any, tokens: Tensor, hooks: list) -> Tensor:
    with torch.no_grad(), full_precision():
        return model.run_with_hooks(tokens, fwd_hooks=hooks)


def grabbed(model: Any, tokens: Tensor, points: list[str]) -> list[Tensor]:
    found: dict[str, Tensor] = {}
    run(model, tokens, [(name, lambda x, hook, name=name: found.__setitem__(name, x.clone())) for name in points])
    return [found[name] for name in points]


def ramp(x: Tensor) -> Tensor:
    """What no norm takes for its mean."""
    return torch.linspace(-1, 1.5, x.shape[-1]).to(x)


def every_hook(model: Any, other: Tensor) -> dict[str, tuple[list, list[Tensor]]]:
    """Everything that gives out hooks: hooks, and the tensors that it was given."""
    network = ResidualNetwork(model)
    trace = network.trace(other)
    given = torch.randn(*other.shape, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kept = [trace[label] for label in trace.labels]
    with torch.inference_mode():
        unusual = ablation_hooks(model, STEPS, mode="mean", reference=other)
    return {
        "zero": (ablation_hooks(model, STEPS), []),
        "zero block": (ablation_hooks(model, "0_block"), []),
        "mean": (ablation_hooks(network, STEPS, mode="mean", reference=trace), kept),
        "mean, made in inference mode": (unusual, []),
        "resample": (ablation_hooks(network, STEPS, mode="resample", reference=trace), kept),
        "patch of a trace": (patch_hooks(network, STEPS, trace), kept),
        "patch at positions": (patch_hooks(network, STEPS, other, positions=[0, -1]), []),
        "patch of a tensor": (patch_hooks(model, "1_attn", given), [given]),
        "patch of one prompt": (patch_hooks(model, "0_mlp", given[:1]), [given]),
        "without_path": (without_path(model, trace, "embed > 0_mlp > 1_attn"), kept),
        "without_path of a stream": (without_path(model, trace, "embed"), kept),
        "steering a stream": (steering_hooks(network, other[:1], output="1_pre", strength=0.7), kept),
        "steering a write": (steering_hooks(network, other[:1], output="1_mlp_out", strength=1.0, start=1), kept),
    }


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_hooks_return_is_written_to_and_nothing_else_changes(spec):
    """A hook that overwrites in place what ours returned does what one that makes a new tensor does, now and later."""
    model = zoo.build(spec)
    tokens, other = zoo.tokens(model, 2, 4), zoo.tokens(model, 2, 4, seed=5)
    clean = run(model, tokens, [])
    for name, (hooks, given) in every_hook(model, other).items():
        before = [tensor.clone() for tensor in given]
        came: dict[str, tuple] = {}

        def arrive(x: Tensor, hook: Any, came: dict = came) -> None:
            came[hook.name] = (x.shape, x.dtype, x.device, x.stride())

        def overwrite(x: Tensor, hook: Any, came: dict = came, name: str = name) -> None:
            assert (x.shape, x.dtype, x.device, x.stride()) == came[hook.name], (name, hook.name)
            x.mul_(-2).add_(ramp(x))

        points = list(dict.fromkeys(point for point, _ in hooks))
        plain = run(model, tokens, hooks)
        expected = run(model, tokens, [*hooks, *((point, lambda x, hook: x * -2 + ramp(x)) for point in points)])
        assert (plain - clean).abs().max() > 1e-3 and (expected - plain).abs().max() > 1e-3, name
        found = run(model, tokens, [*((p, arrive) for p in points), *hooks, *((p, overwrite) for p in points)])
        assert torch.equal(found, expected), name
        assert torch.equal(run(model, tokens, hooks), plain), name
        assert all(map(torch.equal, given, before)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_of_other_precision_become_the_models(dtype):
    model = zoo.fresh(SPECS[0], torch.float32).to(dtype)
    tokens = zoo.tokens(model, 2, 4)
    given = torch.randn(2, 4, 24, dtype=torch.float64)
    for hooks in (
        ablation_hooks(model, STEPS),
        ablation_hooks(model, STEPS, mode="mean", reference=tokens),
        ablation_hooks(model, STEPS, mode="resample", reference=tokens.flip(0)),
        patch_hooks(model, "1_attn", given),
        patch_hooks(model, "1_attn", given.flip(1).mT.contiguous().mT),
        without_path(model, tokens, "embed > 0_mlp"),
    ):
        for point, function in hooks:
            x = model.run_with_cache(tokens, names_filter=point)[1][point]
            assert x.dtype is dtype
            y, again = function(x), function(x)
            assert (y.shape, y.dtype, y.device, y.stride()) == (x.shape, dtype, x.device, x.stride())
            y.fill_(3)
            assert torch.equal(function(x), again) and not torch.equal(y, again)


def slot(size: int, part: Any) -> Tensor:
    """Which of a third axis's entries a part is."""
    found = torch.full([size], part is None)
    if part is not None:
        found[part] = True
    return found


def edits_by_hand(spec: zoo.ModelSpec, mode: str, other: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The edits of STEPS, written out."""
    model = zoo.build(spec)
    seen = grabbed(model, other, POINTS)
    if mode == "zero":
        seen = [torch.zeros_like(x) for x in seen]
        if spec.name == "gpt2":  # what a head writes for a zero normalized input stays
            ln1 = model.blocks[0].ln1
            bias = ln1.b if spec.world == "hooked" else ln1.bias
            seen[2] = (torch.einsum("d,hde->he", bias, model.W_V[0]) + model.b_V[0]).expand_as(seen[2])
    elif mode == "mean":
        seen = [x.flatten(0, 1).mean(0).expand_as(x) for x in seen]

    def edit(value: Tensor, part: Any) -> Callable[[Tensor], Tensor]:
        here = slot(value.shape[2], part).view(-1, *[1] * (value.ndim - 3))
        return lambda x: torch.where(here, value, x)

    return {point: edit(x, part) for point, x, part in zip(POINTS, seen, PARTS, strict=True)}


MODES = {
    "zero": lambda model, other: ablation_hooks(model, STEPS),
    "mean": lambda model, other: ablation_hooks(model, STEPS, mode="mean", reference=other),
    "resample": lambda model, other: ablation_hooks(model, STEPS, mode="resample", reference=other),
    "patch": lambda model, other: patch_hooks(model, STEPS, other),
}
PATCHES = {
    "hook_mlp_out": patching.get_act_patch_mlp_out,
    "hook_attn_out": patching.get_act_patch_attn_out,
    "hook_resid_pre": patching.get_act_patch_resid_pre,
    "attn.hook_z": patching.get_act_patch_attn_head_out_all_pos,
}


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 7] - logits[:, -1, 9]).sum()


@pytest.mark.parametrize("order", ["ours first", "theirs first"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_transformer_lens_patching_of_an_edited_model(spec, mode, order, monkeypatch):
    model = zoo.build(spec)
    tokens, clean, other = (zoo.tokens(model, 2, 3, seed) for seed in (0, 1, 2))
    other = other if mode != "resample" else other[:1].expand(2, -1)  # whichever prompt is drawn
    hooks = MODES[mode](model, other)
    ours = edits_by_hand(spec, mode, other)
    n_layers, ours_first = len(model.blocks), order == "ours first"
    with full_precision():
        _, cache = model.run_with_cache(clean)
    kept = {name: value.clone() for name, value in cache.items()}
    if not ours_first:
        own = model.run_with_hooks
        monkeypatch.setattr(model, "run_with_hooks", lambda x, fwd_hooks: own(x, fwd_hooks=[*fwd_hooks, *hooks]))
    found = {}
    with torch.no_grad(), full_precision(), model.hooks(fwd_hooks=hooks if ours_first else []):
        for name, patch in PATCHES.items():
            found[name] = patch(model, tokens, cache, metric)
    monkeypatch.undo()
    assert all(torch.equal(cache[name], value) for name, value in kept.items())
    for name, values in found.items():
        heads = name == "attn.hook_z"
        for layer in range(n_layers):
            point = f"blocks.{layer}.{name}"
            value = grabbed(model, clean, [point])[0]
            for index in range(4 if heads else 3):
                here = slot(4, index)[:, None] if heads else slot(3, index)[:, None]
                theirs = lambda x, here=here, value=value: torch.where(here, value, x)  # noqa: E731
                edits = {key: [edit] for key, edit in ours.items()}
                edits[point] = [*edits.get(point, []), theirs] if ours_first else [theirs, *edits.get(point, [])]

                def apply(x: Tensor, hook: Any, key: str, edits: dict = edits) -> Tensor:
                    for edit in edits[key]:
                        x = edit(x)
                    return x

                expected = metric(run(model, tokens, [(key, partial(apply, key=key)) for key in edits]))
                assert float(values[layer, index]) == pytest.approx(float(expected), rel=1e-5, abs=1e-5), (point, index)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out"])
def test_a_trace_does_not_depend_on_whether_hooks_write_in_place(spec, name):
    """One layer's last stream is the next one's first, in the same memory: what was seen before an edit stays."""
    model = zoo.build(spec)
    tokens, network = zoo.tokens(model), ResidualNetwork(model)

    def in_place(x: Tensor, hook: Any) -> Tensor:
        x[:, 2] = 0.5
        return x

    with model.hooks([(name, lambda x, hook: in_place(x.clone(), hook))]):
        expected = network.trace(tokens)
    with model.hooks([(name, in_place)]):
        found = network.trace(tokens)
    assert found.labels == expected.labels and (f"edit:{name}" in found.labels) == ("resid_pre" in name)
    assert all(torch.equal(found[label], expected[label]) for label in found.labels)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_positions_to_patch_count_the_real_tokens_of_the_source(spec):
    """Padded prompts are patched where each prompt alone is."""
    network = ResidualNetwork(zoo.build(spec))
    sources, inputs = ["w3 w4 w5 w8", "w6 w9"], ["w7 w2 w1 w4", "w5 w5"]
    trace = network.trace(sources)
    assert not bool(trace.valid.all())

    def patched(source: Any, prompts: Any) -> tuple[Tensor, Tensor]:
        with network.view.hooks(patch_hooks(network, STEPS, source, positions=[0, -1])):  # type: ignore[attr-defined]
            found = network.trace(prompts)
        return found["final_post"], found.valid

    both, valid = patched(trace, inputs)
    for i, (source, prompt) in enumerate(zip(sources, inputs, strict=True)):
        alone, _ = patched(source, prompt)
        torch.testing.assert_close(both[i][valid[i]], alone[0], rtol=1e-9, atol=1e-9)
        clean = network.trace(prompt)["final_post"]
        assert float((alone - clean)[0, -1].norm()) > 1e-3
    with pytest.raises(
        ValueError, match=r"positions must lie in -3\.\.2, the real tokens of the source's shortest prompt"
    ):
        patch_hooks(network, STEPS, trace, positions=3)
