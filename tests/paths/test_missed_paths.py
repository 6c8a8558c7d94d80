"""The bound on paths that a list of the largest does not have, against all paths of small models, in float64."""

from __future__ import annotations

import pytest
import torch
import zoo

import tl_jets as tj

SPECS = [spec for spec in zoo.available(["llama", "gpt2"]) if spec.processing == "raw"]


@pytest.mark.parametrize("granularity", ["sublayer", "head"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_is_the_root_of_the_sum_of_squares_of_all_others(spec, granularity):
    model = zoo.build(spec)
    network = tj.ResidualNetwork(model, granularity)
    avoided = {} if granularity == "sublayer" else {"avoiding": ["mlp", "L0H0", "L0H1", "L1H0", "L1H1", "L1H2"]}
    trace, options = network.trace(zoo.tokens(model, batch=1)), {"linearize": "detached", **avoided}
    every = tj.exponential_expansion(network, **options)(trace, positions=-1)
    effects = every.statistics(targets=5).effect[:, 0, 0]
    some = tj.exponential_expansion(network, top=4, rank="effect", targets=5, **options)(trace, positions=-1)
    left = [e for path, e in zip(every.labels, effects, strict=True) if path not in [*some.labels, "ln_final_bias"]]
    wanted = torch.stack(left).square().sum().sqrt()
    n = sum(map(len, some.expansion.graph.stages))
    found = some.missed(sweeps=2**n)
    assert found == pytest.approx(float(wanted), rel=1e-9) and found >= max(map(abs, left))
    # Random signs estimate it without bias: the mean of many comes close.
    squares = torch.tensor([some.missed(sweeps=2**n // 2, seed=seed) ** 2 for seed in range(8)])
    assert float(squares.mean().sqrt()) == pytest.approx(float(wanted), rel=0.5) and float(squares.std()) > 0


@pytest.mark.parametrize("spec", SPECS[:1], ids=str)
def test_what_has_no_such_bound_is_refused(spec):
    model = zoo.build(spec)
    network = tj.ResidualNetwork(model)
    trace = network.trace(zoo.tokens(model, batch=1))
    jets = tj.exponential_expansion(network, max_length=1)(trace, positions=-1)
    short = tj.exponential_expansion(network, linearize="detached", max_length=1)(trace, positions=-1)
    several = tj.exponential_expansion(network, linearize="detached")(trace)
    for cache in (jets, short, several):
        with pytest.raises(ValueError, match="one prompt, position and target"):
            cache.missed()
