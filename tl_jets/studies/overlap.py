r"""Compare tables: pseudo-joint scores, and the share of a reference's best n-grams that a table also has.

.. math::
    \text{pseudo-joint}(z_1, z_2) = \log P(z_2 | z_1) + \log \text{unigram}(z_1)

ranks bi-grams by their probability in a text whose first tokens follow the given unigram. A table keeps the best pairs
of one score, and a pair it left out may rank first under another. Its conditional score is at most the last one kept
(of its own row, for `per="row"`), so its pseudo-joint is at most that plus log unigram. Rows of the new table above the
largest of these bounds are the best of all pairs; `settings["exact_top"]` counts them. Source: Chen et al., arXiv
2410.06024, section 5.2 (hit ratio, pseudo-joint).
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.logit_reader import rounded
from tl_jets.core.options import check_integers
from tl_jets.ngrams.scoring import check_unigram
from tl_jets.ngrams.tables import NgramTable


def pseudo_joint(table: NgramTable, unigram: Float[Tensor, " d_vocab"]) -> NgramTable:
    """Re-rank a table of bi-grams by log P(z2|z1) + log unigram(z1), in nats.

    The first `settings["exact_top"]` rows are the best of all pairs (of the table's rows and columns), the others of
    the table's pairs. Tables with `per="row"` over the tokens of the unigram give the most exact rows.

    Args:
        table: Bi-grams by log-probability.
        unigram: Probability of every token of the vocabulary. Shape [d_vocab].

    Returns:
        A table with the parts `logprob` (the conditional score) and those of `table`. Bi-grams whose first token has
        probability zero are dropped and counted in `settings["left_out"]`.

    Raises:
        ValueError: The table is not of bi-grams by log-probability, or the unigram is not a distribution.

    Example:
        >>> import tl_jets as tj
        >>> joint = pseudo_joint(tj.jet_bigrams(tj.load_tinydocs(), "mlps", top_k=20), torch.ones(4096) / 4096)
        >>> len(joint), joint.settings["exact_top"] >= 19
        (20, True)
    """
    if table.n != 2 or table.settings.get("score", "logprob") != "logprob" or not len(table):
        raise ValueError(
            "A pseudo-joint is of bi-grams by log-probability; got a table of "
            f'{len(table)} {table.n}-grams by {table.settings.get("score")!r}. Take jet_bigrams(..., score="logprob").'
        )
    unigram = check_unigram(unigram, at_least=int(table.ids.max()) + 1)
    prior = unigram.log()[table.ids[:, 0]]
    known = prior > -math.inf
    ids, conditional = table.ids[known], table.scores[known]
    scores = conditional + prior[known]
    bound = torch.tensor(_bound_of_the_rest(table, unigram), dtype=torch.float64, device="cpu")
    settings: dict[str, Any] = dict(table.settings) | {
        "score": "pseudo-joint",
        "unigram_sha256": hashlib.sha256(unigram.numpy().tobytes()).hexdigest(),
        "of": "all pairs, for the first exact_top rows; of the table that was given, for the others",
        "exact_top": int((rounded(scores) > rounded(bound)).sum()),
        "left_out": int((~known).sum()),
    }
    parts = {"logprob": conditional, **{name: x[known] for name, x in table.parts.items()}}
    about: dict[str, Any] = {**table.header, "settings": settings, "names": table.names}
    return NgramTable.ranked(ids, scores, parts=parts, **about)


def _bound_of_the_rest(table: NgramTable, unigram: Tensor) -> float:
    """Upper bound of the pseudo-joint of all pairs that a table left out; infinity if `jet_bigrams` did not make it."""
    settings, log_unigram = table.settings, unigram.log()
    top_k, per = settings.get("top_k"), settings.get("per")
    rows, columns = (_how_many(settings.get(name, "all"), len(unigram)) for name in ("rows", "columns"))
    if not isinstance(top_k, int) or per not in ("global", "row"):
        return math.inf
    if per == "global":
        if len(table) == rows * columns:
            return -math.inf
        return float(table.scores[-1] + log_unigram.max()) if len(table) == top_k else math.inf
    first, row, count = table.ids[:, 0].unique(return_inverse=True, return_counts=True)
    if not bool((count == min(top_k, columns)).all()) or (len(first) < rows and settings.get("rows", "all") != "all"):
        return math.inf
    last = torch.full((len(first),), math.inf, dtype=torch.float64, device="cpu")
    last.scatter_reduce_(0, row, table.scores, "amin")
    bound = -math.inf if top_k >= columns else float((last + log_unigram[first]).max())
    # Tokens that are not embedded, or whose rows were removed: their log-probabilities may be 0.
    absent = torch.ones(len(unigram), dtype=torch.bool, device="cpu").scatter(0, first, False)
    return bound if len(first) >= rows else max(bound, float(log_unigram[absent].max()))


def _how_many(described: Any, size: int) -> int:
    return size if described == "all" else int(described["count"])


def hit_ratio(table: NgramTable, reference: NgramTable, n: int) -> float:
    """Share of a reference's best n n-grams that are among a table's best n: 0 to 1, symmetric in both tables.

    Args:
        table: A table, best first.
        reference: The reference: of the last checkpoint, of counts (`ngram_counts`), or of another path.
        n: Number of n-grams of each.

    Raises:
        ValueError: A table has fewer than n rows, the n-grams differ in length, or an id has two names.

    Example:
        >>> import tl_jets as tj
        >>> table = tj.jet_bigrams(tj.load_tinydocs(), "mlps", top_k=50)
        >>> hit_ratio(table, table[:20], 20)
        1.0
    """
    check_integers(1, n=n)
    check_same_vocabulary(table, reference)
    if not 1 <= n <= min(len(table), len(reference)):
        raise ValueError(
            f"n must be between 1 and the rows of both tables, {len(table)} and {len(reference)}; got {n}. The best n of a "
            "shorter table are not known: make it with top_k of n or more."
        )
    return share_found(table.ids[:n], reference.ids[:n])


def share_found(ids: Int[Tensor, "row n"], wanted: Int[Tensor, "wanted_row n"]) -> float:
    """Share of the wanted n-grams that are among `ids`."""
    found = set(map(tuple, ids.tolist()))
    return sum(tuple(row) in found for row in wanted.tolist()) / len(wanted)


def check_same_vocabulary(table: NgramTable, reference: NgramTable) -> None:
    """Raise ValueError unless equal ids mean equal n-grams in both tables."""
    if table.n != reference.n:
        raise ValueError(f"Tables must be of n-grams of one length; got {table.n} and {reference.n}.")
    shared = table.names.keys() & reference.names.keys()
    different = [token for token in sorted(shared) if table.names[token] != reference.names[token]]
    if different:
        token = different[0]
        raise ValueError(
            f"Tables must be of one vocabulary; {len(different)} of {len(shared)} shared ids have two names, such as {token}: "
            f"{table.names[token]!r} and {reference.names[token]!r}. Make both with one tokenizer."
        )
