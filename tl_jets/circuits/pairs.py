r"""A clean and a corrupted input side by side: their traces, the logit difference that is measured, and runs on mixed streams.

A **run** evaluates the steps in order, each on a stream of its own. With w a writer (a source or step), b_w what it writes
under a baseline, and K(r) the writers that reader r gets from the clean run,

.. math::
    h_r = \sum_w b_w + \sum_{w \in K(r)} (x_w - b_w), \qquad x_r = \gamma_r(h_r) .

With all writers in K(r) for all r the run is the clean one; with none, and the corrupted input's writes for b, the corrupted
one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.attribution import additive_logits, directions
from tl_jets.core.model_marks import model_mark
from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.protocol import DECODER_STEP, FINAL_STREAM
from tl_jets.core.results import Result
from tl_jets.core.selection import Rows, TargetInput, read_targets
from tl_jets.core.tokens import token_names
from tl_jets.core.trace import Trace

# Writes by the label of their source or step.
Writes = dict[str, Tensor]
# The stream of a reader, from the writes so far; None for a step that nothing reads.
Streams = Callable[[str, Mapping[str, Tensor]], Tensor | None]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PairResult(Result):
    """Base of results about the difference of two tokens' logits in a clean and a corrupted run.

    Attributes:
        target_ids: The two tokens of each prompt.
        target_names: The targets as requested, or `<clean answer>` and `<corrupted answer>`.
        unit: `"logits"`, or `"logits before the softcap"`.
        token_names: Texts of the ids.
        model: Name of the model and a digest of its weights; None: not known.
    """

    target_ids: Int[Tensor, "batch 2"]
    target_names: list[str | int]
    unit: str
    token_names: dict[int, str]
    model: str | None = None

    @property
    def _difference_name(self) -> str:
        return f"{self.target_names[0]} - {self.target_names[1]}"


@dataclass(frozen=True, eq=False)
class Pair:
    """Traces of a clean and a corrupted input, and the logit difference at one position of each prompt.

    Attributes:
        rows: The position that is read.
        target_ids: The token whose logit counts and the one that is subtracted, [batch, target].
        target_names: As requested, or `<clean answer>` and `<corrupted answer>`.
    """

    clean: Trace
    corrupted: Trace
    rows: Rows
    target_ids: Int[Tensor, "batch 2"]
    target_names: list[str | int]

    @classmethod
    def of(
        cls,
        model: Any,
        clean: Any,
        corrupted: Any,
        targets: TargetInput | None,
        position: int,
        attention_mask: Any = None,
    ) -> Pair:
        """Trace both inputs and read the targets.

        Raises:
            ValueError: Inputs of different shapes or padding, hooks that edit streams, or targets that are not two a prompt.
        """
        network = ResidualNetwork.of(model)
        traces = [
            trace_of(network, text, None if isinstance(text, Trace) else attention_mask) for text in (clean, corrupted)
        ]
        shapes = [list(trace.tokens.shape) for trace in traces]
        if shapes[0] != shapes[1] or not torch.equal(traces[0].valid, traces[1].valid):
            raise ValueError(
                f"Clean and corrupted prompts must have the same tokens to the same positions: one shape [batch, pos] and the same "
                f"padding; got {shapes[0]} and {shapes[1]}, with {traces[0].valid.sum(1).tolist()} and "
                f"{traces[1].valid.sum(1).tolist()} real tokens. Choose prompts of equal length in tokens."
            )
        edits = sorted({label for trace in traces for own in trace.recording.edits.values() for label in own})
        if edits:
            raise ValueError(f"Circuits are of models without hooks that edit streams; got {edits}. Take them off.")
        rows = Rows.of(traces[0], position)
        if not bool(rows.keep.all()):
            raise ValueError(
                f"position must be a real token of every prompt; got {position}. Negative ones count from the end."
            )
        ids, names = read_targets(network, targets, rows)
        if ids is None or names is None:
            ids = torch.stack([additive_logits(trace, rows.index).argmax(-1) for trace in traces], -1)
            names = ["<clean answer>", "<corrupted answer>"]
        if ids.shape[-1] != 2 or bool((ids[..., 0] == ids[..., 1]).any()):
            raise ValueError(
                f"targets must be two different tokens a prompt, whose logits are subtracted, as in targets=[' Mary', ' John']; "
                f"got {ids[:, 0].tolist()}"
                + ("." if targets is not None else ", the model's own answers. Pass targets=.")
            )
        return cls(traces[0], traces[1], rows, ids[:, 0], list(names))

    @property
    def network(self) -> ResidualNetwork:
        """The network of both traces."""
        return self.clean.network  # type: ignore[return-value]

    @property
    def header(self) -> dict[str, Any]:
        """The fields of a `PairResult`."""
        return {
            "target_ids": self.target_ids,
            "target_names": self.target_names,
            "unit": self.clean.decoder.unit,
            "token_names": token_names(self.network.tokenizer, [self.target_ids]),
            "model": model_mark(self.network, self.clean.recording.hook_state),
        }

    def difference(self, final: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " batch"]:
        """The difference of the targets' additive logits that a last stream gives, float64."""
        return self.said(self.clean.decoder.norm(self.rows.at(final))[:, 0]) + self.direction[:, -1]

    def said(self, states: Float[Tensor, "*many batch d_model"]) -> Float[Tensor, "*many batch"]:
        """What inputs of the unembedding add to the difference, float64; its bias adds the last entry of `direction`."""
        return (states.double() * self.direction[:, :-1]).sum(-1)

    @cached_property
    def direction(self) -> Float[Tensor, "batch d_model_and_bias"]:
        """The vector whose product with what the unembedding reads, and 1 for its bias, is the difference; float64."""
        columns = directions(self.clean.decoder, self.target_ids)
        return columns[:, 0] - columns[:, 1]

    def ends(self) -> dict[str, Float[Tensor, " batch"]]:
        """The difference in the `clean` and in the `corrupted` run.

        Raises:
            ValueError: The same on average, so that nothing can be recovered.
        """
        with torch.no_grad():
            clean, corrupted = (self.difference(trace[FINAL_STREAM]) for trace in (self.clean, self.corrupted))
        gap = float((clean - corrupted).mean())
        if abs(gap) <= 1e-5 * max(float(clean.abs().max()), 1e-30):
            raise ValueError(
                f"The clean and the corrupted prompts must differ in what is measured, the logit difference of the targets; it is "
                f"{float(clean.mean()):.4g} in both. Choose other prompts or targets."
            )
        return {"clean": clean, "corrupted": corrupted}


def writes_of(trace: Trace) -> Writes:
    """What every source and step of a trace's network writes, by its label."""
    network = trace.network
    return {label: trace[label] for label in network.sources} | {
        step.label: write
        for stage in network.stages
        for step, write in zip(stage.steps, trace.writes(stage), strict=True)
    }


def readers_of(trace: Trace) -> dict[str, list[str]]:
    """Every reader of a trace's network, `ln_final` last, and the writers before it."""
    found, before = {}, list(trace.network.sources)
    for stage in trace.network.stages:
        found |= {step.label: list(before) for step in stage.steps if step.kind != "attn_bias"}
        before += [step.label for step in stage.steps]
    return found | {DECODER_STEP: before}


def run(trace: Trace, streams: Streams) -> Writes:
    """The writes of a run in which every step reads a stream of its own, and the stream of `ln_final` under its label.

    Steps whose stream is None are left out; steps of a stage with the same stream (the same object) are evaluated together.
    """
    network = trace.network
    live: Writes = {label: trace[label] for label in network.sources}
    for stage in network.stages:
        function, found, written = trace.stage_function(stage), {}, {}
        for index, step in enumerate(stage.steps):
            stream = trace[stage.stream] if step.kind == "attn_bias" else streams(step.label, live)
            if stream is not None:
                if id(stream) not in found:
                    found[id(stream)] = stream, function(stream)
                written[step.label] = found[id(stream)][1][index]
        live |= written
    final = streams(DECODER_STEP, live)
    assert final is not None
    return live | {DECODER_STEP: final}


def mean_of(trace: Trace, like: Trace) -> Writes:
    """Each write's mean over the real positions of a trace, in the shape of another's."""
    writes = writes_of(trace)
    return {label: writes[label][trace.valid].mean(0).expand_as(own) for label, own in writes_of(like).items()}
