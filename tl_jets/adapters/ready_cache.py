"""A ready cache in place of a forward pass: that it holds every stream, and that it is of this input.

Streams add up whatever input they are of: a cache of other tokens would be read without complaint, under the wrong labels. So the
model is run up to what its first attention writes, on these tokens, with this attention mask and under the hooks that are active
now. The first stream (tokens and positions) and the first write (the mask) must be the cache's, at real tokens: padding is
not compared. Later layers follow from these unless a hook edits them, and each step that is evaluated elsewhere is first
compared with what the cache holds of it (`tl_jets.core.trace`).

Cost: an embedding and the first attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tl_jets.adapters.protocol import BlocksView
from tl_jets.adapters.reading import working_dtype

FIRST_STREAM = "blocks.0.hook_resid_pre"


def read_cache(
    view: BlocksView, cache: Any, tokens: Tensor, attention_mask: Tensor | None, valid: Tensor
) -> tuple[dict[str, Tensor], float]:
    """A cache's streams and writes by hook name, and the relative error that they may have.

    Args:
        view: The model.
        cache: A TransformerLens `ActivationCache`, or any mapping of hook names to tensors, of any precision, on any device.
        tokens: The input that it must be of [batch, pos].
        attention_mask: What the model is given of padding [batch, pos], or None.
        valid: Real tokens, True, and padding, False [batch, pos].

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
    # Within a half-precision model attention rounds scores, not only what it writes.
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
