r"""A bound on the effects of paths that a list of the largest lacks: the root of the sum of their squares.

Give every step a of the frozen network a random sign e_a, and carry the target's functional u back through
I + sum_a e_a A_a in place of I + sum_a A_a. The product with a source x is the sum over its paths c of
effect_c times the product of the signs on c. Two different paths differ in a step, whose sign has mean 0, so that

.. math::
    \mathbb{E}\Big[\big(\textstyle\sum_c e_c\, \mathrm{effect}_c\big)^2\Big] = \sum_c \mathrm{effect}_c^2 .

Less the squares of the paths that are known, this is the sum of squares of all others, and its root is at least the
largest of them. The mean over all signs is exact; over some random ones it is an estimate without bias.

It is loose, for the others are many: on SmolLM2-135M ("The Eiffel Tower is in the city of", last position) 11 to 17 by 32
random patterns, beside 20 paths found with effects of 0.13 to 0.72. It says that the list is no sum of the model, and not
that a larger path was missed. A bound on single paths by norms of the stages is above 10^28 there.

Cost: a backward sweep through the frozen stages for every pattern of signs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tl_jets.core.attribution import LogitAttribution
from tl_jets.core.frozen_network import FrozenNetwork
from tl_jets.core.selection import Rows, TargetInput
from tl_jets.core.trace import Trace
from tl_jets.paths.graph import PathGraph

# Patterns of signs that go through the stages together.
TOGETHER = 16


@torch.no_grad()
def sum_of_squares(
    trace: Trace, graph: PathGraph, rows: Rows, targets: TargetInput | None, signs: Iterator[Any], count: int
) -> float:
    """The mean over `count` patterns of signs: the sum of squared effects of all paths, estimated.

    Args:
        trace: One prompt.
        graph: The paths, without conditions and limits of length.
        rows: One position.
        targets: One token; None for the model's own best.
        signs: For each pattern, +1 or -1 by step, in the order of the network.
        count: Number of patterns.
    """
    frozen = FrozenNetwork.of(trace)
    final = LogitAttribution.of(trace, rows, targets).functionals("effect").to(frozen.final_scale)
    last = frozen.decode_transpose(final, rows).flatten(0, 1)
    total = 0.0
    for start in range(0, count, TOGETHER):
        drawn = [next(signs) for _ in range(min(TOGETHER, count - start))]
        total += float(_squares(frozen, graph, last, torch.tensor(drawn, dtype=last.dtype, device=last.device)).sum())
    return total / count


def patterns(n_steps: int, sweeps: int, seed: int) -> tuple[Iterator[Any], int]:
    """Patterns of signs and their number: all, if there are no more than `sweeps`, else random ones."""
    if n_steps < 63 and 2**n_steps <= sweeps:
        return itertools.product([1, -1], repeat=n_steps), 2**n_steps
    draw = torch.Generator().manual_seed(seed)
    drawn = 2 * torch.randint(0, 2, (sweeps, n_steps), generator=draw, device="cpu") - 1
    return iter(drawn.tolist()), sweeps


def _squares(frozen: FrozenNetwork, graph: PathGraph, last: Tensor, signs: Tensor) -> Tensor:
    """Sum over sources of the squared product with each pattern's functional [pattern]."""
    g, place = last.repeat(len(signs), 1, 1, 1), signs.shape[1]
    starts: dict[int, list[str]] = {}
    for source in graph.sources:
        starts.setdefault(source.start, []).append(source.label)
    found = torch.zeros(len(signs), dtype=torch.float64, device=last.device)
    for index in reversed(range(len(frozen.stages) + 1)):
        if index < len(frozen.stages):
            stage, steps = frozen.stages[index], graph.stages[index]
            here = g
            for step in reversed(stage.stage.steps):
                if step.label in steps:
                    place -= 1
                    only = [own.label == step.label for own in stage.stage.steps]
                    g = g + signs[:, place, None, None, None] * stage.pulled_back(here, only)
        for label in starts.get(index, ()):
            if label in frozen.sources:
                found += (g * frozen.sources[label]).flatten(1).double().sum(1).square()
    return found
