"""What a `JetCache` answers to TransformerLens' names: activations of the run, and its terms where the stream stands."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tl_jets.core.labels import LabelInput


def activation(cache: Any, name: LabelInput) -> Tensor:
    """What the trace has under a name at the cells of a cache; the stream that the stage writes to is the sum of the terms.

    Raises ValueError for names that the trace does not know, and for patterns of some positions.
    """
    trace, stage = cache.traced("Activations"), cache.expansion.stage
    if stage is not None and trace.network.view.inner_stage(name) is None:
        network = cache.expansion.network
        if network.label(name) == network.next_stream(stage):
            return cache.stack().sum(0)
    values = trace[name]
    if cache.positions is not None and values.shape[-2:] == (trace.tokens.shape[1],) * 2:
        raise ValueError(f"Attention patterns of some positions are ambiguous; index the trace: cache.trace[{name!r}].")
    return cache.here(values)
