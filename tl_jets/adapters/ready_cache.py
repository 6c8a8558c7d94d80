"""Reads a ready cache in place of a forward pass, after a check that it belongs to the input.

Streams of another input would also add up. So the model runs up to its first attention's write; the first stream
(tokens and positions) and this write (mask) must equal the cache's at real tokens. A step of a later layer is compared
with the cache when it is evaluated elsewhere (`tl_jets.core.trace`). Cost: an embedding and the first attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tl_jets.adapters.blocks import Blocks
from tl_jets.adapters.reading import working_dtype

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
