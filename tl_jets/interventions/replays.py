"""Runs of one input under many interventions: stacked along the batch axis, from the first edited stage on.

Before its first edited stage a run is the clean one, whose stream the trace holds. From there the model's own modules are
called again, as for every gamma (`tl_jets.adapters.base`), on the streams of all runs at once; a run joins the stack at
its own first stage. The clean run goes along, and must arrive at the streams of the trace. Otherwise, and where a stage
cannot be replayed or the user has hooks on the model, runs are hooked forward passes, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.adapters.callables import CallableModel
from tl_jets.core.protocol import FINAL_STREAM, Stage
from tl_jets.core.selection import Rows
from tl_jets.core.trace import Trace
from tl_jets.interventions.places import Hooks

# Number of tokens that are replayed together.
STACKED_TOKENS = 2**11
# Number of logits that are computed together.
STACKED_LOGITS = 2**24


class NotReplayedError(Exception):
    """A stack of runs is not what forward passes would give."""


def first_stage(trace: Trace, hooks: Hooks) -> int:
    """Index of the first sublayer stage at which the hooks of an ablation act."""
    places = {(int(name.split(".")[1]), "attn" if "attn" in name else "mlp") for name, _ in hooks}
    found = [
        index
        for index, stage in enumerate(trace.network.view.stages("sublayer"))
        if any(step.layer == layer and step.kind in (kind, "block") for step in stage.steps for layer, kind in places)
    ]
    return min(found)


def is_hooked(trace: Trace) -> bool:
    """Whether the trace is of a model with hooks of the user."""
    return any(hooks for hooks, _ in trace.recording.hook_state)


def can_replay(trace: Trace, start: int) -> bool:
    """Whether all stages from `start` on can be replayed, and the user has no hooks on the model."""
    view: Any = trace.network.view
    return not is_hooked(trace) and not any(
        view.cannot(step) for stage in view.stages("sublayer")[start:] for step in stage.steps
    )


def stack_size(trace: Trace) -> int:
    """How many runs of the trace's input are stacked."""
    return max(1, STACKED_TOKENS // max(1, trace.tokens.numel()))


def last_streams(trace: Trace, runs: Sequence[Hooks]) -> Iterator[Float[Tensor, "run batch pos d_model"]]:
    """The last streams of runs in the order of `first_stage`, by stacks; by hooked passes where these are not possible."""
    size, is_stacked = stack_size(trace), can_replay(trace, first_stage(trace, runs[0]))
    network: Any = trace.network
    mask = trace.recording.memo.get("attention_mask")
    for start in range(0, len(runs), size):
        stack = runs[start : start + size]
        try:
            if is_stacked:
                yield final_streams(trace, stack, check=start == 0)
                continue
        except NotReplayedError:
            is_stacked = False
        for hooks in stack:
            with network.view.hooks(hooks):
                yield network.trace(trace.tokens, attention_mask=mask)[FINAL_STREAM][None]


def hooked_stream(trace: Trace, hooks: Hooks, layer: int = -1) -> Float[Tensor, "batch pos d_model"]:
    """The stream after a block (the last) in one hooked pass, through which derivatives and Taylor series go."""
    view: Any = trace.network.view
    found: list[Tensor] = []
    name = f"blocks.{layer % trace.network.n_layers}.hook_resid_post"
    mask = trace.recording.memo.get("attention_mask")
    with view.precision():
        view.run_until(name, trace.tokens, [*hooks, (name, lambda stream, hook: found.append(stream))], mask)
    return found[-1].to(trace[FINAL_STREAM])


def final_streams(
    trace: Trace, runs: Sequence[Hooks], *, check: bool = False
) -> Float[Tensor, "run batch pos d_model"]:
    """The last streams of runs under their hooks, given in the order of `first_stage`.

    Raises NotReplayedError if a hook never fires, a stage does not take the stack, or, with `check`, the clean run does
    not arrive at the streams of the trace.
    """
    view, batch = trace.network.view, len(trace.tokens)
    stages = view.stages("sublayer")
    streams = [*(trace[stage.stream] for stage in stages), trace[FINAL_STREAM]]
    starts, every = [first_stage(trace, hooks) for hooks in runs], list(runs)
    if check:
        starts, every = [starts[0], *starts], [[], *every]
    fired: set[str] = set()
    errors: list[Tensor] = []
    hooks = _stacked(every, batch, fired)
    stream = streams[0][:0]
    with view.hooks(hooks):  # type: ignore[attr-defined]
        for index in range(starts[0], len(stages)):
            stream = torch.cat([stream, *[streams[index]] * starts.count(index)])
            stream = stream + replayed(trace, stages[index], stream).sum(0)
            if check:
                errors.append(clean_error(trace, stream[:batch], streams[index + 1]))
    check_clean(trace, errors)
    if fired != {name for name, _ in hooks}:
        raise NotReplayedError
    return stream.unflatten(0, (len(every), batch))[int(check) :]


def replayed(
    trace: Trace, stage: Stage, streams: Float[Tensor, "runs_and_batch pos d_model"]
) -> Float[Tensor, "write runs_and_batch pos d_model"]:
    """The stage's writes at the streams of several runs; raises NotReplayedError if it does not take a stack."""
    view: Any = trace.network.view
    count = len(streams) // len(trace.tokens)
    try:
        return view.writes(view.repeated(trace.recording, count, stage.steps[0].layer), stage, streams)
    except (RuntimeError, ValueError) as error:  # such as a shape that depends on the batch
        if count == 1:
            raise
        raise NotReplayedError from error


def changes_without(
    trace: Trace, stage: Stage, removed: Float[Tensor, "many batch pos d_model"]
) -> Float[Tensor, "many write batch pos d_model"]:
    """What the stage's writes lose without each of some parts of their stream: gamma(h) - gamma(h - part)."""
    gammas, true, writes = trace.stage_function(stage), trace[stage.stream], trace.writes(stage)
    if not is_hooked(trace) and not isinstance(trace.network.view, CallableModel):
        with suppress(NotReplayedError):
            size = max(1, stack_size(trace) // len(stage.steps))
            return torch.cat([_stacked_changes(trace, stage, writes, chunk) for chunk in removed.split(size)])
    clean = gammas(true)
    return torch.stack([clean - gammas(true - part) for part in removed])


def _stacked_changes(trace: Trace, stage: Stage, true: Tensor, removed: Tensor) -> Tensor:
    stream = trace[stage.stream]
    streams = torch.cat([stream[None], stream - removed])
    writes = replayed(trace, stage, streams.flatten(0, 1)).unflatten(1, streams.shape[:2])
    check_clean(trace, [clean_error(trace, writes[:, 0].sum(0), true.sum(0))])
    return (writes[:, :1] - writes[:, 1:]).transpose(0, 1)


def clean_error(trace: Trace, found: Tensor, true: Tensor) -> Tensor:
    """Relative error of a stack's clean run [batch, pos, d_model] at real tokens, on its device."""
    padding = ~trace.valid[..., None]
    error, size = ((x.masked_fill(padding, 0)).abs().max() for x in (found - true, true))
    return error / size.clamp_min(torch.finfo(true.dtype).tiny)


def check_clean(trace: Trace, errors: Sequence[Tensor]) -> None:
    """Raise NotReplayedError unless a stack's clean run is the trace's, by one read of all errors."""
    if errors and not bool((torch.stack(list(errors)) <= trace.recording.accuracy).all()):
        raise NotReplayedError


def _stacked(runs: Sequence[Hooks], batch: int, fired: set[str]) -> Hooks:
    """Hooks of a stack, each run's on its own rows; the names of those that fire are collected."""
    by_point: dict[str, list[tuple[int, Callable[..., Tensor]]]] = {}
    for index, hooks in enumerate(runs):
        for name, edit in hooks:
            by_point.setdefault(name, []).append((index, edit))

    def edit_rows(write: Tensor, hook: Any = None, *, name: str) -> Tensor:
        fired.add(name)
        rows = list(write.split(batch))
        for index, edit in by_point[name]:
            rows[index] = edit(rows[index], hook)
        return torch.cat(rows)

    return [(name, partial(edit_rows, name=name)) for name in by_point]


def logits_of(trace: Trace, finals: Float[Tensor, "run batch pos d_model"], rows: Rows) -> Iterator[Tensor]:
    """Additive logits [batch, out_pos, d_vocab] of each last stream at some positions, in float64."""
    decoder = trace.decoder
    size = max(1, STACKED_LOGITS // (rows.index.numel() * decoder.d_vocab))
    for chunk in finals.split(size):
        yield from decoder.logits(decoder.norm(rows.at(chunk, 1))).double()
