"""Common base of the HookedTransformer and TransformerBridge views: recording, connecting, replaying.

A gamma is evaluated by *replay*: the model's own submodules are called on another stream with the arguments (masks,
rotary tables) of the recorded forward pass, so all hooks inside them fire. Changes by hooks on the streams themselves
(`hook_resid_pre`, `hook_resid_mid`, `hook_resid_post`) are recorded as edits, `edit:<hook>`, and belong to no gamma. If
a model is spread over several devices, all results are on the device of `W_U`; a replay runs on the device of its
block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tl_jets.adapters.blocks import Blocks, saver, under_lock
from tl_jets.adapters.connecting import connect
from tl_jets.adapters.heads import head_writes
from tl_jets.adapters.inputs import read_input, read_text
from tl_jets.adapters.neurons import neuron_step, neuron_writes
from tl_jets.adapters.ready_cache import read_cache
from tl_jets.core.protocol import Granularity, Recording, Stage, Step, tolerance


class TransformerLensView(Blocks):
    """A TransformerLens model as a residual network (implements `tl_jets.core.protocol.ModelView`)."""

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return self.model.tokenizer

    def forget_replay(self, layer: int) -> None:
        """Clean up the model's modules after a replay."""
        del layer

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

    def fills_cache(self, tokens: Tensor) -> bool:
        """Whether attention fills a key-value cache passed to it."""
        del tokens
        return True

    def tokenize(self, text: Any, prepend_bos: bool | None) -> tuple[Tensor, Tensor]:
        """Token ids of text, padded on the right, and a mask of real tokens [batch, pos]."""
        return read_text(self.model, text, prepend_bos)

    @under_lock
    def record(self, text_or_tokens: Any, attention_mask: Tensor | None, cache: Any) -> Recording:
        """One forward pass (or a ready cache) as streams, writes, edits and sources that add up."""
        state = self.follow()
        tokens, valid, attention_mask = read_input(self.model, text_or_tokens, attention_mask)
        hooked = {name for name in self.stream_names if self.hook_dict[name].fwd_hooks}
        calls, logits = None, None
        if cache is None:
            saved, calls, logits = self.forward(tokens, attention_mask)
            accuracy = tolerance(self.dtype)
        else:
            saved, accuracy = read_cache(self, cache, tokens, attention_mask, valid)
        tokens, valid = tokens.to(self.device), valid.to(self.device)
        recording = Recording(
            tokens, valid, {}, {}, {}, logits=logits, hook_state=state, calls=calls, accuracy=accuracy
        )
        recording.memo["attention_mask"] = attention_mask
        connect(self, recording, saved, hooked)
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

    @contextmanager
    def replaying(self, layer: int) -> Iterator[None]:
        """Context for replays of a block: sets the precision, and cleans up the modules afterwards."""
        with self.kept.lock:
            try:
                with self.precision():
                    yield
            finally:
                self.forget_replay(layer)

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
