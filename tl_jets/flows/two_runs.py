"""Two runs of a model on inputs of one shape: clean, and under an intervention.

With h a stream, w a write and gamma a stage's function in the clean run, the intervened run has h + dh and w + dw. What
the intervention itself writes at a stage, its **edit**, is what the stage's own function does not explain:

    dw = gamma(h + dh) - gamma(h) + edit.

An ablation or patch of a write is an edit of its stage, steering an edit of a stream, another prompt a change of the
sources.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.adapters.callables import CallableModel
from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.protocol import FINAL_STREAM, Stage, Step, relative_error
from tl_jets.core.trace import Trace
from tl_jets.interventions.replays import NotReplayedError, clean_error, hooked_stream, is_hooked, replayed, stack_size

Hooks = list[tuple[Any, Callable[..., Any]]]


@dataclass(frozen=True, eq=False)
class Change:
    """What changed at a stage: the writes' changes, and the part that the intervention itself wrote."""

    steps: tuple[Step, ...]
    writes: Float[Tensor, "write batch pos d_model"]
    edits: Float[Tensor, "write batch pos d_model"]


class TwoRuns:
    """A clean run of `network`, whose granularity says what the components are, and the same under an intervention.

    Attributes:
        network: The network of the components.
        base: The network whose stages are stepped through: without heads and neurons.
        clean, other: The traces on `base`; `other` must not be replayed, for its hooks are off.
        hooks: The hooks of the intervention; empty for another input.
    """

    def __init__(self, network: ResidualNetwork, clean: Trace, intervention: Any):
        self.network = network
        self.base = _base(network)
        self.clean = clean.on(self.base)
        hooks = read_hooks(intervention)
        self.hooks = hooks or []
        self.other = trace_of(network, intervention).on(self.base) if hooks is None else self.run(hooks)
        alike = self.other.tokens.shape == clean.tokens.shape
        differs = (self.other.valid != clean.valid).any() if alike else clean.valid.any()
        differs, *error = torch.stack([differs.double(), *(self._error() if self.hooks else [])]).tolist()
        if differs:
            raise ValueError(
                f"Both runs must have the same numbers of prompts and tokens, and the same padding; got "
                f"{self.other.valid.sum(1).tolist()} tokens by prompt, and {clean.valid.sum(1).tolist()} in the clean run. "
                f"Choose prompts that have the same number of tokens."
            )
        if error and not error[0] <= self.other.recording.accuracy:
            raise ValueError(
                f"An intervention must do the same in every forward pass; two passes under these hooks differ by {error[0]:.1e} "
                f"(relative). Seed what they draw, and let them keep nothing from earlier passes."
            )

    def _error(self) -> list[Tensor]:
        """How far another pass under the hooks is from the intervened run after the last hooked block, relative to it."""
        blocks = [_block_of(name) for name, _ in self.hooks]
        last = self.base.n_layers - 1 if None in blocks else max(block for block in blocks if block is not None)
        stream = FINAL_STREAM if last == self.base.n_layers - 1 else f"{last + 1}_pre"
        with torch.no_grad():
            second = hooked_stream(self.clean, self.hooks, last)
        return [clean_error(self.other, second, self.other[stream]).double().to(self.clean.valid.device)]

    def run(self, hooks: Hooks, tokens_of: Trace | None = None) -> Trace:
        """A trace of the clean input (or of another trace's) under some hooks."""
        of = self.clean if tokens_of is None else tokens_of
        with self.base.view.hooks(hooks) if hooks else nullcontext():  # type: ignore[attr-defined]
            trace = self.network.trace(of.tokens, attention_mask=of.recording.memo.get("attention_mask"))
        return trace.on(self.base)

    def stream(self, label: str) -> tuple[Tensor, Tensor]:
        """A clean stream and its change [batch, pos, d_model]; padding does not change."""
        return self.clean[label], self._real(self.other[label] - self.clean[label])

    def sources(self) -> dict[str, Tensor]:
        """Changes of the sources, by label, without those that are the same."""
        found = {label: self._real(self.other[label] - self.clean[label]) for label in self.base.sources}
        return {label: change for label, change in found.items() if bool(change.any())}

    def stream_edits(self, stream: str) -> dict[str, Tensor]:
        """Changes of what hooks add to a stream, by label."""
        before, after = self.clean.edits(stream), self.other.edits(stream)
        zero = torch.zeros_like(self.clean[stream])
        found = {
            name: self._real(after.get(name, zero) - before.get(name, zero))
            for name in dict.fromkeys([*before, *after])
        }
        return {label: change for label, change in found.items() if bool(change.any())}

    @torch.no_grad()
    def change(self, stage: Stage) -> Change:
        """The change of a stage of `base`, by component of `network`."""
        before, after = self.clean.writes(stage), self.other.writes(stage)
        may_edit, fine = self._may_edit(stage), self._fine(stage)
        if fine.steps == stage.steps:
            own = self.clean.stage_function(stage)(self.other[stage.stream]) if may_edit else after
            return Change(stage.steps, self._real(after - before), self._real(after - own))
        clean, other = self._by_component
        if not may_edit:
            both = all(("z", stage.steps[0].layer) in run.recording.memo for run in (clean, other))
            at_clean, at_other = (_components(run, fine, of_changes=both) for run in (clean, other))
            return Change(fine.steps, self._real(at_other - at_clean), torch.zeros_like(at_clean))
        at_clean, at_other = _components(clean, fine), self.function(stage)(self.other[stage.stream])
        edits = self._divided(stage, fine, at_other, after)
        return Change(fine.steps, self._real(at_other + edits - at_clean), self._real(edits))

    @property
    def together(self) -> int:
        """How many streams of the clean run a stage takes along the batch axis."""
        is_single = is_hooked(self.clean) or isinstance(self.base.view, CallableModel)
        return 1 if is_single else stack_size(self.clean)

    def stacked(self, stage: Stage) -> Callable[[Tensor], Tensor]:
        """A stage's writes as a function of `together` streams of the clean run along the batch axis, or fewer."""
        function, one = self.clean.stage_function(stage), len(self.clean.tokens)

        def of_many(streams: Tensor) -> Tensor:
            if len(streams) > one:
                with suppress(NotReplayedError):
                    return replayed(self.clean, stage, streams)
            return torch.cat([function(stream) for stream in streams.split(one)], 1)

        return of_many

    @cached_property
    def _by_component(self) -> tuple[Trace, Trace]:
        """Both runs on `network`; of the intervened one, the stages that its hooks do not edit."""
        unhooked = replace(self.other.recording, hook_state=self.clean.recording.hook_state)
        return self.clean.on(self.network), Trace(self.network, unhooked)

    def _may_edit(self, stage: Stage) -> bool:
        """Whether the intervention may write at a stage itself: not if all its hooks are known to be in other blocks."""
        if not self.hooks:
            return self.other.recording.logits is None  # values of a cache may be rounded
        return any(_block_of(name) in (None, stage.steps[0].layer) for name, _ in self.hooks)

    def function(self, stage: Stage) -> Callable[[Tensor], Tensor]:
        """A stage of `base` as a function of its stream in the clean run, by component of `network`.

        Or of several streams along the batch axis; NotReplayedError if it does not take them.
        """
        fine = self._fine(stage)
        trace, own = (self.clean, stage) if fine.steps == stage.steps else (self.clean.on(self.network), fine)
        function = trace.stage_function(own)
        return lambda streams: function(streams) if len(streams) == len(trace.tokens) else replayed(trace, own, streams)

    def _fine(self, stage: Stage) -> Stage:
        """The stage of `network` that reads the same stream."""
        return next((s for s in self.network.stages if s.stream == stage.stream), stage)

    def _divided(self, stage: Stage, fine: Stage, at_other: Tensor, after: Tensor) -> Tensor:
        """The edits of heads or neurons: their own if hooks edit them, else on the last part of the edited sublayer."""
        edits = torch.zeros_like(at_other)
        parts = [[i for i, part in enumerate(fine.steps) if _sublayer(part) == step.label] for step in stage.steps]
        own = torch.stack([at_other[of_step].sum(0) for of_step in parts])
        if not relative_error(own[:, self.clean.valid], after[:, self.clean.valid]) > self.clean.recording.accuracy:
            return edits
        if self.hooks:
            try:
                with self.base.view.hooks(self.hooks):  # type: ignore[attr-defined]
                    # On the clean recording: heads are counted from what they write, without hooks, at a zero stream.
                    found = self.network.view.writes(self.clean.recording, fine, self.other[stage.stream])
                edits = found - at_other
            except NotImplementedError:  # the hooks edit the sum of heads, or what their neurons write
                pass
        for of_step, write in zip(parts, after, strict=True):
            edits[of_step[-1]] += write - (at_other + edits)[of_step].sum(0)
        return edits

    def _real(self, change: Tensor) -> Tensor:
        """A change [..., batch, pos, d_model] without padding."""
        return change.masked_fill(~self.clean.valid[..., None], 0.0)


def _components(trace: Trace, stage: Stage, *, of_changes: bool = False) -> Float[Tensor, "write batch pos d_model"]:
    """The writes of a stage (`of_changes`: but for constants); those of heads are read off the forward pass where it kept them."""
    cells = torch.ones_like(trace.valid).nonzero().T
    heads = trace.network.view.recorded_writes(trace.recording, stage, *cells, of_changes=of_changes) or {}
    known = {label: write.unflatten(0, trace.valid.shape) for label, write in heads.items()}
    known |= {label: write for label, write in trace.recording.writes.items() if label not in known}
    if not all(step.write in known for step in stage.steps):
        return trace.writes(stage)
    return torch.stack([known[step.write] for step in stage.steps])


def read_hooks(intervention: Any) -> Hooks | None:
    """The hooks of an intervention, or None if it is an input: `[(hook_name, function)]` or one such pair."""
    pairs = [intervention] if _is_hook(intervention) else intervention
    if isinstance(pairs, Sequence) and not isinstance(pairs, str) and len(pairs) and all(_is_hook(p) for p in pairs):
        return list(pairs)
    if isinstance(pairs, (list, tuple)) and (not len(pairs) or any(_is_hook(p) for p in pairs)):
        raise ValueError(
            f"An intervention is a list of TransformerLens hooks, [(hook_name, function)], or another input of the model; got "
            f"{intervention!r}."
        )
    return None


def _is_hook(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and callable(value[1])


def _block_of(name: Any) -> int | None:
    """The block that a hook's name belongs to, or None."""
    found = re.match(r"blocks\.(\d+)\.", name) if isinstance(name, str) else None
    return int(found[1]) if found else None


def _base(network: ResidualNetwork) -> ResidualNetwork:
    """The network without heads and neurons."""
    if network.granularity == "block":
        return network
    return ResidualNetwork(network, "sublayer")


def _sublayer(step: Step) -> str:
    """The label of the sublayer that a head, neuron or constant belongs to."""
    if step.is_feature:
        return step.label.rsplit("_", 1)[0]
    kind = {"head": "attn", "attn_bias": "attn", "neuron": "mlp", "mlp_rest": "mlp", "mlp_bias": "mlp"}.get(step.kind)
    return step.label if kind is None else f"{step.layer}_{kind}"
