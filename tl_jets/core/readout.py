"""The best tokens of many states, in chunks of rows. Ties go to the smallest token id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.decoder import Decoder
from tl_jets.core.logit_reader import CHUNK_SIZE, Reader, check_rows, check_sizes, slices, total_of
from tl_jets.core.tokens import decode


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The best tokens of each logit vector, best first, ties by smallest id; returned by `top_tokens(k)`.

    Attributes:
        values: Additive logits unless stated otherwise [*rows, k].
        indices: Token ids [*rows, k].
    """

    values: Float[Tensor, "*rows k"]
    indices: Int[Tensor, "*rows k"]

    def texts(self, tokenizer: Any) -> Any:
        """The tokens as texts, nested lists of shape [*rows, k], by a Hugging Face tokenizer; None at padding."""
        return decode(tokenizer, self.indices)


@torch.no_grad()
def top_tokens(
    decoder: Decoder,
    states: Float[Tensor, "*rows d_model"],
    bias_weight: float | Float[Tensor, "*#rows"] = 1.0,
    k: int = 5,
    *,
    log_probs: bool = False,
    chunk_size: int = CHUNK_SIZE,
) -> TopTokens:
    """The k best tokens of each state (an input of the unembedding) [*rows, k], `chunk_size` rows at once.

    Args:
        decoder: The model's decoder.
        states: Inputs of the unembedding [*rows, d_model].
        bias_weight: Multiple of `b_U`: a number, or one per row [*rows].
        k: Number of tokens.
        log_probs: Return log-probabilities (after the model's transform) instead of additive logits.
        chunk_size: Rows of d_vocab logits held at once.

    Raises:
        ValueError: The width of `states` is not d_model, k or chunk_size is out of range, or a state is not finite.
    """
    decoder.check_states(states)
    check_sizes(k, decoder.d_vocab, chunk_size)
    check_rows("states", states, tuple(states.shape), "*rows, d_model")
    rows = states.shape[:-1]
    reader = Reader(decoder, decoder.compute_dtype(states), states.device)
    flat = states.reshape(-1, decoder.d_model)
    weights = torch.as_tensor(bias_weight, dtype=reader.dtype, device=states.device).expand(rows).reshape(-1, 1)
    values = torch.empty(len(flat), k, dtype=reader.dtype, device=states.device)
    indices = torch.empty(len(flat), k, dtype=torch.long, device=states.device)
    bias = decoder.constant(None, reader.dtype)
    buffer = reader.buffer(min(chunk_size, len(flat)))
    for chunk in slices(len(flat), chunk_size):
        decoder.project(flat[chunk], buffer[: chunk.stop - chunk.start, : decoder.d_vocab])
        for part in slices(chunk.stop - chunk.start, reader.scratch_rows):
            cells = slice(chunk.start + part.start, chunk.start + part.stop)
            logits = buffer[part]
            logits[:, : decoder.d_vocab].addcmul_(weights[cells], bias)
            reader.floor(logits)
            values[cells], indices[cells] = reader.top(logits, k)
            if log_probs:
                values[cells] = decoder.transformed(values[cells])
                shift = reader.shift(logits, values[cells, 0])
                log_total = (shift + total_of(logits.exp2_()).log2()) / reader.log2_e
                values[cells] -= log_total.to(reader.dtype).unsqueeze(-1)
    return TopTokens(values.reshape(*rows, k), indices.reshape(*rows, k))
