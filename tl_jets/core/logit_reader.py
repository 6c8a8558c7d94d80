"""The engine for logits over W_U: best tokens, normalizers, expectations, ranks, and bounds of rounding errors.

`Reader` reads rows of logits, padded to whole blocks; `top_tokens`, the lenses (`lens_logits`), n-grams and comparisons
of models use it. `CHUNK_SIZE` rows of d_vocab logits are held at once. Ties go to the smallest token id.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.decoder import Decoder
from tl_jets.core.row_checks import check_rows
from tl_jets.core.tokens import decode

# Vocabulary-sized rows held at once; for fewer rows, reading W_U dominates the product.
CHUNK_SIZE = 448
# Width of the blocks whose maxima are compared first: a multiple of every vector width.
BLOCK = 128
# Logits processed at a time: as many as fit the caches of two cores, or fill an accelerator.
SCRATCH_CPU, SCRATCH_DEVICE = 2**21, 2**25
LOG2_E = math.log2(math.e)
# Below this, float32 rounds products with log2(e) by less than a thousandth of a bit.
LARGE = 2.0**13
# Rows of float64 temporaries.
ROWS_OF_TEMPORARIES = 16
# Scores that agree in so many bits are ties; the others depend on the order of summation.
SCORE_BITS = 40
# Number of layers (or other sets of rows) that share a product with W_U.
MAX_SETS = 14


class Reader:
    """Reads logit vectors padded to a multiple of BLOCK; padding never ranks among the best and has no weight."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype, device: torch.device, bias: Tensor | None = None) -> None:
        # With the columns of a half-precision model converted once, where they fit.
        self.decoder, self.dtype, self.device = decoder.converted(dtype), dtype, device
        self.width = -(-decoder.d_vocab // BLOCK) * BLOCK
        limit = SCRATCH_CPU if device.type == "cpu" else SCRATCH_DEVICE
        self.scratch_rows = max(1, limit // self.width)
        self.scratch = self.mask = self.buffer(0)
        # Whether logits have a constant part: the norm's bias or b_U.
        self.has_constant = decoder.has_bias or (bias is not None and bool(bias.any()))
        # Finite, so that 0 times it is 0, and finite after multiplication by log2(e).
        self.lowest = torch.finfo(dtype).min / 4
        # Rounded as the kernels round it, so that scaling back uses the same number.
        self.log2_e = torch.tensor(LOG2_E, dtype=dtype, device="cpu").item()

    def buffer(self, rows: int) -> Tensor:
        """Uninitialized rows of padded logits, with zeros in the padding."""
        buffer = torch.empty(rows, self.width, dtype=self.dtype, device=self.device)
        buffer[:, self.decoder.d_vocab :] = 0
        return buffer

    def floor(self, logits: Tensor) -> Tensor:
        """Set the padding below every token, in place."""
        if self.width > self.decoder.d_vocab:
            logits[..., self.decoder.d_vocab :] = self.lowest
        return logits

    def allocate(
        self, cells: tuple[int, ...], k: int, n_targets: int, measures: bool, *, own: bool = False
    ) -> dict[str, Tensor]:
        """Allocate readings of all cells; with `own`, also those of the own part."""

        def empty(dtype: torch.dtype, *last: int) -> Tensor:
            return torch.empty(*cells, *last, dtype=dtype, device=self.device)

        store = {"values": empty(self.dtype, k), "indices": empty(torch.long, k)}
        if measures:
            store |= {name: empty(torch.float64) for name in ("shift", "expected", "total")}
        if n_targets:
            store |= {"target_logits": empty(self.dtype, n_targets), "target_ranks": empty(torch.long, n_targets)}
        if own:
            store |= {"own_values": empty(self.dtype, k)} | ({"own_top1": empty(torch.long)} if measures else {})
        return store

    def read_model(
        self, mix: tuple[Tensor, Tensor, Tensor], targets: Tensor | None, store: dict[str, Tensor]
    ) -> Tensor:
        """Read the model's own logits, `constant + gamma * shared`. Returns their probabilities, zero in the padding."""
        constant, gamma, shared = mix
        probabilities = self.buffer(len(shared) if "total" in store else 0)
        for part in slices(len(shared), self.scratch_rows):
            logits = self.mix(constant, gamma[:, part], shared[part])
            view = {name: x[:, part] for name, x in store.items()}
            self.finish(logits, None if targets is None else targets[part], probabilities[part], view, is_model=True)
        return probabilities

    def read(
        self,
        mix: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        targets: Tensor | None,
        probabilities: Tensor,
        store: dict[str, Tensor],
        plain: int = 0,
        is_positive: Tensor | None = None,
    ) -> None:
        """Read `constant + alpha * own + beta * shared` into `store`; the first `plain` orders lack `shared`.

        `is_positive`, on the CPU, says for which rows alpha is positive at all orders.
        """
        constant, alpha, own, beta, shared = mix
        for part in slices(len(own), max(1, self.scratch_rows // len(alpha))):
            logits = self.mix(constant, alpha[:, part], own[part])
            view = {name: x[:, part] for name, x in store.items()}
            # Without a constant, positive multiples of the own part share the best token of order 0.
            alike = plain > 0 and not self.has_constant and is_positive is not None and bool(is_positive[part].all())
            if plain < len(alpha):
                if "own_top1" in store and not alike:
                    view["own_top1"][plain:] = self.top1(logits[plain:])[1]
                logits[plain:].addcmul_(beta[plain:, part], shared[part])
            self.finish(logits, None if targets is None else targets[part], probabilities[part], view)
            if "own_top1" in store:
                view["own_top1"][:plain] = view["indices"][:plain, ..., 0]
                if alike:
                    view["own_top1"][plain:] = view["own_top1"][0]
            if "own_values" in store:
                borrowed = shared[part].expand_as(logits).gather(-1, view["indices"])
                torch.addcmul(view["values"], beta[:, part], borrowed, value=-1, out=view["own_values"])

    def finish(
        self,
        logits: Tensor,
        targets: Tensor | None,
        probabilities: Tensor,
        store: dict[str, Tensor],
        *,
        is_model: bool = False,
    ) -> None:
        """Read [order, row, width] logits and overwrite them; of the model's own, fill in `probabilities`."""
        top = self.read_top(logits, targets, store)
        if "total" not in store:
            return
        store["shift"].copy_(self.shift(logits, top))
        if is_model:
            store["total"].copy_(total_of(torch.exp2(logits[0], out=probabilities)))
            probabilities /= store["total"][0].unsqueeze(-1).to(self.dtype)
        store["expected"].copy_(self.expectation(logits, probabilities))
        if not is_model:
            store["total"].copy_(total_of(logits.exp2_()))

    def rows(self, count: int) -> Tensor:
        """Rows of the scratch buffer."""
        if len(self.scratch) < count:
            self.scratch = self.buffer(count)
        return self.scratch[:count]

    def mix(self, constant: Tensor, coefficient: Tensor, logits: Tensor) -> Tensor:
        """`constant + coefficient * logits`, [order, row, 1] times [row, width], in the scratch buffer."""
        orders, rows, _ = coefficient.shape
        scratch = self.rows(orders * rows).view(orders, rows, self.width)
        if not self.has_constant and self.width == self.decoder.d_vocab:  # a third faster
            return torch.mul(coefficient, logits, out=scratch)
        return torch.addcmul(constant, coefficient, logits, out=scratch)

    def read_top(self, logits: Tensor, targets: Tensor | None, store: dict[str, Tensor]) -> Tensor:
        """Store the best tokens, and the targets' logits and ranks. Returns the largest transformed logits."""
        values, indices = self.top(logits, store["indices"].shape[-1])
        store["values"].copy_(values)
        store["indices"].copy_(indices)
        if targets is not None:
            for i, target in enumerate(targets.unbind(1)):
                value = logits.gather(-1, target[None, :, None].expand(len(logits), -1, 1))
                store["target_logits"][..., i] = value.squeeze(-1)
                store["target_ranks"][..., i] = self.rank(logits, value, target)
        return self.decoder.transformed(values[..., 0])

    def top1(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit and its smallest id (`max` returns the first of equals)."""
        blocks = logits.unflatten(-1, (-1, BLOCK))
        value, block = blocks.amax(-1).max(-1)
        position = blocks.gather(-2, block[..., None, None].expand(*block.shape, 1, BLOCK)).squeeze(-2).max(-1).indices
        return value, position.add_(block, alpha=BLOCK)

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits, ties by smallest id: first the k best blocks, then their tokens."""
        if k == 1:
            value, token = self.top1(logits)
            return value.unsqueeze(-1), token.unsqueeze(-1)
        blocks = logits.unflatten(-1, (-1, BLOCK))
        if k * 2 > blocks.shape[-2]:
            return first_of(logits, k)
        # Blocks are in order of ids: the k best blocks contain the k best tokens, ties included.
        block = first_of(blocks.amax(-1), k)[1].sort(-1).values
        tokens = blocks.gather(-2, block.unsqueeze(-1).expand(*block.shape, BLOCK)).flatten(-2)
        values, position = first_of(tokens, k)
        return values, block.gather(-1, position // BLOCK) * BLOCK + position % BLOCK

    def rank(self, logits: Tensor, value: Tensor, target: Tensor) -> Tensor:
        """Rank of `target`: the number of tokens with a larger logit, or an equal one and a smaller id."""
        # Compare into floats: on a CPU, sums of booleans take five times as long. Exact up to 2^24.
        if self.mask.shape != self.scratch.shape:
            self.mask = self.buffer(len(self.scratch))
        mask = self.mask[: logits.shape[0] * logits.shape[1]].view(logits.shape)
        larger = torch.gt(logits, value, out=mask).sum(-1)
        is_before = (torch.arange(self.width, device=self.device) < target[:, None]).to(self.dtype)
        # [row, order, width] times [row, width, 1]: as quick as a sum, and no wait for a device to find the ties.
        before = torch.eq(logits, value, out=mask).transpose(0, 1) @ is_before.unsqueeze(-1)
        return (larger + before.squeeze(-1).T).long()

    def shift(self, logits: Tensor, top: Tensor) -> Tensor:
        """Convert logits to (transform(logits) - top) * log2(e) in place; return the rounded top * log2(e)."""
        if self.decoder.transform is not None:
            logits.copy_(self.decoder.transformed(logits))
            self.floor(logits)
        # A device is not asked: it would have to be waited for.
        if logits.device.type != "cpu" or float(top.abs().max()) > LARGE:
            # Rounding of top * log2(e) would shift the sum of powers by many bits, so use one more pass.
            logits.sub_(top.unsqueeze(-1)).mul_(self.log2_e)
            return top.double() * self.log2_e
        shift = top * self.log2_e
        torch.add(-shift.unsqueeze(-1), logits, alpha=self.log2_e, out=logits)
        return shift.double()

    def expectation(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """Expectation under [row, width] probabilities, float64; one float32 dot product would be off by 1e-5."""
        orders, rows, _ = logits.shape
        pieces = logits.view(orders, rows * BLOCK, -1).permute(1, 2, 0)
        return torch.bmm(probabilities.view(rows * BLOCK, 1, -1), pieces).view(rows, BLOCK, orders).double().sum(1).T

    @cached_property
    def _largest(self) -> tuple[float, float]:
        """The length of the longest column of `W_U`, and the largest bias, times the logit scale."""
        columns = (x for _, x in self.decoder.columns(self.dtype))
        longest = max(float(torch.linalg.vector_norm(x, dim=0).max()) for x in columns)
        scale = abs(self.decoder.logit_scale)
        return longest * scale, float(self.decoder.b_U.abs().max()) * scale

    def errors(self, states: Float[Tensor, "row d_model"]) -> Float[Tensor, " row"]:
        """Bound of the rounding error of each row's additive logits, that of a dot product."""
        column, bias = self._largest
        roundoff = torch.finfo(self.dtype).eps / 2
        length = torch.linalg.vector_norm(states.to(self.dtype), dim=1)
        return (states.shape[1] + 32) * roundoff * length * column + 8 * roundoff * bias


def log_parts(logits: Float[Tensor, "row column"]) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """The largest logit of each row, and log1p(sum of exp(others - largest)); log-normalizers are their sum."""
    top, position = logits.max(1)
    rest = torch.empty_like(top)
    for part in slices(len(logits), ROWS_OF_TEMPORARIES):
        others = (logits[part] - top[part].unsqueeze(1)).exp_().scatter_(1, position[part].unsqueeze(1), 0.0)
        rest[part] = others.sum(1).log1p()
    return top, rest


def check_finite(scores: Float[Tensor, " row"], ids: Int[Tensor, " row"], what: str = "Every logit") -> None:
    """Raise ValueError, with the ids of their rows, if scores (or other values, named by `what`) are not finite."""
    finite = scores.isfinite().to(ids.device)
    if not bool(finite.all()):
        raise ValueError(
            f"{what} must be finite; those of tokens {ids[~finite][:5].tolist()} are not. Look at the model's weights, "
            "its precision (float16 overflows), and the hooks on it."
        )


def first_of(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and positions of the k largest by (value, smallest position); `topk` orders ties arbitrarily."""
    if values.device.type != "cpu":  # to look for ties, a device would have to be waited for
        ordered, order = values.sort(dim=-1, descending=True, stable=True)
        return ordered[..., :k].contiguous(), order[..., :k].contiguous()
    top, position = values.topk(min(k + 1, values.shape[-1]))
    tied = (top[..., 1:] == top[..., :-1]).any(-1)
    top, position = top[..., :k].contiguous(), position[..., :k].contiguous()
    if tied.any():
        ordered, order = values[tied].sort(dim=-1, descending=True, stable=True)
        top[tied], position[tied] = ordered[..., :k], order[..., :k]
    return top, position


def total_of(values: Tensor) -> Tensor:
    """Sum over the padded vocabulary, with BLOCK pieces added in float64."""
    return values.unflatten(-1, (BLOCK, -1)).sum(-1).double().sum(-1)


def slices(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of nearly equal size, at most `size`, that cover `total`."""
    count = max(1, -(-total // size))
    for i in range(count):
        yield slice(total * i // count, total * (i + 1) // count)


def rank(ids: Int[Tensor, "row n"], scores: Float[Tensor, " row"]) -> Int[Tensor, " row"]:
    """The order by (score, ids), best first; scores whose leading 40 bits agree are ties."""
    order = torch.arange(len(scores), device=scores.device)
    # Stable sorts from the last key to the first.
    for column in reversed(ids.unbind(1)):
        order = order[column[order].sort(stable=True).indices]
    return order[rounded(scores)[order].sort(stable=True, descending=True).indices]


def rounded(scores: Float[Tensor, "*row"]) -> Float[Tensor, "*row"]:
    """Scores in float64, rounded to their leading 40 bits."""
    mantissa, exponent = torch.frexp(scores.double())
    return torch.ldexp((mantissa * 2**SCORE_BITS).round(), exponent - SCORE_BITS)


def check_k(k: Any, d_vocab: int, chunk_size: int = 1) -> None:
    """Raise unless k is a number of tokens and chunk_size one of rows; catches a tokenizer, which some tables take."""
    if not hasattr(k, "__index__"):
        raise TypeError(
            f"k must be the number of tokens; got {type(k).__name__}. For their texts: top_tokens(k).texts(tokenizer)."
        )
    if not 1 <= k <= d_vocab:
        raise ValueError(f"k must be between 1 and d_vocab = {d_vocab}, got {k}. Ask for fewer tokens.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}. It counts rows of d_vocab logits.")


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
    check_k(k, decoder.d_vocab, chunk_size)
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
        reader.decoder.project(flat[chunk], buffer[: chunk.stop - chunk.start, : decoder.d_vocab])
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
