"""What the views of HookedTransformer and TransformerBridge share: recording, connecting, replaying, heads.

A gamma is evaluated by *replay*: the model's own submodules are called again on another stream with the arguments
(masks, rotary tables) of the recorded forward pass, so that every hook inside them fires. Hooks on the streams
themselves (`hook_resid_pre`, `hook_resid_mid`, `hook_resid_post`) belong to no gamma: what they change is recorded as
an edit of the stream, `edit:<hook>`.

A **head's write** is the part of the attention write that its own value vectors carry:

    write_h(x) = (z_h(x) - z_h(0)) W_O^h,    attn_bias(x) = write(x) - sum_h write_h(x)

where z_h(0), the head at the zero stream, is what the value path gives for a zero normalized input (attention
patterns sum to one, so it depends on no pattern). Under a post-norm the same shares are taken at the post-norm's own
scale. Constants therefore sit in `<l>_attn_bias`, and folding value biases or norms changes no head. What neurons write
is in `tl_jets.adapters.neurons`.

A model may be spread over several devices: what is recorded and what is made of it is where `W_U` is, and a replay takes its
stream to the device of the block and its writes back.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tl_jets.adapters.neurons import neuron_step, neuron_writes
from tl_jets.adapters.reading import (
    read_input,
    read_mask,
    read_norm,
    refuse_training,
    refuse_unsupported,
    working_dtype,
)
from tl_jets.calculus import Norm, full_precision
from tl_jets.decoder import Decoder
from tl_jets.stages import FINAL_STREAM, Granularity, Recording, Stage, Step, tolerance


class TransformerLensView(ABC):
    """A TransformerLens model as a residual network (see `tl_jets.network.ModelView`)."""

    def __init__(self, model: Any):
        refuse_unsupported(model)
        self.model = model
        self.cfg = model.cfg
        self.blocks = list(model.blocks)
        self.n_layers = len(self.blocks)
        parameter = next(model.parameters())
        self.input_device, self.device = parameter.device, model.W_U.device
        self.native_dtype = parameter.dtype
        self.dtype = working_dtype(parameter.dtype)
        called = str(getattr(self.cfg, "model_name", None) or "custom")  # a local directory goes by its last part
        self.name = f"{type(model).__name__}({Path(called).name if Path(called).is_absolute() else called})"
        # `hook_dict` is made anew at every access on a bridge; several names may stand for one point.
        self._hook_dict = dict(model.hook_dict)
        self._points = list({id(point): point for point in self._hook_dict.values()}.values())
        self._stream_names = self._read_stream_names()
        self.checked_neurons: set[Hashable] = set()
        self.decoder = self._decoder()

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return self.model.tokenizer

    # What differs between the two worlds

    @abstractmethod
    def _decoder(self) -> Decoder:
        """Final norm, unembedding and output transform."""

    @abstractmethod
    def _call_attn(self, calls: Any, layer: int, stream: Tensor) -> Tensor:
        """Pre-norm and attention, before any post-norm."""

    @abstractmethod
    def _finish_attn(self, layer: int, out: Tensor) -> Tensor:
        """From the attention module's output to what is added to the stream."""

    @abstractmethod
    def call_mlp(self, calls: Any, layer: int, stream: Tensor) -> Tensor:
        """What the MLP adds to the stream."""

    @abstractmethod
    def _post_norm(self, layer: int, which: Literal["attn", "mlp"] = "attn") -> Norm | None:
        """The norm between a sublayer and the stream, if any."""

    @abstractmethod
    def is_parallel(self, layer: int) -> bool:
        """Whether attention and MLP read the same stream."""

    @abstractmethod
    def has_mlp(self, layer: int) -> bool:
        """Whether the block has an MLP at all."""

    @abstractmethod
    def _edits_mid(self) -> bool:
        """Whether a hook on `hook_resid_mid` changes the stream itself, skip included."""

    @abstractmethod
    def _call_modules(self) -> list[tuple[Hashable, torch.nn.Module]]:
        """Modules whose call arguments a replay needs, by key."""

    def _forget_replay(self, layer: int) -> None:
        """Remove what a replay leaves on the model's modules."""
        del layer

    # Stages

    def stages(self, granularity: Granularity) -> tuple[Stage, ...]:
        """The stages of the model at a granularity."""
        stages = []
        for layer in range(self.n_layers):
            pre, mid = f"{layer}_pre", f"{layer}_mid"
            if granularity == "block":
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
        """The neuron (`L3N17`) or MLP bias (`3_mlp_bias`) that a label, or that of a write, names; None if it names neither."""
        return neuron_step(self, label)

    # Recording

    def hook_state(self) -> Hashable:
        """The user's forward hooks now on the model, by torch's own numbers, which are never given twice."""
        return tuple(tuple(handle.hook.id for handle in point.fwd_hooks) for point in self._points if point.fwd_hooks)

    def _hooks_on(self, name: str) -> bool:
        point = self._hook_dict.get(name)
        return point is not None and bool(point.fwd_hooks)

    def precision(self) -> AbstractContextManager[Any]:
        """Keeps float64 models in float64 and computes half-precision models in float32; free for float32."""
        return nullcontext() if self.native_dtype is torch.float32 else full_precision()

    def record(self, text_or_tokens: Any, attention_mask: Tensor | None, cache: Any) -> Recording:
        """One forward pass (or a ready cache), as streams, writes, edits and sources that add up."""
        refuse_training(self.model)
        tokens, valid = read_input(self.model, text_or_tokens)
        is_text = isinstance(text_or_tokens, str) or isinstance(text_or_tokens[0], str)
        if attention_mask is not None:
            valid = read_mask(attention_mask, tokens)
        elif not bool(valid.all()) or (is_text and getattr(self.tokenizer, "padding_side", "right") == "left"):
            # Without a mask HookedTransformer takes leading pad tokens for padding if the tokenizer pads on the left.
            if getattr(self.cfg, "attention_dir", "causal") == "bidirectional":
                raise ValueError(
                    "Prompts of unequal length are padded on the right, which bidirectional attention would see; "
                    "pass one prompt at a time, or tokens with an attention_mask."
                )
            attention_mask = valid.long()
        hooked = {name for name in self._stream_names if self._hooks_on(name)}
        state = self.hook_state()
        if cache is None:
            saved, calls, logits = self._forward(tokens, attention_mask)
        else:
            saved, calls, logits = self._read_cache(cache, tokens), None, None
        accuracy = tolerance(self.dtype) if cache is None else 1e-5 if self.dtype is self.native_dtype else 1e-2
        tokens, valid = tokens.to(self.device), valid.to(self.device)
        recording = Recording(
            tokens, valid, {}, {}, {}, logits=logits, hook_state=state, calls=calls, accuracy=accuracy
        )
        recording.memo["attention_mask"] = attention_mask
        self._connect(recording, saved, hooked)
        return recording

    def _read_stream_names(self) -> list[str]:
        names = ["hook_embed", "hook_pos_embed"]
        for layer in range(self.n_layers):
            kinds = ["resid_pre", "attn_out", "resid_post"]
            if self.has_mlp(layer):
                kinds += ["mlp_out"] if self.is_parallel(layer) else ["resid_mid", "mlp_out"]
            names += [f"blocks.{layer}.hook_{kind}" for kind in kinds]
        return [name for name in names if name in self._hook_dict]

    def _forward(self, tokens: Tensor, attention_mask: Tensor | None) -> tuple[dict[str, Tensor], Any, Tensor]:
        saved: dict[str, Tensor] = {}
        calls: dict[Hashable, tuple[tuple, dict]] = {}

        def save(tensor: Tensor, hook: Any, name: str) -> None:
            saved[name] = tensor.detach()

        def save_call(module: Any, args: tuple, kwargs: dict, key: Hashable) -> None:
            calls[key] = (args, dict(kwargs))

        def saver(name: str) -> tuple[str, Any]:
            return name, lambda tensor, hook: save(tensor, hook, name)

        def call_saver(key: Hashable) -> Any:
            return lambda module, args, kwargs: save_call(module, args, kwargs, key)

        handles = [
            module.register_forward_pre_hook(call_saver(key), with_kwargs=True, prepend=True)
            for key, module in self._call_modules()
        ]
        try:
            with torch.no_grad(), self.precision(), self.model.hooks([saver(n) for n in self._stream_names]):
                logits = self._run(tokens, attention_mask)
        finally:
            for handle in handles:
                handle.remove()
        return saved, calls, logits.to(self.device)

    def _run(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        extra = {} if attention_mask is None else {"attention_mask": attention_mask.to(self.input_device)}
        return self.model(tokens.to(self.input_device), return_type="logits", **extra)

    def _read_cache(self, cache: Any, tokens: Tensor) -> dict[str, Tensor]:
        missing = [name for name in self._stream_names if name.startswith("blocks") and name not in cache]
        if missing:
            raise ValueError(
                f"A cache must hold every stream and write; it lacks {missing[:3]} ({len(missing)} in all). Make it "
                f"with model.run_with_cache(tokens) and no names_filter."
            )
        saved = {name: cache[name].detach() for name in self._stream_names if name in cache}
        shape = saved["blocks.0.hook_resid_pre"].shape
        if shape[:-1] != tokens.shape:
            raise ValueError(
                f"A cache must be of the same tokens with its batch dimension, {tuple(tokens.shape)}; got streams of "
                f"shape {tuple(shape)}."
            )
        return saved

    def _connect(self, recording: Recording, saved: dict[str, Tensor], hooked: set[str]) -> None:
        """Fill in sources, streams, writes and edits, and refuse streams that are not the sum of their writes."""
        saved = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in saved.items()
        }

        padded = not bool(recording.valid.all())

        def largest(values: Tensor) -> float:
            return float((values[recording.valid] if padded else values).abs().max())

        def arrive(stream: str, expected: Tensor, found: Tensor, hook: str) -> None:
            difference = found - expected
            size = largest(found)  # NaN and infinity survive `max`
            if not math.isfinite(size):
                raise ValueError(
                    f"Every stream must be finite; {stream} holds NaN or infinity. Look at the model's weights, its "
                    f"precision (float16 overflows), and the hooks on it."
                )
            error = largest(difference) / max(size, 1e-30)
            if hook in hooked:
                recording.edits.setdefault(stream, {})[f"edit:{hook}"] = difference
            elif not error <= recording.accuracy:
                raise ValueError(
                    f"A stream must be the sum of what was written to it; {stream} differs by {error:.1e} (relative) "
                    f"and no hook on {hook} explains it. This architecture writes to the stream in a way that is not "
                    f"understood, so it is refused."
                )

        first = saved["blocks.0.hook_resid_pre"]
        recording.sources.update(self._sources(saved, first, "blocks.0.hook_resid_pre" in hooked))
        arrive("0_pre", sum(recording.sources.values(), torch.zeros_like(first)), first, "blocks.0.hook_resid_pre")
        for layer in range(self.n_layers):
            block = f"blocks.{layer}.hook_"
            stream = recording.streams[f"{layer}_pre"] = saved[block + "resid_pre"]
            attn = recording.writes[f"{layer}_attn_out"] = saved[block + "attn_out"]
            expected = stream + attn
            if self.has_mlp(layer):
                mlp = recording.writes[f"{layer}_mlp_out"] = saved[block + "mlp_out"]
                if not self.is_parallel(layer):
                    mid = saved[block + "resid_mid"]
                    if self._edits_mid() or block + "resid_mid" not in hooked:
                        arrive(f"{layer}_mid", expected, mid, block + "resid_mid")
                        expected = mid
                    recording.streams[f"{layer}_mid"] = expected
                expected = expected + mlp
            post = saved[block + "resid_post"]
            last = layer == self.n_layers - 1
            following = FINAL_STREAM if last else f"{layer + 1}_pre"
            arrive(following, expected, post, block + "resid_post")
            if last:
                recording.streams[FINAL_STREAM] = post
            else:
                arrive(
                    following, post, saved[f"blocks.{layer + 1}.hook_resid_pre"], f"blocks.{layer + 1}.hook_resid_pre"
                )

    @property
    def sources(self) -> tuple[str, ...]:
        """`embed`, and `pos_embed` where learned positions are added to the stream."""
        learned = getattr(self.cfg, "positional_embedding_type", "standard") == "standard"
        return ("embed", "pos_embed") if learned and "hook_pos_embed" in self._hook_dict else ("embed",)

    def _sources(self, saved: dict[str, Tensor], first: Tensor, edited: bool) -> dict[str, Tensor]:
        """The sources' values; they sum to the first stream unless a hook edits it.

        `embed` is what the stream holds without positions: an embedding that the model scales or normalizes before
        the first block (Gemma, Bloom) is taken after that.
        """
        positions = saved["hook_pos_embed"].expand_as(first) if "pos_embed" in self.sources else None
        embed = saved.get("hook_embed")
        if embed is None or embed.shape != first.shape:
            embed = first if positions is None else first - positions
        total = embed if positions is None else embed + positions
        if not edited and not torch.equal(total, first):
            embed = first if positions is None else first - positions
        return {"embed": embed} if positions is None else {"embed": embed, "pos_embed": positions}

    # Replaying

    def writes(self, recording: Recording, stage: Stage, stream: Tensor) -> Tensor:
        """The stage's writes at any stream, stacked in the order of its steps."""
        calls = self._calls(recording)
        layer = stage.steps[0].layer
        kinds = {step.kind for step in stage.steps}
        own, stream = stream.device, _moved(stream, self.device_of(layer))
        with self._replaying(layer):
            if kinds == {"block"}:
                return _moved(self._block(recording, calls, layer, stream)[None], own)
            parts = []
            if "head" in kinds:
                parts += [self._heads(recording, calls, layer, stream)]
            if "attn" in kinds:
                parts += [self._finish_attn(layer, self._call_attn(calls, layer, stream))[None]]
            if "mlp" in kinds:
                parts += [self.call_mlp(calls, layer, stream)[None]]
            if kinds & {"neuron", "mlp_bias"}:
                parts += [neuron_writes(self, recording, calls, stage, stream)]
            return _moved(torch.cat(parts) if len(parts) > 1 else parts[0], own)

    @contextmanager
    def _replaying(self, layer: int) -> Iterator[None]:
        try:
            with self.precision():
                yield
        finally:
            self._forget_replay(layer)

    def _calls(self, recording: Recording) -> Any:
        """Call arguments of the recorded forward pass; a trace made from a cache gets them on first use."""
        if recording.calls is None:
            _, recording.calls, _ = self._forward(recording.tokens, recording.memo["attention_mask"])
        return recording.calls

    def _block(self, recording: Recording, calls: Any, layer: int, stream: Tensor) -> Tensor:
        write = self._finish_attn(layer, self._call_attn(calls, layer, stream))
        if self.has_mlp(layer):
            middle = stream
            if not self.is_parallel(layer):
                middle = stream + write
                for edit in recording.edits.get(f"{layer}_mid", {}).values():
                    middle, write = middle + edit.to(stream.device), write + edit.to(stream.device)
            write = write + self.call_mlp(calls, layer, middle)
        return write

    def _heads(self, recording: Recording, calls: Any, layer: int, stream: Tensor) -> Tensor:
        """[head + 1, batch, pos, d_model]: every head's write, then the attention bias."""
        z, out = self._z_and_out(calls, layer, stream)
        key = ("z at the zero stream", layer)
        if key not in recording.memo:
            zero = torch.zeros(stream.shape, dtype=self.dtype, device=stream.device)
            recording.memo[key] = self._z_and_out(calls, layer, zero)[0]
        W_O = self.blocks[layer].attn.W_O.to(self.dtype)
        heads = torch.einsum("bphe,hem->hbpm", z - recording.memo[key], W_O)
        heads = self.shares(layer, "attn", heads, out)
        write = self._finish_attn(layer, out)
        return torch.cat([heads, (write - heads.sum(0))[None]])

    def shares(self, layer: int, which: Literal["attn", "mlp"], parts: Tensor, out: Tensor) -> Tensor:
        """What parts of a sublayer's output `out` are of its write: at the post-norm's own scale, without its bias."""
        post = self._post_norm(layer, which)
        if post is not None and post.kind != "none":
            centered = post.center(out)
            parts = post.center(parts) * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + post.eps)
            parts = parts if post.weight is None else parts * post.weight
        return parts * self._scale(layer)

    def post_bias(self, layer: int) -> Tensor | None:
        """What the bias of a norm after the MLP adds to its write [d_model]."""
        post = self._post_norm(layer, "mlp")
        return None if post is None or post.bias is None else post.bias * self._scale(layer)

    def _scale(self, layer: int) -> float:
        return float(getattr(self.blocks[layer], "residual_contribution_scale", 1.0))

    def _z_and_out(self, calls: Any, layer: int, stream: Tensor) -> tuple[Tensor, Tensor]:
        grabbed: list[Tensor] = []
        name = f"blocks.{layer}.attn.hook_z"
        with self.model.hooks([(name, lambda z, hook: grabbed.append(z))]):
            out = self._call_attn(calls, layer, stream)
        if not grabbed:
            raise NotImplementedError(f"Heads need {name}, which never fired; use granularity='sublayer'.")
        return grabbed[-1], out

    def device_of(self, layer: int) -> torch.device:
        """Where a block is."""
        return next(self.blocks[layer].parameters()).device

    def _read_norm(self, module: Any) -> Norm:
        return read_norm(module, self.cfg, self.cfg.d_model, self.device, self.dtype)

    def _read_last_norm(self, module: Any) -> Norm:
        norm = self._read_norm(module)
        weight, bias = (None if x is None else x.to(self.device) for x in (norm.weight, norm.bias))
        return replace(norm, weight=weight, bias=bias)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; untouched where it is there already, so that Taylor tensors and wrappers stay what they are."""
    return tensor if tensor.device == device else tensor.to(device)
