"""Look-up in a `JetCache` by TransformerLens' names: activations of the run, and the sum of the terms as their stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tl_jets.core.labels import LabelInput
from tl_jets.core.protocol import FINAL_STREAM

# Rounding of a forward pass on another machine, relative: in float32 and float64, in 16 bits.
SAME = (1e-4, 2e-2)


def activation(cache: Any, name: LabelInput) -> Tensor:
    """The trace's activation of a name at the cells of a cache; for the stream that the stage produces, the sum of the terms.

    Raises ValueError for names that the trace does not know, and for patterns of some positions.
    """
    trace, stage = cache.traced("Activations"), cache.expansion.stage
    if stage is not None and trace.network.view.inner_stage(name) is None:
        network = cache.expansion.network
        if network.label(name) == network.next_stream(stage):
            return cache.stack().sum(0)
    values = trace[name]
    if cache.columns is not None and values.shape[-2:] == (trace.tokens.shape[1],) * 2:
        raise ValueError(f"Attention patterns of some positions are ambiguous; index the trace: cache.trace[{name!r}].")
    return cache.here(values)


def is_of_trace(cache: Any) -> bool:
    """Whether the trace gives the cache's `truth`, up to rounding: tokens elsewhere and weights count, too."""
    trace, stage = cache.trace, cache.expansion.stage
    following = FINAL_STREAM if stage is None else cache.expansion.network.next_stream(stage)
    found = trace.decoder.norm(trace[following]) if stage is None else trace[following]
    exact, kept = cache.here(found)[cache.valid].double(), cache.truth[cache.valid].double()
    return float((exact - kept).norm()) <= SAME[torch.finfo(cache.truth.dtype).bits == 16] * float(kept.norm())
