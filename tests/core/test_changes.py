"""A kept network on a model that changes: what it gives is that of a network made anew, or it is refused."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

import tl_jets as tj
from tl_jets.core import changes

SPECS = [spec for spec in zoo.available(["gpt2", "gemma2"]) if spec.processing == "raw"]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise(weight: Tensor) -> Tensor:
    return weight.detach() * (1 + 0.3 * normal(*weight.shape, seed=weight.numel()).to(weight))


# Ways to change a weight


def by_data(model: Any, module: Any, name: str) -> None:
    getattr(module, name).data = noise(getattr(module, name))


def inside_data(model: Any, module: Any, name: str) -> None:
    getattr(module, name).data.mul_(noise(torch.ones_like(getattr(module, name))))


def one_column(model: Any, module: Any, name: str) -> None:
    getattr(module, name).data[..., 3] *= -2


def one_row(model: Any, module: Any, name: str) -> None:
    getattr(module, name).data[3] *= -2


def new_parameter(model: Any, module: Any, name: str) -> None:
    setattr(module, name, torch.nn.Parameter(noise(getattr(module, name))))


def in_inference_mode(model: Any, module: Any, name: str) -> None:
    with torch.inference_mode():
        getattr(module, name).copy_(noise(getattr(module, name)))


def loaded(model: Any, module: Any, name: str) -> None:
    module.load_state_dict({**module.state_dict(), name: noise(getattr(module, name))})


WAYS: dict[str, Callable[[Any, Any, str], None]] = {
    "w.data = ...": by_data,
    "w.data.mul_": inside_data,
    "a column of w.data": one_column,
    "a row of w.data": one_row,
    "nn.Parameter": new_parameter,
    "inference mode": in_inference_mode,
    "load_state_dict": loaded,
}


def weights_of(model: Any) -> dict[str, tuple[Any, str]]:
    """Modules and names of the unembedding, the last norm, a norm after a sublayer (or before one) and an MLP's output."""

    def owner(module: Any) -> tuple[Any, str]:
        found = [
            (part, name) for part in module.modules() for name, weight in part._parameters.items() if weight is not None
        ]
        return next((part, name) for part, name in found if not name.lower().startswith("b"))

    def output(mlp: Any) -> tuple[Any, str]:
        return (mlp, "W_out") if "W_out" in mlp._parameters else owner(mlp.out)

    block = model.blocks[1]
    norms = [name for name in ("ln1_post", "ln1") if name in block._modules]
    return {
        "W_U": owner(model.unembed),
        "ln_final": owner(model.ln_final),
        norms[0]: owner(block._modules[norms[0]]),
        "W_out": output(block.mlp),
    }


def readings(net: Any, tokens: Tensor) -> dict[str, Tensor]:
    network = tj.ResidualNetwork.of(net)
    lens = tj.iterative_jet_lens(network, tokens, top_k=1)
    measures = {name: value for name, value in lens.measures.items() if name != "top1_agreement"}
    return measures | {"head": network.at("head").trace(tokens)["L1H1_out"]}


def more_readings(net: Any, tokens: Tensor) -> dict[str, Tensor]:
    return {
        "weights": tj.joint_jet_lens(net, tokens, granularity="block").weights,
        "jacobian": tj.detached_jacobian(net, tokens[:1]).contributions,
        "bigrams": tj.jet_bigrams(net, "mlps", top_k=30, progress=False).scores,
    }


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_kept_network_follows_a_weight_whatever_way_it_changes(spec, way):
    model = zoo.fresh(spec).requires_grad_(False)
    kept, tokens = tj.ResidualNetwork(model), zoo.tokens(model)[:1]
    before = readings(kept, tokens)
    for name, (module, weight) in weights_of(model).items():
        trace = kept.trace(tokens)
        kept_lens = tj.joint_jet_lens(kept, trace) if way is by_data else None
        if way is one_row and getattr(module, weight).ndim == 1:
            continue
        way(model, module, weight)
        with pytest.raises(ValueError, match="or its weights"):
            tj.iterative_jet_lens(kept, trace)
        if name == "W_out":
            with pytest.raises(ValueError, match="or its weights"):
                trace.gamma("1_mlp")
            trace.gamma("0_mlp")
        if name in ("W_U", "ln_final"):
            readers = [lambda made=trace: made.decoder] + ([kept_lens.center_top_tokens] if kept_lens else [])
            for read in readers:
                with pytest.raises(ValueError, match="have changed since"):
                    read()
        found = readings(kept, tokens)
        assert_same(found, readings(tj.ResidualNetwork(model), tokens))
        assert (found["kl"] - before["kl"]).abs().max() > 1e-6, name
        before = found
    if way is by_data:
        assert_same(more_readings(kept, tokens), more_readings(model, tokens))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_kept_network_follows_another_precision(spec):
    model = zoo.fresh(spec)
    kept, tokens = tj.ResidualNetwork(model), zoo.tokens(model)[:1]
    readings(kept, tokens)
    model.to(torch.float32)
    found = readings(kept, tokens)
    assert found["head"].dtype == torch.float32
    assert_same(found, readings(tj.ResidualNetwork(model), tokens))


@pytest.mark.parametrize("shape", [(7,), (5, 3), (3, 5), (6, 6), (4, 6), (1, 9), (9, 1), (2, 3, 4), (4, 2, 6), ()])
def test_entries_that_are_compared_meet_every_row_and_column(shape):
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    seen = changes._some_entries(numbers)
    columns = shape[-1] if len(shape) > 1 else 1
    assert set((seen // columns).tolist()) == set((numbers // columns).flatten().tolist())
    assert set((seen % columns).tolist()) == set((numbers % columns).flatten().tolist())
    if len(shape) == 2:
        assert len(changes._some_entries(numbers.T)) == len(seen)


def test_a_metric_of_a_decoder_alone_follows_data():
    decoder = tj.Decoder(tj.Norm("none"), normal(6, 23, seed=1), normal(23, seed=2))
    decoder.metric(True)
    decoder.W_U.data[:, 5] = 3
    decoder.b_U.data[5] = 3
    wanted = tj.Decoder(decoder.norm, decoder.W_U.clone(), decoder.b_U.clone())
    assert torch.equal(decoder.metric(True).gram, wanted.metric(True).gram)


def test_every_trace_is_compared_with_the_models_own_logits():
    """What no weight tells of: here a hook after the unembedding."""
    model = zoo.fresh(SPECS[-1])
    kept, tokens = tj.ResidualNetwork(model), zoo.tokens(model)
    kept.trace(tokens)
    hook = model.unembed.register_forward_hook(lambda module, args, out: 1.01 * out)
    with pytest.raises(ValueError, match="must reproduce the model's logits"):
        kept.trace(tokens)
    hook.remove()
    kept.trace(tokens)


def test_later_traces_are_compared_over_a_part_of_the_vocabulary(monkeypatch):
    monkeypatch.setattr("tl_jets.core.trace.PART_OF_VOCABULARY", 8)
    net = tj.ResidualNetwork(zoo.build(SPECS[0]))
    tokens = zoo.tokens(net.view.model)  # type: ignore[attr-defined]
    net.trace(tokens)
    net.trace(tokens)
    record = net.view.record

    def other(*args: Any) -> Any:
        found = record(*args)
        found.logits = 1.001 * found.logits
        return found

    monkeypatch.setattr(net.view, "record", other)
    with pytest.raises(ValueError, match="must reproduce the model's logits"):
        net.trace(tokens)


# Hooks of PyTorch


def hooked(model: Any, module: Any) -> Callable[[], None]:
    return module.register_forward_hook(lambda module, args, out: out).remove


def prehooked(model: Any, module: Any) -> Callable[[], None]:
    return module.register_forward_pre_hook(lambda module, args: None).remove


def globally(model: Any, module: Any) -> Callable[[], None]:
    return torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: None).remove


def parametrized(model: Any, module: Any) -> Callable[[], None]:
    class Twice(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    owner, name = next((part, n) for part in module.modules() for n, w in part._parameters.items() if w is not None)
    torch.nn.utils.parametrize.register_parametrization(owner, name, Twice().eval())
    return lambda: torch.nn.utils.parametrize.remove_parametrizations(owner, name, leave_parametrized=False)


@pytest.mark.parametrize("put", [hooked, prehooked, globally, parametrized])
@pytest.mark.parametrize("spec", SPECS[:1] + SPECS[-1:], ids=str)
def test_hooks_of_pytorch_are_noticed(spec, put):
    model = zoo.fresh(spec)
    net, tokens = tj.ResidualNetwork(model), zoo.tokens(model)
    trace = net.trace(tokens)
    take_away = put(model, model.blocks[1].mlp)
    for read in (lambda: tj.path_sums(net, trace), lambda: trace.gamma("1_mlp")):
        with pytest.raises(ValueError, match="under the hooks under which it was made"):
            read()
    if put is not globally:
        trace.gamma("0_mlp")
    found, wanted = (n.trace(tokens)["1_mlp_out"] for n in (net, tj.ResidualNetwork(model)))
    assert torch.equal(found, wanted)
    if put is parametrized:
        assert (found - trace["1_mlp_out"]).abs().max() > 1e-3
    take_away()
    if put is not parametrized:  # other parameters
        trace.gamma("1_mlp")
    assert torch.equal(net.trace(tokens)["1_mlp_out"], trace["1_mlp_out"])


# Precision


def test_autocast_is_refused():
    model = zoo.build(SPECS[0])
    net, tokens = tj.ResidualNetwork(model), zoo.tokens(model)
    trace, lens = net.trace(tokens), tj.joint_jet_lens(net, tokens)
    calls: list[Callable[[], Any]] = [
        lambda: net.trace(tokens),
        lambda: tj.iterative_jet_lens(net, trace),
        lambda: trace.gamma("1_mlp"),
        lambda: lens.center_top_tokens(),
        lambda: tj.jet_bigrams(net, "mlps", top_k=3, progress=False),
        lambda: net.decoder.logits(trace["final_post"]),
        lambda: tj.calculus.jet(torch.sin, torch.ones(2), torch.ones(2), order=1),
        lambda: tj.detached(model).__enter__(),
    ]
    for call in calls:
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(ValueError, match=r"torch\.autocast is active on cpu"),
        ):
            call()
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
            call()


# Threads


@pytest.mark.parametrize("spec", SPECS[:1] + SPECS[-1:], ids=str)
def test_threads_that_share_a_model_wait_for_each_other(spec):
    model = zoo.fresh(spec)
    wanted, errors, found = {}, [], []
    inputs = [torch.tensor([[i, 5, 7 + i, 2]]) for i in range(4)]
    wanted = [readings(model, tokens) for tokens in inputs]

    def work(tokens: Tensor, index: int) -> None:
        try:
            for _ in range(2):
                found.append((index, readings(model, tokens)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(tokens, i)) for i, tokens in enumerate(inputs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(found) == 8
    for index, values in found:
        assert_same(values, wanted[index])


# Training mode


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_modules_in_training_mode_are_refused_by_name(spec):
    model = zoo.fresh(spec)
    net, tokens = tj.ResidualNetwork(model), zoo.tokens(model)
    trace = net.trace(tokens)
    model.blocks[1].mlp.train()
    for read in (
        lambda: net.trace(tokens),
        lambda: trace.gamma("1_mlp"),
        lambda: tj.iterative_jet_lens(net, trace),
        lambda: tj.ResidualNetwork(model),
        lambda: tj.detached(model).__enter__(),
    ):
        with pytest.raises(ValueError, match=r"blocks\.1\.mlp' in it is training"):
            read()
    trace.gamma("0_mlp")
    model.blocks[1].mlp.eval()
    tj.iterative_jet_lens(net, trace)
    model.train()
    with pytest.raises(ValueError, match="it is training"):
        net.trace(tokens)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_kept_of_a_model_does_not_keep_it_alive(spec):
    model = zoo.fresh(spec)
    tokens = zoo.tokens(model)
    tj.iterative_jet_lens(model, tokens, order=1)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_bare_model_costs_what_a_kept_network_costs(spec, monkeypatch):
    """The metric of the unembedding, the norms and the comparisons with the model are those of the first call."""
    model = zoo.fresh(spec)
    tokens, centers = zoo.tokens(model), ["embed", "0_attn_out"]
    tj.jet_expand(model, "0_mlp" if spec.name == "gpt2" else "1_mlp", centers=centers[:1], order=1)(tokens)
    counted: list[str] = []
    writes = type(tj.ResidualNetwork(model).view).writes

    def count(self: Any, recording: Any, stage: Any, stream: Any) -> Tensor:
        counted.append(stage.stream)
        return writes(self, recording, stage, stream)

    monkeypatch.setattr(type(tj.ResidualNetwork(model).view), "writes", count)

    def evaluations(given: Any) -> int:
        counted.clear()
        tj.jet_expand(given, "1_mlp", centers=["embed"], order=1)(tokens)
        return len(counted)

    network = tj.ResidualNetwork(model)
    evaluations(network)
    assert evaluations(model) == evaluations(network)
    if tj.ResidualNetwork(model).decoder.transform is None:
        metric = tj.ResidualNetwork(model).decoder.metric(centered=True)
        assert tj.ResidualNetwork(model).decoder.metric(centered=True) is metric
