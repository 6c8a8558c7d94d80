"""Directions of streams as tokens.

An output direction is decoded like the last stream: through the linear part of the final norm (centering, gain) and the
unembedding, without biases. An input direction is compared with the embeddings by cosine, so that long embeddings are
not preferred (Golden, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.calculus import norm_jet
from tl_jets.core.decoder import Decoder
from tl_jets.core.logit_reader import TopTokens, check_k, top_tokens
from tl_jets.core.protocol import DECODER_STEP, FINAL_STREAM
from tl_jets.core.tokens import decode
from tl_jets.core.trace import Trace
from tl_jets.detached_map.composed_jacobian import LOGITS


@dataclass(frozen=True, eq=False)
class Directions:
    """Decodes directions at one input; `output` is their label: a stream, a write, `ln_final` or `logits`."""

    trace: Trace
    output: str

    @property
    def decoder(self) -> Decoder:
        """The model's decoder."""
        return self.trace.decoder

    @property
    def is_normalized(self) -> bool:
        """Whether the final norm is already applied: `ln_final`, and `logits` before the unembedding."""
        return self.output in (LOGITS, DECODER_STEP)

    def normalized(self, rows: Float[Tensor, "*many d_model"]) -> Float[Tensor, "*many d_model"]:
        """Directions after the linear part of the final norm, without its scale."""
        return rows if self.is_normalized else self.decoder.norm.scale(self.decoder.norm.center(rows))

    def scale(self, positions: Sequence[int]) -> Float[Tensor, "batch out_pos 1"]:
        """The final norm's own factor at output positions; 1 where it is already applied."""
        final = self.trace[FINAL_STREAM][:, list(positions)]
        if self.is_normalized:
            return torch.ones_like(final[..., :1])
        return norm_jet(self.decoder.norm, final, final, 0).alpha[0][..., None]

    def raised(self, rows: Float[Tensor, "*many width"], k: int) -> TopTokens:
        """The k tokens that directions raise most: rows of d_model, or logits as they are."""
        check_k(k, self.decoder.d_vocab)
        if self.output == LOGITS and rows.shape[-1] == self.decoder.d_vocab:
            best = rows.topk(k)
            return TopTokens(best.values, best.indices)
        return top_tokens(self.decoder, self.normalized(rows), bias_weight=0.0, k=k)

    def nearest(self, rows: Float[Tensor, "*many d_model"], k: int) -> TopTokens:
        """The k tokens whose embeddings have the largest cosine with input directions; values are cosines."""
        embedding = self.embedding().to(rows)
        check_k(k, len(embedding))
        cosines = torch.nn.functional.normalize(rows, dim=-1) @ torch.nn.functional.normalize(embedding, dim=-1).T
        best = cosines.topk(k)
        return TopTokens(best.values, best.indices)

    def texts(self, ids: Int[Tensor, "*many"], tokenizer: Any = None) -> Any:
        """Texts of ids as nested lists; the ids themselves where neither the caller nor the model has a tokenizer."""
        tokenizer = tokenizer or self.trace.network.tokenizer
        return ids.tolist() if tokenizer is None else decode(tokenizer, ids)

    @property
    def has_embedding(self) -> bool:
        """Whether there is an embedding matrix: not in a network of plain callables."""
        return hasattr(getattr(self.trace.network.view, "model", None), "W_E")

    def embedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """Each token's contribution to the first stream, without positions: W_E times the model's own factor.

        Raises:
            ValueError: The model has no embedding matrix, or does not put multiples of its rows into the stream.
        """
        if not self.has_embedding:
            raise ValueError("Input directions are read through W_E; a network of plain callables has none.")
        W_E: Tensor = self.trace.network.view.model.W_E  # pyright: ignore[reportAttributeAccessIssue]
        own = self.trace["embed"][self.trace.valid]
        W_E = W_E.detach().to(own)
        rows = W_E[self.trace.tokens[self.trace.valid]]
        factor = (rows * own).sum() / rows.square().sum()
        error = float((own - factor * rows).norm() / own.norm())
        if not error < 1e-3:
            raise ValueError(
                f"A token's embedding must be a multiple of its row of W_E; this model's is off by {error:.1e} (relative): "
                f"it normalizes its embeddings, or a hook edits them. Its input directions are not read."
            )
        return factor * W_E


def of_model(held: Any, what: str) -> Any:
    """A handle of a result; raises ValueError in a loaded one, where `what` needs the model."""
    if held is None:
        raise ValueError(
            f"{what} need the model, which a loaded result does not hold. Give it back: result.with_model(model, prompts)."
        )
    return held


def check_same(tokens: Tensor, values: Tensor, trace: Trace, found: Tensor) -> None:
    """Raise ValueError unless a trace has the tokens of a loaded result, and its values up to rounding."""
    exact, kept = found.double().cpu(), values.double().cpu()
    same = torch.equal(trace.tokens.cpu(), tokens.cpu()) and exact.shape == kept.shape
    if not same or not float((exact - kept).norm()) <= 1e-4 * float(kept.norm()):
        raise ValueError(
            "with_model takes the model and the whole input that the result was made of; got others. Pass the same prompts, "
            "in their order, and the weights of before."
        )
