r"""Properties of a vocabulary that show in tables of n-grams: tied embeddings, and tokens that were never trained.

**Tied embeddings.** If W_U is W_E transposed, up to a factor of each dimension (a folded norm) and a constant, a token's
own logit is a sum of squares, and `direct` says first of all that each token follows itself.

**Tokens that were never trained** (of the tokenizer's training text, but not of the model's) make glitches: one of them
follows everything. Gradients of a softmax move the embeddings of all tokens that never occur in the same direction, so
their embeddings end up nearly alike. `untrained_tokens` measures the cosine with the mean embedding of the tokenizer's
special tokens, most of which a base model never saw, after the vocabulary's mean is taken away; and how far the logarithm
of the norm lies from its median, in robust standard deviations. The norm alone finds none in SmolLM2-135M, whose shortest
embeddings are those of ` John` and ` Michael`.

Source: Land and Bartolo 2024, *Fishing for Magikarp* (arXiv 2405.05417): indicators of under-trained tokens.

Example:
    >>> import tl_jets as tj
    >>> found = untrained_tokens(tj.load_tinydocs())
    >>> len(found.ids) == len(found.reasons)
    True
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.model_marks import model_mark
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.results import Result
from tl_jets.core.tokens import token_names, visible
from tl_jets.ngrams.streams import VocabularyStreams

# Share of the variance of W_U that is not a multiple of W_E below which they count as one, and tokens compared.
UNTIED, COMPARED = 0.01, 1024
# Cosine with the mean special token, and robust standard deviations of the log-norm, from which on a token is named.
ALIKE, FAR = 0.8, 6.0
# A normal variable's standard deviation, in median absolute deviations.
DEVIATION = 1.4826
# Special tokens needed for a mean embedding.
FEWEST = 3


@torch.no_grad()
def is_tied(streams: VocabularyStreams) -> bool:
    """Whether W_U is W_E, up to a factor of each dimension and a constant."""
    view: Any = streams.network.view
    if streams.state is None:
        return _is_tied(streams)
    if view.memo.get("tied", (None,))[0] != streams.state:
        view.memo["tied"] = streams.state, _is_tied(streams)
    return view.memo["tied"][1]


def _is_tied(streams: VocabularyStreams) -> bool:
    decoder = streams.network.decoder
    size = min(streams.n_tokens, decoder.d_vocab)
    ids = torch.linspace(0, size - 1, min(size, COMPARED), dtype=torch.float64, device="cpu").round().long().unique()
    embed = streams.embed(ids).double().cpu()
    unembed = decoder.W_U[:, ids.to(decoder.W_U.device)].T.double().cpu()
    embed, unembed = embed - embed.mean(0), unembed - unembed.mean(0)
    slope = (embed * unembed).sum(0) / embed.square().sum(0).clamp_min(1e-300)
    return bool((unembed - slope * embed).square().sum() < UNTIED * unembed.square().sum())


@dataclass(frozen=True, eq=False, repr=False)
class UntrainedTokens(Result):
    """Tokens that a model's training probably never saw.

    Attributes:
        ids: Their ids, sorted. Shape [token].
        reasons: Why each is named: `unknown to the tokenizer`, `like special tokens`, `norm`.
        cosines: Cosine of the centered embedding with that of the mean special token; NaN without one. Shape [token].
        norms: Length of the embedding. Shape [token].
        deviations: Robust standard deviations of the log-norm from its median. Shape [token].
        token_names: Text of each id.
        tied: Whether the model's embeddings are tied.
        d_vocab: Size of the vocabulary.
        model: Mark of the model: its name and a digest of its weights.
    """

    ids: Int[Tensor, " token"]
    reasons: list[str]
    cosines: Float[Tensor, " token"]
    norms: Float[Tensor, " token"]
    deviations: Float[Tensor, " token"]
    token_names: dict[int, str] = field(repr=False)
    tied: bool
    d_vocab: int
    model: str = ""

    def to_dataframe(self) -> pd.DataFrame:
        """One row a token: id, text, reason, cosine, norm, deviation."""
        ids = self.ids.tolist()
        numbers = {"cosine": self.cosines.tolist(), "norm": self.norms.tolist(), "deviation": self.deviations.tolist()}
        return pd.DataFrame({"id": ids, "token": [self.token_names[i] for i in ids], "reason": self.reasons} | numbers)

    def __repr__(self) -> str:
        tied = "tied" if self.tied else "not tied"
        title = f"UntrainedTokens({len(self.ids)} of {self.d_vocab:,}; embeddings {tied})"
        if not len(self.ids):
            return title
        frame = self.to_dataframe().round(3)
        return f"{title}\n{frame.assign(token=frame['token'].map(visible)).to_string(index=False, max_rows=12)}"


@torch.no_grad()
def untrained_tokens(model: Any, *, alike: float = ALIKE, far: float = FAR) -> UntrainedTokens:
    """Tokens that a model's training probably never saw, by its embeddings and its tokenizer.

    Args:
        model: A model or a `ResidualNetwork`.
        alike: Cosine with the mean special token, from which on a token is named.
        far: Robust standard deviations of the log-norm from its median, from which on a token is named.

    Returns:
        The tokens with the numbers that named them; special tokens among them, unless they were trained.

    Source: Land and Bartolo 2024, arXiv 2405.05417. Cost: the embedding of every token.

    Example:
        >>> import tl_jets as tj
        >>> untrained_tokens(tj.load_tinydocs()).d_vocab
        4096
    """
    streams = VocabularyStreams(ResidualNetwork(model), [])
    tokenizer, size = streams.network.tokenizer, streams.n_tokens
    embed = streams.embed(torch.arange(size, device=streams.device)).double().cpu()
    norms = embed.norm(dim=1)
    logs = norms.clamp_min(1e-300).log()
    spread = (logs - logs.median()).abs().median() * DEVIATION
    deviations = (logs - logs.median()) / spread.clamp_min(1e-12)
    special = [token for token in getattr(tokenizer, "all_special_ids", []) if token < size]
    cosines = torch.full((size,), torch.nan, dtype=torch.float64, device="cpu")
    if len(special) >= FEWEST:
        centered = embed - embed.mean(0)
        cosines = torch.cosine_similarity(centered, centered[special].mean(0, keepdim=True), dim=1)
    known = size if tokenizer is None else len(tokenizer)
    why = {
        "unknown to the tokenizer": torch.arange(size, device="cpu") >= known,
        "like special tokens": cosines > alike,
        "norm": deviations.abs() > far,
    }
    ids = torch.stack(list(why.values())).any(0).nonzero()[:, 0]
    reasons = [", ".join(reason for reason, holds in why.items() if bool(holds[token])) for token in ids.tolist()]
    names = token_names(tokenizer, [ids])
    numbers = (cosines[ids], norms[ids], deviations[ids])
    mark = model_mark(streams.network)
    return UntrainedTokens(ids, reasons, *numbers, names, is_tied(streams), size, mark)
