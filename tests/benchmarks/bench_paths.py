"""Detached paths of stories260K (10 sublayers, 1,024 paths, 21 tokens, float64): all together against one by one.

Run with `pytest tests/benchmarks/bench_paths.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import zoo

from tl_jets import ResidualNetwork, Trace
from tl_jets.core.frozen_network import FrozenNetwork
from tl_jets.paths.expansion import exponential_expansion
from tl_jets.paths.statistics import path_lengths

pytestmark = pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")
PROMPT = "Once upon a time, there was a little girl named Lily. She loved to play"


@functools.cache
def trace() -> Trace:
    network = ResidualNetwork(zoo.load_stories("bridge", torch.float64))
    network.decoder.metric(centered=True)
    return network.trace(PROMPT)


@functools.cache
def expansion() -> Any:
    return exponential_expansion(trace().network, linearize="detached", sources="embed")


def all_paths() -> Any:
    """Every path, freezing included: a trace without memory."""
    return expansion()(Trace(trace().network, trace().recording))


@torch.no_grad()
def one_by_one() -> None:
    """Every path alone through its own writes; freezing left out."""
    network = trace().network
    frozen = FrozenNetwork.of(trace())
    place = {step.label: i for i, stage in enumerate(network.stages) for step in stage.steps}
    positions = list(range(trace().tokens.shape[1]))
    for path in expansion():
        value = trace()["embed"][None]
        for step in path.steps[:-1]:
            value = frozen.writes(place[step], value)[0]
        frozen.decode(value, positions)


def test_all_paths_per_path_against_one_by_one(ratio):
    assert len(all_paths()) == 1024
    ratio(all_paths, one_by_one, 0.2, rounds=5)


def test_path_lengths_against_all_paths(ratio):
    ratio(lambda: path_lengths(trace().network, Trace(trace().network, trace().recording)), all_paths, 1.0, rounds=5)
