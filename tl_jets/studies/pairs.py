r"""Exact scores of given bi-grams, the base of the other studies.

.. math::
    \text{score}(z_2 | z_1) = \log \mathrm{softmax}\bigl(\upsilon(x_{\text{path}}(z_1))\bigr)_{z_2}

as in `tl_jets.ngrams.bigrams`, of the pairs that a user asks for: each distinct first token is read once, in float64, `ROWS` of
them at a time, so that no V x V matrix is held. Tables and these scores are the same numbers.

Cost: distinct first tokens * d_vocab * d_model multiply-adds in float64; memory about 3 * `ROWS` rows of logits.

Example:
    >>> import tl_jets as tj
    >>> table = pair_scores(tj.load_tinydocs(), [(" more", " than"), (" more", " of")], path="mlps")
    >>> [table.names[i] for i in table.ids[0].tolist()]
    [' more', ' than']
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.logit_reader import slices
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.tokens import token_names
from tl_jets.ngrams import VocabularyStreams, fingerprint
from tl_jets.ngrams.scan import SCORES, Score, exact_logits, log_parts
from tl_jets.ngrams.streams import PathInput
from tl_jets.ngrams.tables import NgramTable
from tl_jets.studies.vocabularies import check_table

PairInput = NgramTable | Tensor | Sequence[Sequence[str | int]]
Tokenize = Callable[[str], Sequence[int]]

# First tokens whose logits are held in float64 at a time: 26 MB of them for GPT-2.
ROWS = 64


class RowScores:
    """Scores of every second token after some first tokens, along one path, in float64.

    Args:
        model: A model or a `ResidualNetwork`.
        path: As `jet_bigrams` takes it.
        score: `"logprob"` (nats) or `"logit"`.

    Attributes:
        network: The network at sublayer granularity.
        path: The path's label.
        score: As given.
        d_vocab: How many second tokens there are.
        n_tokens: How many first tokens there are.

    Raises:
        ValueError: The path mixes positions or does not exist, or `score` is unknown.
    """

    def __init__(self, model: Any, path: PathInput = "direct", *, score: Score = "logprob"):
        if score not in SCORES:
            raise ValueError(f"score must be one of {SCORES}; got {score!r}.")
        self.streams = VocabularyStreams(model, [path])
        (self.path,) = self.streams.paths
        self.network, self.score = self.streams.network, score
        self.d_vocab, self.n_tokens = self.network.decoder.d_vocab, self.streams.n_tokens

    @cached_property
    def fingerprint(self) -> str:
        """The model's fingerprint."""
        return fingerprint(self.network)

    @torch.no_grad()
    def read(self, first: Int[Tensor, " row"]) -> tuple[Float[Tensor, "row d_vocab"], Float[Tensor, " row"]]:
        """Scores of all second tokens after a few first tokens, and log-normalizers of the rows.

        Raises:
            ValueError: A logit is not finite.
        """
        logits = exact_logits(self.network.decoder, self.streams.states(self.streams.embed(first), self.path))
        top, rest = log_parts(logits)
        if not bool(logits.isfinite().all()):
            bad = first[~logits.isfinite().all(1).to(first.device)][:5].tolist()
            raise ValueError(
                f"Every logit must be finite; those of tokens {bad} are not. Look at the model's weights, its precision "
                "(float16 overflows), and the hooks on it."
            )
        if self.score == "logprob":
            logits = (logits - top.unsqueeze(1)) - rest.unsqueeze(1)
        return logits, top + rest

    def chunks(self, first: Int[Tensor, " row"]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(first tokens, scores, log-normalizers) of `ROWS` first tokens at a time."""
        for part in slices(len(first), ROWS):
            yield first[part], *self.read(first[part])

    def of(self, pairs: Int[Tensor, "pair 2"]) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        """Scores of some pairs, and the log-normalizers of their first tokens, in the order of the pairs; on the CPU."""
        first, row = pairs[:, 0].unique(return_inverse=True)
        scores = torch.empty(len(pairs), dtype=torch.float64, device="cpu")
        log_normalizers = torch.empty_like(scores)
        order = row.argsort(stable=True)
        done = 0
        for ids, found, normalizers in self.chunks(first):
            stop = int(torch.searchsorted(first[row[order]], ids[-1], right=True))
            mine = order[done:stop]
            local = row[mine] - int(row[mine].min())
            scores[mine] = found.cpu()[local, pairs[mine, 1]]
            log_normalizers[mine] = normalizers.cpu()[local]
            done = stop
        return scores, log_normalizers


def pair_scores(model: Any, pairs: PairInput, *, path: PathInput = "direct", score: Score = "logprob") -> NgramTable:
    """Exact scores of given bi-grams along a path.

    Args:
        model: A model or a `ResidualNetwork`.
        pairs: Ids [pair, 2], a list of pairs of ids or of texts that are one token each, or a table of bi-grams.
        path: As `jet_bigrams` takes it: `"direct"`, MLP steps, or `"mlps"`.
        score: `"logprob"` (nats) or `"logit"`.

    Returns:
        The pairs, best first, with the parts `given` (the place of a pair in the list) and, for log-probabilities,
        `log_normalizer`.

    Raises:
        ValueError: Pairs are not pairs, a text is not one token, an id is not of the vocabulary, or the path mixes positions.

    Source:
        Chen et al., arXiv 2410.06024, section 5.2 (scores of given n-grams).

    Cost:
        Distinct first tokens * d_vocab * d_model multiply-adds in float64.

    Example:
        >>> import tl_jets as tj
        >>> pair_scores(tj.load_tinydocs(), [[40, 41], [7, 9]], path=["0_mlp", "3_mlp"]).ids.shape
        torch.Size([2, 2])
    """
    reader = RowScores(model, path, score=score)
    ids = read_pairs(reader, pairs)
    scores, log_normalizers = reader.of(ids)
    parts = {"given": torch.arange(len(ids), device="cpu").double()}
    if score == "logprob":
        parts["log_normalizer"] = log_normalizers
    return NgramTable.ranked(
        ids,
        scores,
        names=token_names(reader.network.tokenizer, [ids]),
        path=reader.path,
        settings={"ngram": "given bi-grams", "score": score, "list": list_digest(ids)},
        fingerprint=reader.fingerprint,
        parts=parts,
    )


def read_pairs(reader: RowScores, pairs: PairInput, *, tokenize: Tokenize | None = None) -> Int[Tensor, "pair 2"]:
    """Ids of given pairs, checked."""
    if isinstance(pairs, NgramTable):
        check_table(pairs, reader.network)
        pairs = pairs.ids
    if not isinstance(pairs, Tensor):
        for pair in pairs:
            if isinstance(pair, str) or len(pair) != 2:
                raise ValueError(
                    f"A bi-gram is two tokens; got {pair!r}. Give pairs of ids, or of texts of one token each."
                )
        tokenize = tokenize or tokenizer_of(reader.network)
        rows = [[_one_token(tokenize, x) if isinstance(x, str) else int(x) for x in pair] for pair in pairs]
        pairs = torch.tensor(rows, dtype=torch.long, device="cpu").reshape(-1, 2)
    if (
        pairs.ndim != 2
        or pairs.shape[1] != 2
        or not len(pairs)
        or pairs.is_floating_point()
        or pairs.dtype is torch.bool
    ):
        raise ValueError(
            f"Pairs must be ids [pair, 2], one at least; got {pairs.dtype} {tuple(pairs.shape)}. Each row is a bi-gram."
        )
    pairs = pairs.detach().cpu().long()
    for name, column, size in (("first", pairs[:, 0], reader.n_tokens), ("second", pairs[:, 1], reader.d_vocab)):
        if int(column.min()) < 0 or int(column.max()) >= size:
            raise ValueError(
                f"The {name} tokens of pairs must be ids in 0..{size - 1}; got {int(column.min())}..{int(column.max())}. "
                "Are they of another vocabulary?"
            )
    return pairs


def tokenizer_of(network: ResidualNetwork) -> Tokenize:
    """The model's tokenizer as a function from a text to ids, without special tokens."""

    def tokenize(text: str) -> Sequence[int]:
        if network.tokenizer is None:
            raise ValueError(f"Text needs a tokenizer; the model has none. Give the ids of {text!r}, or tokenize=...")
        return network.tokenizer(text, add_special_tokens=False)["input_ids"]

    return tokenize


def _one_token(tokenize: Tokenize, text: str) -> int:
    ids = list(tokenize(text))
    if len(ids) != 1:
        raise ValueError(
            f"A text of a pair must be one token; {text!r} is {len(ids)}: {ids[:6]}. Mind the leading space, or give ids."
        )
    return int(ids[0])


def list_digest(ids: Int[Tensor, "row n"]) -> dict[str, Any]:
    """A list of n-grams in few words: how many, and the sha256 of its ids in sorted order."""
    rows = sorted(map(tuple, ids.tolist()))
    return {
        "count": len(rows),
        "sha256": hashlib.sha256(torch.tensor(rows, device="cpu").numpy().tobytes()).hexdigest(),
    }
