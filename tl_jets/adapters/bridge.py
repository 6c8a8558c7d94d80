"""`TransformerBridge` (TransformerLens 3.x and 4.x) as a residual network.

The norms before and after a sublayer differ between versions, and are read from the block's hook aliases.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tl_jets.adapters.base import TransformerLensView
from tl_jets.adapters.blocks import Sublayer
from tl_jets.core.decoder import Decoder

# Arguments by which a replay would read or extend the key-value cache.
_KV_CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value", "cache_params", "cache")


class TransformerBridgeView(TransformerLensView):
    """Replays the bridge components of a block with the arguments of the recorded call."""

    def is_parallel(self, layer: int) -> bool:
        """Whether attention and MLP read the same stream."""
        return self.has_mlp(layer) and "hook_resid_mid" not in self.blocks[layer].hook_aliases

    def has_mlp(self, layer: int) -> bool:
        """Whether the block has an MLP."""
        return "mlp" in self.blocks[layer]._modules

    def edits_mid(self) -> bool:
        """Whether a hook on `hook_resid_mid` changes the stream itself, skip included."""
        # hook_resid_mid is only the MLP branch's input here: replays fire it, and the skip keeps the old value.
        return False

    def _call_modules(self) -> list[tuple[Hashable, torch.nn.Module]]:
        return [
            ((layer, name), block._modules[name])
            for layer, block in enumerate(self.blocks)
            for name in ("attn", "mlp")
            if name in block._modules
        ]

    def _run(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        extra = {} if attention_mask is None else {"attention_mask": attention_mask.long().to(self.input_device)}
        return self.model(tokens.to(self.input_device), return_type="logits", use_cache=False, **extra)

    def fills_cache(self, tokens: Tensor) -> bool:
        """Whether attention fills its key-value cache in a forward pass; True without such a cache."""
        with torch.no_grad():
            _, cache = self.model(tokens.to(self.input_device), return_type="logits_and_cache", use_cache=True)
        return cache is None or cache.get_seq_length() > 0

    def _norms(self, layer: int, which: str) -> tuple[str | None, str | None]:
        """Names of the norms before and after a sublayer."""
        block = self.blocks[layer]
        own = {"attn": "ln1", "mlp": "ln2"}[which]
        head = block.hook_aliases.get(f"hook_{which}_out", f"{which}.hook_out").split(".")[0]
        post = head if head != which else None
        pre = own if own in block._modules and own != post else None
        if which == "mlp" and pre is None and post is None and "ln1" in block._modules:
            pre = "ln1"  # a parallel block whose sublayers share one norm
        return pre, post

    def _call(self, calls: Any, layer: int, which: str, stream: Tensor) -> Tensor:
        block = self.blocks[layer]
        pre, _ = self._norms(layer, which)
        if pre is not None:
            stream = block._modules[pre](stream)
        if (layer, which) not in calls:
            raise NotImplementedError(
                f"A replay calls the {which} component of block {layer}, which the forward pass of {self.name} never calls, so "
                f"that it is not supported. Lenses and direct attribution read streams only."
            )
        args, kwargs = calls[layer, which]
        no_cache = dict.fromkeys(_KV_CACHE_ARGUMENTS) | {"use_cache": False}
        kwargs = {name: no_cache.get(name, value) for name, value in kwargs.items()}
        module = block._modules[which]
        args, kwargs = _without_residual(module, stream, args, kwargs)
        out = module(stream, *args[1:], **kwargs) if args else module(**{**kwargs, "hidden_states": stream})
        return out[0] if isinstance(out, (tuple, list)) else out

    def _finish(self, layer: int, which: Sublayer, out: Tensor) -> Tensor:
        post, scale = self._post_norm_module(layer, which), self.residual_scale(layer)
        out = out if post is None else post(out)
        return out if scale == 1.0 else out * scale

    def call_attn(self, calls: Any, layer: int, stream: Tensor) -> Tensor:
        """Pre-norm and attention, before any post-norm."""
        return self._call(calls, layer, "attn", stream)

    def finish_attn(self, layer: int, out: Tensor) -> Tensor:
        """Map the attention module's output to its write."""
        return self._finish(layer, "attn", out)

    def call_mlp(self, calls: Any, layer: int, stream: Tensor) -> Tensor:
        """The MLP's write."""
        return self._finish(layer, "mlp", self._call(calls, layer, "mlp", stream))

    def _post_norm_module(self, layer: int, which: Sublayer) -> torch.nn.Module | None:
        _, post = self._norms(layer, which)
        return None if post is None else self.blocks[layer]._modules[post]

    def _pre_norm_module(self, layer: int, which: Sublayer) -> torch.nn.Module | None:
        pre, _ = self._norms(layer, which)
        return None if pre is None else self.blocks[layer]._modules[pre]

    def forget_replay(self, layer: int) -> None:
        """Clean up the model's modules after a replay."""
        # Components keep their last input; a Taylor tensor there breaks copy.deepcopy(model).
        attn = self.blocks[layer].attn
        for name in ("_captured_pre_ln_residual", "_pattern"):
            if getattr(attn, name, None) is not None:
                setattr(attn, name, None)

    def _decoder(self) -> Decoder:
        model = self.model
        W_U = model.W_U.detach()
        b_U = model.b_U.detach().to(W_U.device)
        generator = torch.Generator().manual_seed(0)
        probe = torch.linspace(-40, 40, W_U.shape[1], dtype=self.dtype, device="cpu")
        probe = probe[torch.randperm(len(probe), generator=generator, device="cpu")].to(W_U.device)
        transform = model.adapter.apply_output_logits_transform
        with torch.no_grad(), self.precision():
            changes = not torch.equal(transform(probe.clone()), probe)
        norm = self._read_last_norm(getattr(model, "ln_final", None))
        plain = Decoder(norm=norm, W_U=W_U, b_U=b_U)
        return replace(plain, transform=transform) if changes and not self._reproduces(plain) else plain

    def _reproduces(self, decoder: Decoder) -> bool:
        """Whether a decoder gives the model's own logits (3.9 applies a folded logit scale twice in the adapter)."""
        saved, _, logits = self.forward(torch.zeros(1, 1, dtype=torch.long, device=self.device), None)
        final = saved[f"blocks.{self.n_layers - 1}.hook_resid_post"].to(self.device)
        return bool(torch.allclose(decoder.logits(decoder.norm(final)), logits, rtol=1e-3, atol=1e-3))


def _without_residual(module: torch.nn.Module, stream: Tensor, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Zero the residual of a module that adds it itself (Bloom), which leaves its write."""
    forward = getattr(getattr(module, "original_component", None), "forward", None)
    names = list(inspect.signature(forward).parameters) if forward is not None else []
    if "residual" not in names:
        return args, kwargs
    zero, index = torch.zeros(stream.shape, dtype=stream.dtype, device=stream.device), names.index("residual")
    if index < len(args):
        return (*args[:index], zero, *args[index + 1 :]), kwargs
    return args, {**kwargs, "residual": zero}
