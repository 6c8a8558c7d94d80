r"""Writes of single attention heads.

With z_h(x) the input of W_O from head h, and z_h(0) its value at the zero stream,

.. math::
    \text{write}_h(x) = (z_h(x) - z_h(0))\, W_O^h, \qquad \text{attn\_bias} = \text{write}(x) - \sum_h \text{write}_h(x) .

z_h(0) is the value path's output for a zero normalized input, for any pattern whose rows sum to one. Constants thus
belong to `<l>_attn_bias`, and folding value biases or norms changes no head. (With an attention sink, rows sum to less
and a head keeps part of its value bias.) Under a post-norm, shares are taken at its own scale.

With the bias defined as a difference, any heads would add up. So before first use, the difference at the model's stream
must equal that at zero, before the post-norm (detects a wrong order of heads, or an edit of their sum) and after it (an
edit of the write). Cost: an evaluation of the attention at zero per input, and three more per layer and set of hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum
from torch import Tensor

from tl_jets.adapters.blocks import Blocks
from tl_jets.core.protocol import Recording, tolerance


def head_writes(view: Blocks, recording: Recording, calls: Any, layer: int, stream: Tensor) -> Tensor:
    """[head + 1, batch, pos, d_model]: every head's write at any stream, then the attention bias."""
    check_heads(view, recording, calls, layer)
    z, out = _z_and_out(view, calls, layer, stream)
    key = ("z at the zero stream", layer)
    if key not in recording.memo:
        zero = torch.zeros(stream.shape, dtype=view.dtype, device=stream.device)
        recording.memo[key] = _z_and_out(view, calls, layer, zero)[0]
    heads = view.shares(layer, "attn", _through_output(view, layer, z - recording.memo[key]), out)
    write = view.finish_attn(layer, out)
    return torch.cat([heads, (write - heads.sum(0))[None]])


def _z_and_out(view: Blocks, calls: Any, layer: int, stream: Tensor) -> tuple[Tensor, Tensor]:
    """Input of W_O [batch, pos, head, d_head], and the attention's output before any post-norm, at any stream."""
    grabbed: list[Tensor] = []
    name = f"blocks.{layer}.attn.hook_z"
    with view.hooks([(name, lambda z, hook: grabbed.append(z))]):
        out = view.call_attn(calls, layer, stream)
    if not grabbed:
        raise NotImplementedError(f"Heads need {name}, which never fired; use granularity='sublayer'.")
    W_O = view.blocks[layer].attn.W_O
    if grabbed[-1].shape != (*stream.shape[:2], *W_O.shape[:2]):
        raise NotImplementedError(
            f"Heads are read off {name}, [batch, pos, head, d_head] = {(*stream.shape[:2], *W_O.shape[:2])}; in {view.name} it has "
            f"shape {tuple(grabbed[-1].shape)}, and its attention is not understood. Use granularity='sublayer'."
        )
    return grabbed[-1], out


def _through_output(view: Blocks, layer: int, z: Tensor) -> Tensor:
    """Output of W_O per head [head, batch, pos, d_model]."""
    W_O = view.blocks[layer].attn.W_O.to(view.dtype)
    return einsum(z, W_O, "batch pos head d_head, head d_head d_model -> head batch pos d_model")


def check_heads(view: Blocks, recording: Recording, calls: Any, layer: int) -> None:
    """Check, once per layer and hooks, that attention minus heads is the same at every stream.

    Raises NotImplementedError if a hook edits the heads' sum, or the attention is not its heads through W_O.
    """
    key = ("heads", layer, recording.hook_state)
    if key in view.checked:
        return
    stream = recording.streams[f"{layer}_pre"].to(view.device_of(layer))
    valid = recording.valid.to(stream.device)

    def left(stream: Tensor) -> tuple[Tensor, Tensor]:
        """Attention minus heads, before and after the post-norm [2, real token, d_model], and the sizes of both."""
        z, out = _z_and_out(view, calls, layer, stream)
        heads, write = _through_output(view, layer, z), view.finish_attn(layer, out)
        remains = torch.stack([out - heads.sum(0), write - view.shares(layer, "attn", out, out)])
        sizes = torch.stack([heads[:, valid].abs().max(), write[valid].abs().max()])
        return remains[:, valid], sizes

    with torch.no_grad():
        (here, sizes), (at_zero, _) = left(stream), left(torch.zeros_like(stream))
        error = float(((here - at_zero).abs().amax((1, 2)) / sizes.clamp_min(torch.finfo(stream.dtype).tiny)).max())
    if not error <= tolerance(view.dtype):
        raise NotImplementedError(
            f"Attention must be the sum of its heads and a constant; in block {layer} of {view.name} what the heads leave changes "
            f"with the stream, by {error:.1e} of their size. A hook edits their sum, or this attention does more to them than "
            f"multiply with W_O. Use granularity='sublayer'."
        )
    view.checked.add(key)
