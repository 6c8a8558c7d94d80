"""Streams, writes and edits of a recorded forward pass, which must add up.

A stream that differs from the sum of what was written to it is an edit if a user's hook is on it; otherwise the
architecture writes to the stream in a way that is not understood, and is refused.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tl_jets.adapters.blocks import Blocks
from tl_jets.core.protocol import FINAL_STREAM, Recording


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
    name = "blocks.0.hook_resid_pre"
    first = saved[name]
    recording.sources.update(view.read_sources(saved, first, name in hooked))
    total = sum(recording.sources.values(), torch.zeros_like(first))
    _arrive(recording, hooked, "0_pre", total, first, name)
    for layer in range(view.n_layers):
        expected = _pass_block(view, recording, saved, hooked, layer)
        post = saved[f"blocks.{layer}.hook_resid_post"]
        is_last = layer == view.n_layers - 1
        following = FINAL_STREAM if is_last else f"{layer + 1}_pre"
        _arrive(recording, hooked, following, expected, post, f"blocks.{layer}.hook_resid_post")
        if is_last:
            recording.streams[FINAL_STREAM] = post
        else:
            name = f"blocks.{layer + 1}.hook_resid_pre"
            _arrive(recording, hooked, following, post, saved[name], name)


def _pass_block(view: Blocks, recording: Recording, saved: dict[str, Tensor], hooked: set[str], layer: int) -> Tensor:
    """Fill in the streams and writes of a block; returns its first stream plus all that it writes."""
    block = f"blocks.{layer}.hook_"
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
            _arrive(recording, hooked, f"{layer}_mid", expected, mid, block + "resid_mid")
            expected = mid
        recording.streams[f"{layer}_mid"] = expected
    return expected + saved[block + "mlp_out"]


def _arrive(recording: Recording, hooked: set[str], stream: str, expected: Tensor, found: Tensor, hook: str) -> None:
    """Record an edit of a stream by `hook`, or refuse a stream that is not the sum of what was written to it."""
    difference = found - expected
    size = _largest(recording, found)
    if not math.isfinite(size):
        raise ValueError(
            f"Every stream must be finite; {stream} holds NaN or infinity. Look at the model's weights, its "
            f"precision (float16 overflows), and the hooks on it."
        )
    error = _largest(recording, difference) / max(size, 1e-30)
    if hook in hooked:
        recording.edits.setdefault(stream, {})[f"edit:{hook}"] = difference
    elif not error <= recording.accuracy:
        raise ValueError(
            f"A stream must be the sum of what was written to it; {stream} differs by {error:.1e} (relative) "
            f"and no hook on {hook} explains it. This architecture writes to the stream in a way that is not "
            f"understood, so it is refused."
        )


def _largest(recording: Recording, values: Tensor) -> float:
    """Largest absolute value at real tokens; NaN and infinity survive."""
    return float((values if bool(recording.valid.all()) else values[recording.valid]).abs().max())
