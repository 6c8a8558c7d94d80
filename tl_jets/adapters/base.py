"""Common base of the HookedTransformer and TransformerBridge views: recording, connecting, replaying.

A gamma is evaluated by *replay*: the model's own submodules are called on another stream with the arguments (masks,
rotary tables) of the recorded forward pass, so all hooks inside them fire. If a model is spread over several devices,
all results are on the device of `W_U`; a replay runs on the device of its block.

Streams, writes and edits of a recorded pass must add up. A stream that differs from the sum of what was written to it is
an edit, `edit:<hook>`, if a user's hook is on it (`hook_resid_pre`, `hook_resid_mid`, `hook_resid_post`), and belongs to
no gamma; otherwise the architecture writes to the stream in a way that is not understood, and is refused.

A ready cache is read in place of a forward pass. As streams of another input would also add up, the model runs up to its
first attention's write: the first stream (tokens and positions) and this write (mask) must equal the cache's at real
tokens. A step of a later layer is compared with the cache when it is evaluated elsewhere (`tl_jets.core.trace`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tl_jets.adapters.activations import inner_activation, inner_stage
from tl_jets.adapters.blocks import Blocks, Sublayer, saver, under_lock
from tl_jets.adapters.factors import factors
from tl_jets.adapters.inputs import read_input, read_text
from tl_jets.adapters.parts import head_writes, keep_heads, neuron_step, neuron_writes, recorded_heads, z_name
from tl_jets.adapters.reading import working_dtype
from tl_jets.core.factors import Factors
from tl_jets.core.labels import LabelInput
from tl_jets.core.protocol import FINAL_STREAM, UNCHECKED, Granularity, Recording, Stage, Step, some, tolerance


class TransformerLensView(Blocks):
    """A TransformerLens model as a residual network (implements `tl_jets.core.protocol.ModelView`)."""

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return self.model.tokenizer

    def forget_replay(self, layer: int) -> None:
        """Clean up the model's modules after a replay."""

    def stages(self, granularity: Granularity) -> tuple[Stage, ...]:
        """The stages of the model at a granularity."""
        stages = []
        for layer in range(self.n_layers):
            pre, mid = f"{layer}_pre", f"{layer}_mid"
            if granularity == "block" or layer in self.opaque:
                stages.append(Stage(pre, (Step(f"{layer}_block", layer, "block"),)))
                continue
            attn = (Step(f"{layer}_attn", layer, "attn"),)
            if granularity == "head":
                heads = tuple(Step(f"L{layer}H{h}", layer, "head", h) for h in range(self.cfg.n_heads))
                attn = (*heads, Step(f"{layer}_attn_bias", layer, "attn_bias"))
            mlp = (Step(f"{layer}_mlp", layer, "mlp"),) if self.has_mlp(layer) else ()
            if not mlp or self.is_parallel(layer):
                stages.append(Stage(pre, attn + mlp))
            else:
                stages += [Stage(pre, attn), Stage(mid, mlp)]
        return tuple(stages)

    def fine_step(self, label: str) -> Step | None:
        """The neuron (`L3N17`) or MLP bias (`3_mlp_bias`) that a label or write label names, or None."""
        return neuron_step(self, label)

    def inner_stage(self, label: LabelInput) -> tuple[str, Stage] | None:
        """The hook inside a block that a name of TransformerLens means, and the attention or MLP around it; or None."""
        return inner_stage(self, label)

    def inner(self, recording: Recording, hook: str, stage: Stage, stream: Tensor) -> Tensor:
        """The activation at a hook, with its stage evaluated at a stream."""
        return inner_activation(self, recording, hook, stage, stream)

    def fills_cache(self, tokens: Tensor) -> bool:
        """Whether attention fills a key-value cache passed to it."""
        return True

    def tokenize(self, text: Any, prepend_bos: bool | None) -> tuple[Tensor, Tensor]:
        """Token ids of text, padded on the right, and a mask of real tokens [batch, pos]."""
        return read_text(self.model, text, prepend_bos)

    @under_lock
    def record(self, text_or_tokens: Any, attention_mask: Tensor | None, cache: Any, heads: bool = False) -> Recording:
        """One forward pass (or a ready cache) as streams, writes, edits and sources that add up; `heads` keeps their values."""
        state = self.follow()
        tokens, valid, attention_mask = read_input(self.model, text_or_tokens, attention_mask)
        hooked = {name for name in self.stream_names if self.hook_dict[name].fwd_hooks}
        calls, logits = None, None
        if cache is None:
            of_heads = [name for name in map(z_name, range(self.n_layers)) if heads and name in self.hook_dict]
            saved, calls, logits = self.forward(tokens, attention_mask, also=of_heads)
            accuracy = tolerance(self.dtype)
        else:
            saved, accuracy = read_cache(self, cache, tokens, attention_mask, valid)
        tokens, valid = tokens.to(self.device), valid.to(self.device)
        recording = Recording(
            tokens, valid, {}, {}, {}, logits=logits, hook_state=state, calls=calls, accuracy=accuracy
        )
        recording.memo["attention_mask"] = attention_mask
        connect(self, recording, saved, hooked)
        keep_heads(self, recording, saved)
        return recording

    def embed(self, tokens: Tensor) -> Tensor:
        """The `embed` source of single tokens: [token] -> [token, d_model]."""
        saved: dict[str, Tensor] = {}
        first = "blocks.0.hook_resid_pre"
        names = [name for name in ("hook_embed", "hook_pos_embed", first) if name in self.hook_dict]
        with torch.no_grad(), self.precision():
            self.run_until(first, tokens.unsqueeze(1), [saver(saved, name, copies=True) for name in names])
        saved = {name: value.to(self.device, self.dtype) for name, value in saved.items()}
        return self.read_sources(saved, saved[first], False)["embed"][:, 0]

    def writes(self, recording: Recording, stage: Stage, stream: Tensor) -> Tensor:
        """The stage's writes at any stream, in the order of its steps; refuses steps that cannot be replayed."""
        self.refuse(*stage.steps)
        calls = self.calls_of(recording)
        layer = stage.steps[0].layer
        kinds = {step.kind for step in stage.steps}
        own, stream = stream.device, _moved(stream, self.device_of(layer))
        with self.replaying(layer):
            if kinds == {"block"}:
                return _moved(self._block(recording, calls, layer, stream)[None], own)
            parts = []
            if "head" in kinds:
                parts += [head_writes(self, recording, calls, layer, stream)]
            if "attn" in kinds:
                parts += [self.finish_attn(layer, self.call_attn(calls, layer, stream))[None]]
            if "mlp" in kinds:
                parts += [self.call_mlp(calls, layer, stream)[None]]
            if kinds & {"neuron", "mlp_bias"}:
                parts += [neuron_writes(self, recording, calls, stage, stream)]
            return _moved(torch.cat(parts) if len(parts) > 1 else parts[0], own)

    def factors(self, recording: Recording, stage: Stage, stream: Tensor) -> list[Factors] | None:
        """A stage's steps as products of matrices, frozen at one prompt's stream; None where one is not understood."""
        layer, own = stage.steps[0].layer, stream.device
        if len(stream) > 1 or any(step.kind not in ("attn", "mlp") or self.cannot(step) for step in stage.steps):
            return None
        calls, stream = self.calls_of(recording), _moved(stream, self.device_of(layer))
        try:
            with torch.inference_mode(False), self.replaying(layer):
                kinds: list[Sublayer] = ["attn" if step.kind == "attn" else "mlp" for step in stage.steps]
                found = [factors(self, calls, layer, kind, stream) for kind in kinds]
        except (ValueError, NotImplementedError):  # a norm or an MLP that cannot be read
            return None
        moved = [Factors(*(_moved(x, own) for x in (f.first, f.middle, f.last))) for f in found if f is not None]
        return moved if len(moved) == len(found) else None

    def recorded_writes(
        self, recording: Recording, stage: Stage, batch: Tensor, pos: Tensor, *, of_changes: bool = False
    ) -> dict[str, Tensor] | None:
        """The writes of a stage's heads in the recorded pass at some cells, by label; None if they must be replayed.

        `of_changes`: heads may keep constants, which cancel in the difference of two runs.
        """
        layer = stage.steps[0].layer
        if ("z", layer) not in recording.memo or not any(step.kind == "head" for step in stage.steps):
            return None
        self.refuse(*stage.steps)
        with torch.no_grad(), self.replaying(layer):
            found = recorded_heads(self, recording, recording.calls, layer, batch, pos, of_changes)
        labels = [step.write for step in stage.steps if step.kind in ("head", "attn_bias")]
        return None if found is None else dict(zip(labels, found, strict=True))

    @contextmanager
    def replaying(self, layer: int) -> Iterator[None]:
        """Context for replays of a block: sets the precision, and cleans up the modules afterwards."""
        with self.kept.lock:
            try:
                with self.precision():
                    yield
            finally:
                self.forget_replay(layer)

    def repeated(self, recording: Recording, count: int, layer: int) -> Recording:
        """The recording for replays of one block on `count` streams stacked along the batch axis."""
        if count == 1:
            return recording
        batch = len(recording.tokens)

        def repeat(value: Any) -> Any:
            is_batched = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch > 1
            return value.repeat(count, *[1] * (value.ndim - 1)) if is_batched else value

        def of_block(values: Any) -> dict[Any, Any]:
            keys = [key for key in values if key == layer or (isinstance(key, tuple) and layer in key)]
            return {key: tree_map(repeat, values[key]) for key in keys}

        return replace(recording, calls=of_block(self.calls_of(recording)), memo=of_block(recording.memo))

    def calls_of(self, recording: Recording) -> Any:
        """Call arguments of the recorded forward pass; recorded on first use if the trace came from a cache."""
        if recording.calls is None:
            _, recording.calls, _ = self.forward(recording.tokens, recording.memo["attention_mask"])
        return recording.calls

    def _block(self, recording: Recording, calls: Any, layer: int, stream: Tensor) -> Tensor:
        write = self.finish_attn(layer, self.call_attn(calls, layer, stream))
        if self.has_mlp(layer):
            middle = stream
            if not self.is_parallel(layer):
                middle = stream + write
                for edit in recording.edits.get(f"{layer}_mid", {}).values():
                    middle, write = middle + edit.to(stream.device), write + edit.to(stream.device)
            write = write + self.call_mlp(calls, layer, middle)
        return write


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; returned as is if already there, to preserve Taylor tensors and wrappers."""
    return tensor if tensor.device == device else tensor.to(device)


def connect(view: Blocks, recording: Recording, saved: dict[str, Tensor], hooked: set[str]) -> None:
    """Fill in sources, streams, writes and edits from activations by hook name; `hooked` are those with user hooks."""
    missing = [name for name in view.block_names() if name not in saved]
    if missing:
        raise NotImplementedError(
            f"Streams and writes must pass their hooks; in {view.name} nothing passed {missing[:3]} ({len(missing)} in all). "
            f"Its blocks do something else, so it is refused."
        )
    saved = {
        name: value.to(view.device, view.dtype if value.is_floating_point() else value.dtype)
        for name, value in saved.items()
    }
    sums = Sums(recording, hooked, view.hook_dict)
    name = "blocks.0.hook_resid_pre"
    first = saved[name]
    recording.sources.update(view.read_sources(saved, first, name in hooked))
    sources = list(recording.sources.values())
    total = sources[0] if len(sources) == 1 else sum(sources, torch.zeros_like(first))
    sums.arrive("0_pre", total, first, name)
    for layer in range(view.n_layers):
        expected = _pass_block(view, sums, saved, layer)
        post = saved[f"blocks.{layer}.hook_resid_post"]
        is_last = layer == view.n_layers - 1
        following = FINAL_STREAM if is_last else f"{layer + 1}_pre"
        sums.arrive(following, expected, post, f"blocks.{layer}.hook_resid_post")
        if is_last:
            recording.streams[FINAL_STREAM] = post
        else:
            name = f"blocks.{layer + 1}.hook_resid_pre"
            sums.arrive(following, post, saved[name], name)
    recording.memo[UNCHECKED] = sums.sizes, sums.check


def _pass_block(view: Blocks, sums: Sums, saved: dict[str, Tensor], layer: int) -> Tensor:
    """Fill in the streams and writes of a block; returns its first stream plus all that it writes."""
    block, recording, hooked = f"blocks.{layer}.hook_", sums.recording, sums.hooked
    stream = recording.streams[f"{layer}_pre"] = saved[block + "resid_pre"]
    if layer in view.opaque:
        if block + "resid_post" in hooked:
            raise ValueError(
                f"An edit of a stream must be told from what the block wrote; block {layer} of {view.name} is one write, and a "
                f"hook is on {block}resid_post. Put it on hook_resid_pre of the next block, or take it off."
            )
        recording.writes[f"{layer}_block_out"] = saved[block + "resid_post"] - stream
        return saved[block + "resid_post"]
    recording.writes[f"{layer}_attn_out"] = saved[block + "attn_out"]
    expected = stream + saved[block + "attn_out"]
    if not view.has_mlp(layer):
        return expected
    recording.writes[f"{layer}_mlp_out"] = saved[block + "mlp_out"]
    if not view.is_parallel(layer):
        if view.edits_mid() or block + "resid_mid" not in hooked:
            mid = saved[block + "resid_mid"]
            sums.arrive(f"{layer}_mid", expected, mid, block + "resid_mid")
            expected = mid
        recording.streams[f"{layer}_mid"] = expected
    return expected + saved[block + "mlp_out"]


class Sums:
    """Streams against the sums of what was written to them; compared on their device, and read with the trace's own check."""

    def __init__(self, recording: Recording, hooked: set[str], points: dict[str, Any]) -> None:
        self.recording, self.hooked, self.points = recording, hooked, points
        # Without a mask, all tokens are real.
        is_masked = recording.memo["attention_mask"] is not None
        self.padding = ~recording.valid[..., None] if is_masked else None
        self.arrivals: list[tuple[str, str]] = []
        self.sizes: list[Tensor] = []

    def arrive(self, stream: str, expected: Tensor, found: Tensor, hook: str) -> None:
        """Note how far a stream is from what is expected; by a user's `hook`, that is an edit."""
        difference = None if found is expected and hook not in self.hooked else found - expected
        if hook in self.hooked and difference is not None:
            self.recording.edits.setdefault(stream, {})[f"edit:{hook}"] = difference
        size = self._largest(found)
        self.arrivals.append((stream, hook))
        self.sizes += [size, torch.zeros_like(size) if difference is None else self._largest(difference)]

    def _largest(self, values: Tensor) -> Tensor:
        """Largest absolute value at real tokens; NaN and infinity survive."""
        values = values.detach() if self.padding is None else values.detach().masked_fill(self.padding, 0)
        smallest, largest = torch.aminmax(values)  # half the time of abs().max()
        return torch.maximum(-smallest, largest)

    def check(self, read: list[float]) -> None:
        """Raise ValueError for the first stream that is not finite, or not the sum of what was written to it; from `sizes`."""
        sizes = iter(read)
        for (stream, hook), size, difference in zip(self.arrivals, sizes, sizes, strict=True):
            if not math.isfinite(size):
                raise ValueError(
                    f"Every stream must be finite; {stream} holds NaN or infinity. Look at the model's weights, its "
                    f"precision (float16 overflows), and the hooks on it."
                )
            error = difference / max(size, 1e-30)
            if hook not in self.hooked and not error <= self.recording.accuracy:
                raise ValueError(
                    f"A stream must be the sum of what was written to it; {stream} differs by {error:.1e} (relative) "
                    f"and no hook on {hook} explains it. {self._remedy(hook)}"
                )

    def _remedy(self, hook: str) -> str:
        """What to do about a stream that is not the sum of what was written to it: a hook may have changed it in place."""
        block = hook.rsplit(".", 1)[0]
        inner = [name for name, point in self.points.items() if point.fwd_hooks and name.startswith(block)]
        if not inner:
            return "This architecture writes to the stream in a way that is not understood, so it is refused."
        return (
            f"A hook on {some(inner)} may change what it is given in place, which is the stream itself where a sublayer reads "
            f"it: return a new tensor (x * 0.5, not x.mul_(0.5)), so that the sublayer alone reads it, or edit the stream at "
            f"hook_resid_pre or hook_resid_post."
        )


FIRST_STREAM = "blocks.0.hook_resid_pre"


def read_cache(
    view: Blocks, cache: Any, tokens: Tensor, attention_mask: Tensor | None, valid: Tensor
) -> tuple[dict[str, Tensor], float]:
    """A cache's activations by hook name, and their allowed relative error.

    `cache` maps hook names to tensors, of any precision and on any device. The input is `tokens` with `attention_mask`;
    `valid` is True at real tokens.

    Raises:
        ValueError: A stream or a write is missing, or the cache is of another input.
    """
    missing = [name for name in view.stream_names if name.startswith("blocks") and name not in cache]
    if missing:
        raise ValueError(
            f"A cache must hold every stream and write; it lacks {missing[:3]} ({len(missing)} in all). Make it "
            f"with model.run_with_cache(tokens) and no names_filter."
        )
    saved = {name: cache[name].detach() for name in view.stream_names if name in cache}
    first = saved[FIRST_STREAM]
    if first.shape[:-1] != tokens.shape:
        raise ValueError(
            f"A cache must be of the same tokens with its batch dimension, {tuple(tokens.shape)}; got streams of "
            f"shape {tuple(first.shape)}."
        )
    is_half = any(working_dtype(dtype) is not dtype for dtype in (view.native_dtype, first.dtype))
    accuracy = 1e-2 if is_half else 1e-5
    first_write = next(name for name in view.stream_names if name.startswith("blocks.0") and name != FIRST_STREAM)
    own, _, _ = view.forward(tokens, attention_mask, until=first_write)
    # In half-precision models attention also rounds scores.
    for name, allowed in ((FIRST_STREAM, accuracy), (first_write, 16 * accuracy)):
        wanted, found = (values[name].to(view.device, view.dtype) for values in (own, saved))
        size = wanted.abs().amax(-1)
        size = size if name == FIRST_STREAM else torch.maximum(size, size[valid.to(size.device)].max())
        errors = (found - wanted).abs().amax(-1) / size.clamp_min(torch.finfo(wanted.dtype).tiny)
        wrong = (~(errors <= allowed) & valid.to(size.device)).nonzero()
        if len(wrong):
            row, position = wrong[0].tolist()
            raise ValueError(
                f"A cache must be of the same input; this one's {name} is not the model's, first at prompt {row}, position "
                f"{position} (off by {float(errors[row, position]):.1e}, relative). Make it of these tokens, with this "
                f"attention_mask and under the hooks that are active now, or leave it out."
            )
    return own | saved, accuracy
