"""All logits of one layer and order of an iterative lens: mixed again from its coefficients and the streams of a trace."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.logit_reader import CHUNK_SIZE
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.selection import positions_at
from tl_jets.core.trace import Trace

# Rounding of logits against those that the lens kept, relative to the largest.
SAME = 1e-3


@torch.no_grad()
def logits_of_layer(
    lens: Any, trace: Trace, order: int | None, as_log_probs: bool
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits, or log-probabilities, of the only layer of a lens at an order; NaN at padding.

    Rows are read in chunks, so that nothing but the result has d_vocab columns at all positions.
    """
    if lens.translator is not None:
        raise ValueError(
            f"Logits are mixed again from the streams of a trace; {lens.translator!r} translated them. Translate the "
            f"stream, and read it: decoder.logits(decoder.norm(stream))."
        )
    order = lens.orders[-1] if order is None else order
    if order not in lens.orders:
        raise ValueError(f"order must be one of {lens.orders}, what the lens was run with; got {order!r}.")
    k, decoder, norm = lens.orders.index(order), trace.decoder, trace.decoder.norm
    at = _cells(lens, trace)
    own, final = trace[lens.labels[0]], trace[FINAL_STREAM]
    alpha, beta = (values[0, k][lens.valid].to(final)[:, None] for values in (lens.alpha, lens.beta))
    best, values = (x[0, k][lens.valid].to(final.device) for x in (lens.top_ids, lens.full_values))
    found = final.new_full((*lens.valid.shape, decoder.d_vocab), float("nan"))
    batch, cell = (index.to(final.device) for index in lens.valid.nonzero().T)
    for rows in torch.arange(len(batch), device=final.device).split(CHUNK_SIZE):
        places = tuple(index[rows] for index in at)
        x, y = (norm.scale(norm.center(stream[places])) for stream in (own, final))
        states = alpha[rows] * x + beta[rows] * y
        logits = decoder.logits(states if norm.bias is None else states + norm.bias)
        error = (logits.gather(-1, best[rows]) - values[rows]).abs().max()
        if not float(error) <= SAME * float(values[rows].abs().max()):
            raise ValueError(
                f"The trace must be of the lens' model and input; its logits differ from those that the lens kept by up to "
                f"{float(error):.2g}. Trace the same prompts, in order, on the same model."
            )
        logits = decoder.transformed(logits).log_softmax(-1) if as_log_probs else logits
        found[batch[rows], cell[rows]] = logits.to(found)
    return found


def _cells(lens: Any, trace: Trace) -> tuple[Tensor, Tensor]:
    """Prompt and padded position in the trace of every real cell of the lens, whose tokens must be the same."""
    batch, cell = lens.valid.nonzero().T
    places = torch.tensor(positions_at(lens.positions, batch, cell), device=trace.valid.device)
    own = batch.to(places.device)
    if len(lens.valid) == len(trace.valid):
        counted = trace.valid.cumsum(1)[own].contiguous()
        index = torch.searchsorted(counted, places[:, None] + 1)[:, 0]
        if bool((index < trace.valid.shape[1]).all()):
            tokens = trace.tokens[own, index]
            if torch.equal(tokens.to(lens.tokens.device), lens.tokens[lens.valid]):
                return own, index
    raise ValueError(
        f"The trace must be of the lens' prompts, {list(lens.tokens.shape)} tokens of them, in order; it has other tokens, "
        f"{list(trace.tokens.shape)}. Trace the prompts that the lens was run on."
    )
