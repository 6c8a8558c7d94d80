"""Activations of one forward pass, and each component as a function of the residual stream, checked on first use."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.calculus.modes import refuse_autocast
from tl_jets.core.decoder import Decoder
from tl_jets.core.labels import LabelInput
from tl_jets.core.protocol import DECODER_STEP, FINAL_STREAM, UNCHECKED, Recording, Stage, relative_error, some
from tl_jets.core.structure import Structure
from tl_jets.core.trace_values import FINAL_SCALE, TraceValues, final_scale

# Number of tokens at which logits are compared, after a first comparison of all.
PART_OF_VOCABULARY = 2**12
# Numbers the traces, which take one such part after the other.
_CHECKS = count()


class Trace:
    """Activations of one forward pass, and each component as a function of the residual stream.

    Index it by label: streams (`trace["3_pre"]`), writes (`trace["3_mlp_out"]`, `trace["L3H2_out"]`), sources
    (`trace["embed"]`) and edits, or by TransformerLens' names (`trace["mlp_out", 3]`); values have shape [batch, pos,
    d_model]. Writes of neurons (`trace["L3N17_out"]`), MLP biases (`trace["3_mlp_bias"]`) and TransformerLens' names of what
    is inside a block (`trace["z", 0]`, `trace["pattern", 3]`, `trace["blocks.0.mlp.hook_post"]`, `trace["q0"]`) or
    `trace["ln_final.hook_scale"]` are not in `labels`, and evaluated on request, at the cost of the layer.

    Attributes:
        network: The residual network.
        tokens: The input [batch, pos].
        valid: Real tokens, True, and padding, False [batch, pos].
        logits: The model's own output [batch, pos, d_vocab], or None if only a cache was given.
        memo: Values computed on this input: writes, jets, the frozen network.
        evaluated: Values of expansions on this input, kept while the expansions live.
    """

    def __init__(self, network: Structure, recording: Recording):
        self.network = network
        self.recording = recording
        self.tokens = recording.tokens
        self.valid = recording.valid
        self.logits = recording.logits
        self.memo: dict[Hashable, Any] = {}
        self.evaluated: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"Trace({self.network!r}, tokens {list(self.tokens.shape)}, {len(self.labels)} labels)"

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label that the trace can be indexed with."""
        record = self.recording
        recorded = (record.sources, record.streams, record.writes, *record.edits.values())
        return tuple(dict.fromkeys([*self.network.labels, *(label for table in recorded for label in table)]))

    def __contains__(self, label: object) -> bool:
        return (isinstance(label, str) and label in self.labels) or label in self.network or self._is_inside(label)

    def __iter__(self) -> Iterator[str]:
        return iter(self.labels)

    def __getitem__(self, label: LabelInput) -> Float[Tensor, "batch second *rest"]:
        if label == FINAL_SCALE and (scale := final_scale(self)) is not None:
            return scale
        inner = self.network.view.inner_stage(label)
        if inner is not None:
            hook, stage = inner
            self.on(self.network.at("sublayer")).stage_function(stage)  # checks the replay
            return self.network.view.inner(self.recording, hook, stage, self[stage.stream])
        record, label = self.recording, self.network.label(label)
        for table in (record.sources, record.streams, record.writes, *record.edits.values()):
            if label in table:
                return table[label]
        for stage in self.network.stages:
            for index, step in enumerate(stage.steps):
                if step.write == label:
                    return self.writes(stage)[index]
        part = self._fine_stage(label)
        if part is not None:
            return self.writes(part)[0]
        raise ValueError(f"A label must be one of {some(self.labels, near=label)}, or a neuron's write; got {label!r}.")

    def _is_inside(self, label: Any) -> bool:
        """Whether TransformerLens has a hook inside a block by this name that can be read."""
        try:
            return self.network.view.inner_stage(label) is not None
        except NotImplementedError:
            return False

    def _fine_stage(self, label: str) -> Stage | None:
        """The stage of the single neuron or MLP bias whose write has this label, or None."""
        step = self.network.view.fine_step(label)
        return None if step is None or step.write != label else self.network.part(step)

    def writes(self, stage: Stage) -> Float[Tensor, "write batch pos d_model"]:
        """The stage's writes at its true stream, stacked in the order of `stage.steps`."""
        key = ("writes", stage)
        if key not in self.memo:
            recorded = self.recording.writes
            if all(step.write in recorded for step in stage.steps):
                self.memo[key] = torch.stack([recorded[step.write] for step in stage.steps])
            elif len(stage.steps) == 1 and not stage.is_part:
                self.memo[key] = self._total_write(stage)[None]
            else:
                with torch.no_grad():
                    self.memo[key] = self.stage_function(stage)(self[stage.stream])
        return self.memo[key]

    def components_at(
        self, labels: Sequence[str], batch: Int[Tensor, " row"], pos: Int[Tensor, " row"]
    ) -> Float[Tensor, "label row d_model"]:
        """Values at some cells of the padded rows; heads are read off the forward pass, without all positions of all heads."""
        found: dict[str, Tensor] = {}
        for stage in self.network.stages:
            wanted = any(step.kind == "head" and step.write in labels for step in stage.steps)
            if wanted and ("writes", stage) not in self.memo:
                self.check_model(stage.steps[0].layer)
                found |= self.network.view.recorded_writes(self.recording, stage, batch, pos) or {}
        return torch.stack([found[label] if label in found else self[label][batch, pos] for label in labels])

    def _total_write(self, stage: Stage) -> Tensor:
        """The sum of a stage's writes."""
        following = self.network.next_stream(stage)
        return self[following] - self[stage.stream] - sum(self.edits(following).values())

    def edits(self, stream: str) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """What the user's hooks added to a stream, by `edit:<hook>`."""
        return self.recording.edits.get(stream, {})

    @property
    def decoder(self) -> Decoder:
        """Final norm and unembedding of the traced model; raises ValueError once their weights have changed."""
        return self.network.decoder_at(self.recording.hook_state)

    def check_model(self, layer: int | None = None) -> None:
        """Check that the model, or one layer of it, is still the one that was traced.

        Raises:
            ValueError: Hooks or weights have changed, modules are in training mode, or `torch.autocast` is active.
        """
        refuse_autocast(self.network.decoder.W_U.device)
        now, then = self.network.view.hook_state(layer), self.recording.hook_state
        if now == (then if layer is None else then[layer + 1 : layer + 2]):
            return
        raise ValueError(
            "A trace must be evaluated under the hooks under which it was made, with the same weights; the hooks on the "
            "model have changed since (another thread's count, too), or its weights. Evaluate inside the same "
            "`with model.hooks(...)` block, or trace again."
        )

    def freeze(self) -> TraceValues:
        """The values of all labels as plain tensors, which can be saved and need no model; index the trace for others.

        Raises:
            ValueError: The model has changed since the trace.

        Cost: a copy of the activations; below sublayers, all writes of every layer.
        """
        return TraceValues.of(self)

    def __sub__(self, other: Trace | TraceValues) -> TraceValues:
        """This run's values less another's of the same shape and padding (`tl_jets.core.trace_values`)."""
        return self.freeze() - other

    def on(self, network: Structure) -> Trace:
        """The same run as a trace on another network (e.g. granularity) of the model; ValueError for another model."""
        if not self.network.shares_model(network):
            raise ValueError("A trace must be of the same model and dictionaries; this one is of others. Trace again.")
        return Trace(network, self.recording)

    def stage_function(self, stage: Stage) -> Callable[[Tensor], Tensor]:
        """The stage's gammas as one function: [batch, pos, d_model] -> [write, batch, pos, d_model].

        Raises:
            ValueError: The model has changed since the trace (`check_model`), a stream has another shape, or, at first
                use, the writes at the true stream are not the model's.
        """
        record, network = self.recording, self.network
        self.check_model(stage.steps[0].layer)
        _check_writes(self, stage)
        shape = self[stage.stream].shape

        def gammas(stream: Tensor) -> Tensor:
            if stream.shape != shape:
                raise ValueError(
                    f"A gamma of this trace takes a stream of shape {tuple(shape)} (its attention mask and positions "
                    f"belong to this input); got {tuple(stream.shape)}. Trace the other input, too."
                )
            return network.view.writes(record, stage, stream)

        return gammas

    def gamma(self, step: LabelInput) -> Callable[[Tensor], Tensor]:
        """One step's write as a function of its stream: [batch, pos, d_model] -> [batch, pos, d_model]."""
        step = self.network.label(step)
        if step == DECODER_STEP:
            return self.decoder.norm
        fine = self.network.view.fine_step(step)
        stage = self.network.stage(step) if fine is None else self.network.part(fine)
        index = next((i for i, own in enumerate(stage.steps) if step in (own.label, own.write)), None)
        if index is None:
            labels = some(own.label for own in stage.steps)
            raise ValueError(f"A step is one of {labels} in this stage; got {step!r}.")
        function = self.stage_function(stage)
        return lambda stream: function(stream)[index]


def _check_writes(trace: Trace, stage: Stage) -> None:
    """Compare replayed writes with the model's, once per network, weights, stage, hooks and cache."""
    network, record = trace.network, trace.recording
    if stage.is_part:  # the view has its own check of neurons
        whole = network.at("sublayer")
        return _check_writes(Trace(whole, record), whole.stage(stage.stream))
    key = (stage, record.hook_state)
    recorded = record.writes
    checked = record.memo.setdefault("checked", set()) if record.logits is None else network.checks
    if key in checked:
        return
    with torch.no_grad():
        replayed = network.view.writes(record, stage, trace[stage.stream])
        wanted = trace._total_write(stage)
        scale = max(float(trace[stage.stream][record.valid].abs().max()), float(wanted[record.valid].abs().max()))
        error = float((replayed.sum(0) - wanted)[record.valid].abs().max()) / max(scale, 1e-30)
        for index, step in enumerate(stage.steps):
            if step.write in recorded:
                own = recorded[step.write][record.valid]
                error = max(error, relative_error(replayed[index][record.valid], own))
    if not error <= record.accuracy:
        names = ", ".join(step.label for step in stage.steps[:3])
        raise ValueError(
            f"Replaying a step at the model's own stream must give the model's own write; {names} is off by "
            f"{error:.1e} (relative). This architecture or a hook on it is not understood, so no jets are computed. "
            f"Please report it with the model's name."
        )
    checked.add(key)


def check_run(trace: Trace) -> None:
    """Check a run: its streams, as its view asks, and that the decoder reproduces the model's logits; by one read of a device."""
    sizes, check = trace.recording.memo.pop(UNCHECKED, ([], lambda read: None))
    error = _decoder_error(trace)
    every = [*sizes, *([] if error is None else [error.to(sizes[0].device) if sizes else error])]
    read = torch.stack([size.double() for size in every]).tolist() if every else []
    check(read[: len(sizes)])
    for error in read[len(sizes) :]:
        _check_decoder(trace, error)


def _decoder_error(trace: Trace) -> Tensor | None:
    """Relative error of the decoder at some positions; None without logits.

    The first check per network, weights and hooks takes the whole vocabulary, later ones the next part.
    """
    network, record = trace.network, trace.recording
    if record.logits is None:
        return None
    key, decoder = (DECODER_STEP, record.hook_state), network.decoder
    with torch.no_grad():
        # Four real tokens, from the first to the last, without waiting for a device to count them.
        order = (~record.valid).flatten().long().argsort(stable=True)
        parts = torch.linspace(0, 1, min(4, len(order)), device=order.device)
        cells = order[(parts * (record.valid.sum() - 1)).long()]
        states, wanted = trace[FINAL_STREAM].flatten(0, 1)[cells], record.logits.flatten(0, 1)[cells]
        size = wanted.abs().max()
        if key in network.checks and decoder.d_vocab > PART_OF_VOCABULARY:
            start = next(_CHECKS) * PART_OF_VOCABULARY % (decoder.d_vocab - PART_OF_VOCABULARY)
            part = slice(start, start + PART_OF_VOCABULARY)
            decoder, wanted = replace(decoder, W_U=decoder.W_U[:, part], b_U=decoder.b_U[part]), wanted[:, part]
        logits = decoder.logits(decoder.norm(states))
        if decoder.transform is not None:
            logits = decoder.transform(logits)
        difference = (logits.to(wanted.dtype) - wanted).abs().max()
        return difference / size.clamp_min(torch.finfo(wanted.dtype).tiny)


def _check_decoder(trace: Trace, error: float) -> None:
    """Raise ValueError for a decoder that does not reproduce the logits."""
    network, record = trace.network, trace.recording
    if not error <= 16 * record.accuracy:
        raise ValueError(
            f"The final norm, unembedding and output transform must reproduce the model's logits from its last "
            f"stream; they are off by {error:.1e} (relative). Either a hook edits ln_final or the unembedding (jets "
            f"of an edited decoder are not supported: remove it), or weights were changed since the ResidualNetwork was "
            f"built (build it again), or this architecture's decoder is not understood."
        )
    network.checks.add((DECODER_STEP, record.hook_state))
