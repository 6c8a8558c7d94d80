r"""Exact scores of given bi-grams, the basis of the other studies.

.. math::
    \text{score}(z_2 | z_1) = \log \mathrm{softmax}\bigl(\upsilon(x_{\text{path}}(z_1))\bigr)_{z_2}

as in `tl_jets.ngrams.bigrams`, with equal results. Each distinct first token is evaluated once in float64, `ROWS` at a
time, so that no V x V matrix is stored. Cost: distinct first tokens * d_vocab * d_model multiply-adds in float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.decoder import exact_logits
from tl_jets.core.logit_reader import check_finite, log_parts, slices
from tl_jets.core.options import check_choice
from tl_jets.core.tokens import token_names
from tl_jets.ngrams import VocabularyStreams, fingerprint
from tl_jets.ngrams.scoring import Scoring
from tl_jets.ngrams.streams import PathInput, Tokenize, one_token, tokenizing
from tl_jets.ngrams.tables import NgramTable
from tl_jets.studies.vocabularies import check_table

PairScore = Literal["logprob", "logit", "centered"]
PairInput = NgramTable | Tensor | Sequence[Sequence[str | int]]

# First tokens whose logits are held in float64 at a time: 26 MB for GPT-2.
ROWS = 64


class RowScores:
    """Scores of all second tokens after given first tokens, along one path, in float64.

    Args:
        model: A model or a `ResidualNetwork`.
        path: A path, as in `jet_bigrams`.
        score: `"logprob"` (nats), `"logit"`, or `"centered"` (a logit minus its mean over the vocabulary).

    Raises:
        ValueError: The path mixes positions or does not exist, or `score` is unknown.
    """

    def __init__(self, model: Any, path: PathInput = "direct", *, score: PairScore = "logprob"):
        check_choice("score", score, get_args(PairScore))
        self.streams = VocabularyStreams(model, [path])
        (self.path,) = self.streams.paths
        self.network, self.score = self.streams.network, score
        self._scoring = Scoring(score)
        self.d_vocab, self.n_tokens = self.network.decoder.d_vocab, self.streams.n_tokens

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the model's weights."""
        return fingerprint(self.network)

    @torch.no_grad()
    def read(self, first: Int[Tensor, " row"]) -> tuple[Float[Tensor, "row d_vocab"], Float[Tensor, " row"]]:
        """Scores of all second tokens after some first tokens, and log-normalizers; ValueError if not finite."""
        logits = exact_logits(self.network.decoder, self.streams.states(self.streams.embed(first), self.path))
        top, rest = log_parts(logits)
        check_finite(logits.sum(1), first)
        return self._scoring.scores(logits, top, rest), top + rest

    def of(self, pairs: Int[Tensor, "pair 2"]) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        """Scores of pairs, and log-normalizers of their first tokens, in the order of the pairs; on the CPU."""
        scores = torch.empty(len(pairs), dtype=torch.float64, device="cpu")
        log_normalizers = torch.empty_like(scores)
        for found, normalizers, row, mine in self.rows(pairs[:, 0]):
            scores[mine] = found.cpu()[row, pairs[mine, 1]]
            log_normalizers[mine] = normalizers.cpu()[row]
        return scores, log_normalizers

    def rows(self, first: Int[Tensor, " token"]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Read each distinct token of a list once, `ROWS` at a time.

        Yields:
            Scores [row, d_vocab], log-normalizers [row], and, for the tokens that were read, their rows and places in the list.
        """
        distinct, row = first.unique(return_inverse=True)
        parts = list(slices(len(distinct), ROWS))
        chunk = torch.bucketize(row, torch.tensor([part.stop for part in parts], device="cpu"), right=True)
        for part, mine in zip(parts, chunk.argsort(stable=True).split(chunk.bincount().tolist()), strict=True):
            yield *self.read(distinct[part]), row[mine] - part.start, mine

    def table(
        self, ids: Int[Tensor, "pair 2"], scores: Float[Tensor, " pair"], parts: dict[str, Tensor], **settings: Any
    ) -> NgramTable:
        """A table of bi-grams along this path, best first."""
        settings = {"ngram": "given bi-grams", "score": self.score} | settings
        about = {"path": self.path, "settings": settings, "fingerprint": self.fingerprint}
        return NgramTable.ranked(ids, scores, names=token_names(self.network.tokenizer, [ids]), parts=parts, **about)


def pair_scores(
    model: Any, pairs: PairInput, *, path: PathInput = "direct", score: PairScore = "logprob"
) -> NgramTable:
    """Exact scores of given bi-grams along a path.

    Args:
        model: A model or a `ResidualNetwork`.
        pairs: Ids [pair, 2], a list of pairs of ids or of one-token texts, or a table of bi-grams.
        path: A path, as in `jet_bigrams`: `"direct"`, `"mlps"`, or MLPs and heads.
        score: `"logprob"` (nats), `"logit"`, or `"centered"` (a logit minus its mean over the vocabulary).

    Returns:
        The pairs, best first, with the parts `given` (index in the list) and, for log-probabilities, `log_normalizer`.

    Raises:
        ValueError: Malformed pairs, a text that is not one token, an unknown id, or a path that mixes positions.

    Source: Chen et al., arXiv 2410.06024, section 5.2 (scores of given n-grams).

    Example:
        >>> import tl_jets as tj
        >>> table = pair_scores(tj.load_tinydocs(), [(" more", " than"), (" more", " of")], path="mlps")
        >>> [table.names[i] for i in table.ids[0].tolist()]
        [' more', ' than']
    """
    reader = RowScores(model, path, score=score)
    ids = read_pairs(reader, pairs)
    scores, log_normalizers = reader.of(ids)
    parts = {"given": torch.arange(len(ids), device="cpu").double()}
    if score == "logprob":
        parts["log_normalizer"] = log_normalizers
    return reader.table(ids, scores, parts, list=list_digest(ids))


def read_pairs(reader: RowScores, pairs: PairInput, *, tokenize: Tokenize | None = None) -> Int[Tensor, "pair 2"]:
    """Check given pairs and convert them to ids."""
    if isinstance(pairs, NgramTable):
        check_table(pairs, reader.network)
        pairs = pairs.ids
    if not isinstance(pairs, Tensor):
        odd = [pair for pair in pairs if isinstance(pair, str) or len(pair) != 2]
        if odd:
            raise ValueError(
                f"A bi-gram is two tokens; got {odd[0]!r}. Give pairs of ids, or of texts of one token each."
            )
        tokenize = tokenize or tokenizing(reader.network.tokenizer)
        rows = [[one_token("a pair", x, tokenize) if isinstance(x, str) else int(x) for x in pair] for pair in pairs]
        pairs = torch.tensor(rows, dtype=torch.long, device="cpu").reshape(-1, 2)
    whole = not pairs.is_floating_point() and pairs.dtype is not torch.bool
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs) or not whole:
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


def with_shuffles(pairs: Int[Tensor, "pair 2"], count: int, seed: int) -> Int[Tensor, "list pair 2"]:
    """A list of bi-grams, then `count` controls of it: the same first tokens, second tokens permuted."""
    draw = np.random.default_rng(seed)
    first, second = pairs.unbind(1)
    seconds = [second, *(second[torch.from_numpy(draw.permutation(len(pairs)))] for _ in range(count))]
    return torch.stack([torch.stack([first, other], dim=1) for other in seconds])


def list_digest(ids: Int[Tensor, "row n"]) -> dict[str, Any]:
    """The length of a list of n-grams, and the sha256 of its ids in sorted order."""
    rows = torch.tensor(sorted(ids.tolist()), device="cpu")
    return {"count": len(rows), "sha256": hashlib.sha256(rows.numpy().tobytes()).hexdigest()}
