r"""Gradients through the readers of a stage, one at a time: its steps, and the queries, keys and values of its heads.

The write of head h is a function of one stream x, which it reads three times: w_h(x) = f_h(x, x, x), with the streams that
queries, keys and values are made of apart. Then

.. math::
    Dw_h = D_q f_h + D_k f_h + D_v f_h .

The queries are those of the whole layer: under a norm after attention (Gemma-2), other heads' queries move the scale of
w_h, too. Attention that reads the stream in another way than through `hook_q`, `hook_k` and `hook_v` is not taken apart: each
of its heads is one reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.protocol import Stage, relative_error
from tl_jets.flows.two_runs import Change, TwoRuns
from tl_jets.interventions.replays import NotReplayedError

INPUTS = ("q", "k", "v")


class StageReaders:
    """The readers of a stage.

    Attributes:
        labels: `3_mlp`, `L3H2`, or `L3H2_q`, `L3H2_k` and `L3H2_v`.
        steps: The places of the steps that read, among all of the stage.
        part_of: For each reader, the index of its step in `steps`.
    """

    def __init__(self, runs: TwoRuns, stage: Stage, change: Change):
        self._runs, self._function = runs, runs.function(stage)
        own = (change.writes - change.edits).abs().flatten(1).amax(1)
        rounding = runs.clean.recording.accuracy * float(runs.clean.writes(stage).abs().max())
        # The constant of attention reads only where a norm after it rescales it.
        self.steps = [i for i, s in enumerate(change.steps) if s.kind != "attn_bias" or float(own[i]) > rounding]
        self._heads = [i for i in self.steps if change.steps[i].kind == "head"]
        self._hooks = [f"blocks.{stage.steps[0].layer}.attn.hook_{name}" for name in INPUTS]
        self._apart = bool(self._heads) and self._can_be_apart(runs.clean[stage.stream])
        self.labels, self.part_of = [], []
        for part, i in enumerate(self.steps):
            label = change.steps[i].label
            labels = [f"{label}_{name}" for name in INPUTS] if self._apart and i in self._heads else [label]
            self.labels += labels
            self.part_of += [part] * len(labels)

    def gradients(
        self,
        points: Float[Tensor, "points_and_batch pos d_model"],
        weights: Sequence[float],
        covectors: Float[Tensor, "cell batch pos d_model"],
    ) -> Float[Tensor, "reader cell batch pos d_model"]:
        """The transposed derivative of every reader, in its weighted sum over stacked points, applied to each covector."""
        try:
            return self._gradients(points, weights, covectors)
        except NotReplayedError:
            apart = zip(points.chunk(len(weights)), weights, strict=True)
            return torch.stack([self._gradients(point, [weight], covectors) for point, weight in apart]).sum(0)

    def _gradients(self, points: Tensor, weights: Sequence[float], covectors: Tensor) -> Tensor:
        with torch.enable_grad():
            points = points.detach().requires_grad_(True)
            value, inputs = self._evaluated(points)
            at_each = torch.cat([weight * covectors for weight in weights], 1)
            found = []
            for i in self.steps:
                apart = self._apart and i in self._heads
                every = [
                    _through(value[i], inputs, points, g) if apart else _all(value[i], [points], g) for g in at_each
                ]
                found += [torch.stack(own) for own in zip(*every, strict=True)]
        return torch.stack(found).unflatten(2, (len(weights), -1)).sum(2)

    def _evaluated(self, point: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The stage's writes at a stream, and its queries, keys and values; without these where hooks do not show them."""
        if not self._heads:
            return self._function(point), []
        with self._grabbed() as grabbed:
            value = self._function(point)
        apart = all(len(own) == 1 and own[0].requires_grad for own in grabbed)
        return value, [own[0] for own in grabbed] if apart else []

    @contextmanager
    def _grabbed(self) -> Iterator[list[list[Tensor]]]:
        """Lists of what passes the hooks of queries, keys and values."""
        view = self._runs.network.view
        found: list[list[Tensor]] = [[] for _ in self._hooks]
        known = [pair for pair in zip(self._hooks, found, strict=True) if view.inner_stage(pair[0]) is not None]
        # Returned, so that what follows is made of it: a bridge's hooks get a view.
        hooks = [(name, lambda value, hook, own=own: own.append(value) or value) for name, own in known]
        with view.hooks(hooks):  # type: ignore[attr-defined]
            yield found

    def _can_be_apart(self, stream: Tensor) -> bool:
        """Whether the heads' derivatives are the sums of those through queries, keys and values: tried on a random covector."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self._function(stream)  # keeps what heads write at a zero stream, so that hooks fire once from here on
        with torch.enable_grad():
            point = stream.detach().requires_grad_(True)
            value, inputs = self._evaluated(point)
            if not inputs:
                return False
            total = value[self._heads].sum(0)
            g = torch.randn(total.shape, generator=generator, dtype=total.dtype, device="cpu").to(total.device)
            g = g.masked_fill(~self._runs.clean.valid[..., None], 0.0)
            whole, apart = _all(total, [point], g)[0], torch.stack(_through(total, inputs, point, g)).sum(0)
        return relative_error(apart, whole) <= 16 * self._runs.clean.recording.accuracy


def _all(value: Tensor, inputs: list[Tensor], covector: Tensor) -> list[Tensor]:
    """Gradients in all inputs of a value's product with a covector."""
    found = torch.autograd.grad(value, inputs, covector, retain_graph=True, allow_unused=True, materialize_grads=True)
    return list(found)


def _through(value: Tensor, inputs: list[Tensor], point: Tensor, covector: Tensor) -> list[Tensor]:
    """Gradients at a point through one input after another."""
    return [_all(own, [point], g)[0] for own, g in zip(inputs, _all(value, inputs, covector), strict=True)]
