r"""Writes of single attention heads and MLP neurons.

**Heads.** With z_h(x) the input of W_O from head h, and z_h(0) its value at the zero stream,

.. math::
    \text{write}_h(x) = (z_h(x) - z_h(0))\, W_O^h, \qquad \text{attn\_bias} = \text{write}(x) - \sum_h \text{write}_h(x) .

z_h(0) is the value path's output for a zero normalized input, for any pattern whose rows sum to one. Constants thus
belong to `<l>_attn_bias`, and folding value biases or norms changes no head. (With an attention sink, rows sum to less
and a head keeps part of its value bias.) With the bias defined as a difference, any heads would add up. So before first
use, the difference at the model's stream must equal that at zero, before the post-norm (detects a wrong order of heads,
or an edit of their sum) and after it (an edit of the write). Cost: an evaluation of the attention at zero per input, and
three more per layer and set of hooks.

**Neurons.** With m(x) the activations that reach the output matrix W_out (after the gate, and after SoLU's norm),

.. math::
    \text{write}(x) = \text{mlp\_bias} + \sum_n \text{write}_n(x), \qquad
    \text{write}_n(x) = m_n(x)\, W_{\text{out}}[n], \quad \text{mlp\_bias} = b_{\text{out}} .

Unlike a head, a neuron has no constant. (A path from `<l>_mlp_bias` carries the frozen MLP's write at a zero stream,
which includes b_in.) Only requested neurons are evaluated; before a layer's first use, all its neurons and b_out are
compared with the MLP's own write.

Under a post-norm (Gemma-2, OLMo-2) shares are taken at its own scale, and its bias belongs to the constants; Granite's
multiplier applies to all.

Example:
    >>> from tl_jets import ResidualNetwork, load_tinydocs
    >>> trace = ResidualNetwork(load_tinydocs()).trace("This function is available on Unix and")
    >>> trace["L2N17_out"].shape == trace["2_mlp_out"].shape, "L2N17_out" in trace, len(trace.labels)
    (True, True, 18)
"""

from __future__ import annotations

import re
from typing import Any

import torch
from einops import einsum
from torch import Tensor

from tl_jets.adapters.blocks import Blocks
from tl_jets.core.protocol import Recording, Stage, Step, relative_error, tolerance


def head_writes(view: Blocks, recording: Recording, calls: Any, layer: int, stream: Tensor) -> Tensor:
    """[head + 1, batch, pos, d_model]: every head's write at any stream, then the attention bias."""
    check_heads(view, recording, calls, layer)
    z, out = _z_and_out(view, calls, layer, stream)
    key = ("z at the zero stream", layer)
    if key not in recording.memo:
        zero = torch.zeros(stream.shape, dtype=view.dtype, device=stream.device)
        recording.memo[key] = _z_and_out(view, calls, layer, zero)[0]
    heads = view.shares(layer, "attn", through_output(view, layer, z - recording.memo[key]), out)
    write = view.finish_attn(layer, out)
    return torch.cat([heads, (write - heads.sum(0))[None]])


def keep_heads(view: Blocks, recording: Recording, saved: dict[str, Tensor]) -> None:
    """Keep the input of W_O of every layer [batch, pos, head, d_head], where it was saved."""
    for layer in range(view.n_layers):
        z = saved.get(z_name(layer))
        if z is not None:
            recording.memo["z", layer] = z.to(view.dtype)


def recorded_heads(
    view: Blocks, recording: Recording, calls: Any, layer: int, batch: Tensor, pos: Tensor, of_changes: bool = False
) -> Tensor | None:
    """[head + 1, row, d_model]: every head's write at some cells of the recorded pass, then the attention bias.

    None if the layer has a post-norm or hooks, or a head is not zero at the zero stream (but `of_changes`, where it cancels).
    """
    z, post = recording.memo["z", layer], view.post_norm(layer)
    if recording.hook_state[layer + 1][0] or (post is not None and post.kind != "none"):
        return None
    check_heads(view, recording, calls, layer)
    if not of_changes and ("heads start at zero", layer, recording.hook_state) not in view.checked:
        return None
    write = recording.writes[f"{layer}_attn_out"][batch, pos]
    own = z[batch.to(z.device), pos.to(z.device)][None]
    heads = view.shares(layer, "attn", through_output(view, layer, own), write)[:, 0].to(write.device)
    return torch.cat([heads, (write - heads.sum(0))[None]])


def z_name(layer: int) -> str:
    """The hook at the input of W_O."""
    return f"blocks.{layer}.attn.hook_z"


def _z_and_out(view: Blocks, calls: Any, layer: int, stream: Tensor) -> tuple[Tensor, Tensor]:
    """Input of W_O [batch, pos, head, d_head], and the attention's output before any post-norm, at any stream."""
    grabbed: list[Tensor] = []
    name = z_name(layer)
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


def through_output(view: Blocks, layer: int, z: Tensor) -> Tensor:
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

    def left(stream: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Attention minus heads, before and after the post-norm [2, real token, d_model], sizes of both, and if z is 0."""
        z, out = _z_and_out(view, calls, layer, stream)
        heads, write = through_output(view, layer, z), view.finish_attn(layer, out)
        remains = torch.stack([out - heads.sum(0), write - view.shares(layer, "attn", out, out)])
        sizes = torch.stack([heads[:, valid].abs().max(), write[valid].abs().max()])
        return remains[:, valid], sizes, not bool(z.any())

    with torch.no_grad():
        (here, sizes, _), (at_zero, _, is_zero) = left(stream), left(torch.zeros_like(stream))
        error = float(((here - at_zero).abs().amax((1, 2)) / sizes.clamp_min(torch.finfo(stream.dtype).tiny)).max())
    if not error <= tolerance(view.dtype):
        raise NotImplementedError(
            f"Attention must be the sum of its heads and a constant; in block {layer} of {view.name} what the heads leave changes "
            f"with the stream, by {error:.1e} of their size. A hook edits their sum, or this attention does more to them than "
            f"multiply with W_O. Use granularity='sublayer'."
        )
    view.checked.add(key)
    if is_zero and not recording.hook_state[layer + 1][0]:  # then there is no value bias, whatever the input
        view.checked.add(("heads start at zero", *key[1:]))


_NEURON = re.compile(r"L(\d+)N(\d+)(_out)?")
_BIAS = re.compile(r"(\d+)_mlp_bias")


def neuron_step(view: Blocks, label: str) -> Step | None:
    """The neuron or MLP bias that a label or write label names, or None; ValueError if the layer has no such neuron."""
    neuron = _NEURON.fullmatch(label)
    found = neuron or _BIAS.fullmatch(label)
    layer = view.n_layers if found is None else int(found[1])
    if layer >= view.n_layers or not (layer in view.opaque or view.has_mlp(layer)):
        return None
    if neuron is None:
        return Step(f"{layer}_mlp_bias", layer, "mlp_bias")
    view.refuse(Step(label, layer, "neuron"))
    index, size = int(neuron[2]), len(output_weights(view, layer)[0])
    if index >= size:
        raise ValueError(f"Neurons of layer {layer} are numbered 0..{size - 1}; got {label!r}.")
    return Step(f"L{layer}N{index}", layer, "neuron", neuron=index)


def neuron_writes(view: Blocks, recording: Recording, calls: Any, stage: Stage, stream: Tensor) -> Tensor:
    """Writes of a stage's neurons and MLP bias at any stream, in the order of its steps, including any rest."""
    layer = stage.steps[0].layer
    _check(view, recording, calls, layer)
    post, write = _activations(view, calls, layer, stream)
    W_out, b_out = output_weights(view, layer)
    parts = [step for step in stage.steps if step.kind in ("neuron", "mlp_bias")]
    biases = [float(step.kind == "mlp_bias") for step in parts]
    units = [b_out.expand_as(write) if s.neuron is None else post[..., s.neuron, None] * W_out[s.neuron] for s in parts]
    found = view.shares(layer, "mlp", torch.stack(units), post @ W_out + b_out)
    post_bias = view.post_bias(layer)
    if post_bias is not None:
        found = found + found.new_tensor(biases)[:, None, None, None] * post_bias
    if any(step.kind == "mlp_rest" for step in stage.steps):
        found = torch.cat([found, (write - found.sum(0))[None]])
    return found


def output_weights(view: Blocks, layer: int) -> tuple[Tensor, Tensor]:
    """W_out [d_mlp, d_model] and b_out [d_model]."""
    mlp = view.blocks[layer].mlp
    W_out, b_out = getattr(mlp, "W_out", None), getattr(mlp, "b_out", None)
    if not isinstance(W_out, Tensor):
        raise _refusal(view, layer, f"{type(mlp).__name__} has no W_out")
    W_out = W_out.detach().to(view.dtype)
    return W_out, W_out.new_zeros(W_out.shape[1]) if b_out is None else b_out.detach().to(view.dtype)


def _activations(view: Blocks, calls: Any, layer: int, stream: Tensor) -> tuple[Tensor, Tensor]:
    """Input of W_out [batch, pos, d_mlp], and the MLP's write, at any stream."""
    grabbed: list[Tensor] = []
    with view.hooks([(f"blocks.{layer}.mlp.hook_post", lambda tensor, hook: grabbed.append(tensor))]):
        write = view.call_mlp(calls, layer, stream)
    if not grabbed:
        raise _refusal(view, layer, f"blocks.{layer}.mlp.hook_post never fired")
    return grabbed[-1], write


def _check(view: Blocks, recording: Recording, calls: Any, layer: int) -> None:
    """Compare all neurons and b_out with the MLP's write, once per layer and set of hooks."""
    key = ("neurons", layer, recording.hook_state)
    if key in view.checked:
        return
    stream = recording.streams.get(f"{layer}_mid", recording.streams[f"{layer}_pre"]).to(view.device_of(layer))
    valid = recording.valid.to(stream.device)
    with torch.no_grad():
        post, write = _activations(view, calls, layer, stream)
        W_out, b_out = output_weights(view, layer)
        out = post @ W_out + b_out if post.shape == (*stream.shape[:2], len(W_out)) else torch.zeros_like(write)
        found, post_bias = view.shares(layer, "mlp", out, out), view.post_bias(layer)
        found = found if post_bias is None else found + post_bias
        error = relative_error(found[valid], write[valid])
    if not error <= 16 * recording.accuracy:
        raise _refusal(view, layer, f"all neurons and b_out are off the MLP's write by {error:.1e} (relative)")
    view.checked.add(key)


def _refusal(view: Blocks, layer: int, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"Neurons must be readable at hook_post and sum to the MLP's write; in block {layer} of {view.name} {reason}: a hook "
        f"edits the MLP's output, or its kind is not understood. Take the whole MLP, '{layer}_mlp'."
    )
