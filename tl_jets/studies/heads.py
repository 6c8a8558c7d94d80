r"""Copying and previous-token scores of every head from the weights, and the attention that they are to predict.

**Copying.** Row z of a head's matrix M holds the centered logits of what the head writes of token z,

.. math::
    M_{z z'} = \upsilon_c\bigl(OV_h(x_z)\bigr)_{z'}, \qquad \text{copying} = \sum_i \lambda_i \Big/ \sum_i |\lambda_i| ,

with the norms at their own scale for each token (`tl_jets.ngrams.head_maps`) and the eigenvalues of M. It is 1 for a head that
raises what it reads, and -1 for one that lowers it. `copied` is the share of tokens whose own logit is among the largest 1% of
its row. Controls: the same rows with the tokens of the columns permuted.

**Previous token.** The mean attention to the token before, of the layer's own attention on the streams x_z of random tokens in
their places, as if no head before had written. This holds for every kind of positions. Control: uniform attention.

**Which stream.** `"effective"`, the embedding and the first MLP's write; `"direct"`, the embedding; `"mlps"`, the embedding and
all writes of earlier MLPs. Streams of layer 0 are embeddings.

**What is observed.** With `observe=n`, n prompts of random tokens, repeated once: the attention to the token before
(`previous_token`), the attention of the second copy to the token after the first (`induction`), and what the heads' writes add
to the centered logits of the tokens that they attend to, weighted by attention, without the first position (`copying`, the
final norm at the run's own scale). `agreement` compares both.

Source: Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits* (copying by eigenvalues); Olsson et al. 2022
(repeated random tokens); Gould et al. 2023, arXiv 2312.09230 (effective embeddings). Controls and norms are ours.
Cost: per head, the product of W_O with W_U, d_head d_model d_vocab multiply-adds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tl_jets.core.attribution import directions
from tl_jets.core.intervals import central
from tl_jets.core.measures import check_seed
from tl_jets.core.model_marks import model_mark
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.options import check_choice, check_integers
from tl_jets.core.results import Result
from tl_jets.core.trace import Trace
from tl_jets.ngrams import VocabularyStreams
from tl_jets.ngrams.head_maps import HeadReader, decoded_writes
from tl_jets.ngrams.low_rank_logits import LowRankLogits
from tl_jets.ngrams.streams import mlp_steps

Stream = Literal["effective", "direct", "mlps"]
FROM_WEIGHTS = ("copying", "copied", "previous_token")
OBSERVED = ("copying", "induction", "previous_token")
# Share of a row's largest logits that count as copied.
LARGEST = 0.01
# Prompts of one token evaluated at a time, and of random tokens for previous-token scores.
ROWS, PROMPTS = 64, 4
# Pairings of scores in `agreement`: from the weights, observed.
PAIRS = (
    ("copying", "copying"),
    ("copied", "copying"),
    ("copying", "induction"),
    ("copied", "induction"),
    ("previous_token", "previous_token"),
    ("previous_token", "induction"),
)


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores(Result):
    """Scores of every head from the weights, their controls, and what was observed.

    Attributes:
        layers: The layers.
        copying: Sum of eigenvalues over the sum of their sizes, -1..1. Shape [layer, head].
        copied: Share of tokens whose own logit is among the largest 1%. Shape [layer, head].
        previous_token: Mean attention to the token before. Shape [layer, head].
        copying_control: `copying` with the tokens of the columns permuted. Shape [layer, head].
        copied_control: `copied` with the tokens of the columns permuted. Shape [layer, head].
        previous_token_control: `previous_token` of uniform attention.
        observed: `copying` (logits), `induction` and `previous_token` (attention) of a run, by name; empty unless requested.
            Shape [layer, head] each.
        stream: Stream that heads read.
        n_tokens: Number of random tokens of `copying` and `copied`.
        length: Number of random tokens of a prompt before they are repeated.
        seed: Random seed.
        model: Mark of the model.
    """

    layers: list[int]
    copying: Float[Tensor, "layer head"]
    copied: Float[Tensor, "layer head"]
    previous_token: Float[Tensor, "layer head"]
    copying_control: Float[Tensor, "layer head"]
    copied_control: Float[Tensor, "layer head"]
    previous_token_control: float
    observed: dict[str, Tensor] = field(default_factory=dict)
    stream: str = "effective"
    n_tokens: int = 0
    length: int = 0
    seed: int = 0
    model: str = ""

    @property
    def labels(self) -> list[str]:
        """Labels of the heads, by layer."""
        return [f"L{layer}H{head}" for layer in self.layers for head in range(self.copying.shape[1])]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per head: scores from the weights, controls, and `observed_...` columns."""
        columns = {name: getattr(self, name) for name in FROM_WEIGHTS}
        columns |= {name: getattr(self, name) for name in ("copying_control", "copied_control")}
        columns |= {f"observed_{name}": values for name, values in self.observed.items()}
        return pd.DataFrame({"head": self.labels} | {name: x.flatten().tolist() for name, x in columns.items()})

    def top(self, score: str = "copying", k: int = 10) -> pd.DataFrame:
        """The k heads with the largest value of a column of `to_dataframe`."""
        frame = self.to_dataframe()
        check_choice("score", score, list(frame.columns[1:]))
        check_integers(1, k=k)
        return frame.sort_values(score, ascending=False, kind="stable").head(k).reset_index(drop=True)

    def agreement(self, shuffles: int = 1000) -> pd.DataFrame:
        """Spearman rank correlations of scores from the weights with what was observed, beside shuffled heads.

        Args:
            shuffles: Number of shuffles of all heads, and of the heads of each layer (which keep what depth explains).

        Returns:
            One row per pair of scores: `correlation`, central 95% intervals of both kinds of shuffles, and whether the
            correlation is `above` the larger one.

        Raises:
            ValueError: Nothing was observed.
        """
        check_integers(1, shuffles=shuffles)
        if not self.observed:
            raise ValueError("`agreement` compares with attention in runs; none was observed. Pass observe=4, say.")
        draw, shape = np.random.default_rng(self.seed), self.copying.shape
        rows = []
        for score, seen in PAIRS:
            ours, theirs = (_ranks(x) for x in (getattr(self, score), self.observed[seen]))
            found = float(ours @ theirs)
            anywhere = [float(draw.permutation(ours) @ theirs) for _ in range(shuffles)]
            inside = [float(draw.permuted(ours.reshape(shape), axis=1).ravel() @ theirs) for _ in range(shuffles)]
            (low, high), (inner_low, inner_high) = (central(np.array(x)) for x in (anywhere, inside))
            rows.append(
                {"from weights": score, "observed": seen, "correlation": found}
                | {"shuffled_low": low, "shuffled_high": high}
                | {"within_layers_low": inner_low, "within_layers_high": inner_high}
                | {"above": found > max(high, inner_high)}
            )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        seen = f"observed {', '.join(self.observed)}" if self.observed else "nothing observed"
        title = (
            f"HeadScores({len(self.labels)} heads, {self.stream} streams of {self.n_tokens} tokens; uniform previous_token "
            f"{self.previous_token_control:.3f}; {seen})"
        )
        return f"{title}\n{self.top(k=5).round(3).to_string(index=False)}"


def _ranks(values: Tensor) -> np.ndarray:
    """Centered ranks of length 1, whose products are rank correlations; 0 if all values are equal."""
    from scipy.stats import rankdata  # a second, which most calls do not need

    ranks = rankdata(values.flatten().numpy())
    ranks = ranks - ranks.mean()
    return ranks / max(np.linalg.norm(ranks), 1e-300)


@torch.no_grad()
def head_scores(
    model: Any,
    *,
    layers: Sequence[int] | None = None,
    stream: Stream = "effective",
    n_tokens: int = 1024,
    observe: int = 0,
    length: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> HeadScores:
    """Copying and previous-token scores of heads from the weights; on request, beside their attention in runs.

    Args:
        model: A model or a `ResidualNetwork`.
        layers: Layers; None for all.
        stream: What heads read: `"effective"`, `"direct"` or `"mlps"`, see the module.
        n_tokens: Number of random tokens of copying scores; at most the vocabulary.
        observe: Number of prompts of repeated random tokens that the model runs on; 0 for none.
        length: Number of random tokens of a prompt, before they are repeated.
        seed: Random seed of tokens and of the control.
        progress: Show a progress bar in a terminal.

    Raises:
        ValueError: A layer does not exist, an option is invalid, or prompts exceed the model's context.
        NotImplementedError: The model consists of plain functions, or its attention is not supported.

    Example:
        >>> import tl_jets as tj
        >>> found = head_scores(tj.load_tinydocs(), n_tokens=128, observe=2, length=12, progress=False)
        >>> found.copying.shape, list(found.agreement(10).columns[:3])
        (torch.Size([4, 4]), ['from weights', 'observed', 'correlation'])
    """
    check_choice("stream", stream, get_args(Stream))
    check_integers(0, observe=observe)
    check_integers(2, n_tokens=n_tokens, length=length)
    check_seed(seed)
    network = ResidualNetwork(model).at("sublayer")
    chosen = mlp_steps(network)[: {"direct": 0, "effective": 1, "mlps": None}[stream]]
    single = VocabularyStreams(network, chosen, prompts=ROWS)
    wanted = read_layers(layers, network)
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(single.n_tokens, generator=draw, device="cpu")[:n_tokens]
    shuffle = torch.randperm(len(tokens), generator=draw, device="cpu")
    trace, first = _repeated(network, single.n_tokens, observe or PROMPTS, length, draw)
    found = defaultdict[str, list[Tensor]](list)
    streams = _streams(single, trace, tokens, chosen, max(wanted) + 1)
    bar = tqdm(streams, total=max(wanted) + 1, unit="layer", delay=1, leave=False, disable=None if progress else True)
    for layer, words, context in bar:
        if layer in wanted:
            scores = _copying(HeadReader(network, layer, single), words, tokens, shuffle)
            scores["previous_token"] = _on_diagonal(_pattern(single, trace, layer, context), 1, first)
            scores |= _observed(trace, layer, first, length) if observe else {}
            for name, values in scores.items():
                found[name].append(values.double().cpu())
    grids = {name: torch.stack(values) for name, values in found.items()}
    observed = {name: grids.pop(f"observed {name}") for name in OBSERVED if observe}
    about: dict[str, Any] = {"n_tokens": len(tokens), "length": length, "seed": seed, "model": model_mark(network)}
    about |= {"stream": stream, "previous_token_control": _uniform(first, trace.tokens.shape[1])}
    return HeadScores(wanted, observed=observed, **grids, **about)


def _uniform(first: int, length: int) -> float:
    """Mean attention to the token before, of uniform attention, of queries after position `first`."""
    places = range(first + 1, length)
    return sum(1 / (place + 1) for place in places) / len(places)


def _streams(
    single: VocabularyStreams, trace: Trace, tokens: Tensor, chosen: list[str], n_layers: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Streams before each layer without attention: of single tokens [token, d_model], and of the run's prompts."""
    words = single.embed(tokens.to(single.device))
    context = torch.stack([trace[source] for source in trace.network.sources]).sum(0)
    for layer in range(n_layers):
        yield layer, words, context
        for step in (label for label in chosen if label == f"{layer}_mlp"):
            words = words + single.stream(words, step)
            context = context + trace.network.view.writes(trace.recording, single.alone(step), context)[0]


def _pattern(
    single: VocabularyStreams, trace: Trace, layer: int, stream: Tensor
) -> Float[Tensor, "batch head query key"]:
    """A layer's attention on another stream of the run's prompts."""
    hook = f"blocks.{layer}.attn.hook_pattern"
    return trace.network.view.inner(trace.recording, hook, single.alone(f"{layer}_attn"), stream)


def read_layers(layers: Sequence[int] | None, network: ResidualNetwork) -> list[int]:
    """Distinct layers, sorted; ValueError for others than the network's."""
    n_layers = int(getattr(network.view, "n_layers", 0))
    given = list(range(n_layers)) if layers is None else list(layers)
    if n_layers and (not given or any(isinstance(x, bool) or x not in range(n_layers) for x in given)):
        raise ValueError(f"layers must be some of 0..{n_layers - 1}, or None for all; got {layers!r}.")
    if not n_layers:
        raise NotImplementedError("Scores are of attention heads; plain functions have none. Pass a model.")
    return sorted(set(given))


def _repeated(
    network: ResidualNetwork, n_tokens: int, prompts: int, length: int, draw: torch.Generator
) -> tuple[Trace, int]:
    """A run on random tokens that are repeated once, after the tokenizer's BOS if any; and the place of the first of them."""
    bos = getattr(network.tokenizer, "bos_token_id", None)
    tokens = torch.randint(0, n_tokens, (prompts, length), generator=draw, device="cpu")
    prefix = torch.full((prompts, int(bos is not None)), bos or 0, dtype=torch.long, device="cpu")
    prompt = torch.cat([prefix, tokens, tokens], 1)
    n_ctx = int(getattr(getattr(network.view, "cfg", None), "n_ctx", 0) or 2**31)
    if prompt.shape[1] > n_ctx:
        raise ValueError(
            f"Repeated tokens must fit into the context of {n_ctx}; length={length} makes {prompt.shape[1]}. Use a smaller length."
        )
    return network.trace(prompt, attention_mask=torch.ones_like(prompt)), prefix.shape[1]


def _copying(
    reader: HeadReader, words: Tensor, tokens: Int[Tensor, " token"], shuffle: Int[Tensor, " token"]
) -> dict[str, Float[Tensor, " head"]]:
    """Copying scores of a layer's heads on streams `words` of some tokens, and those with permuted columns."""
    values, rows = reader.values(words), []
    for head in range(reader.n_heads):
        logits = decoded_writes(reader, head, values[:, head])
        own = (logits.columns - logits.columns.mean(1, keepdim=True))[:, tokens.to(logits.columns.device)]
        matrices = [LowRankLogits(logits.rows, x) for x in (own, own[:, shuffle.to(own.device)])]
        rows.append([score(matrix) for matrix in matrices for score in (_eigenvalue_ratio, _share_copied)])
    names = ("copying", "copied", "copying_control", "copied_control")
    return dict(zip(names, torch.tensor(rows, dtype=torch.float64, device="cpu").unbind(1), strict=True))


def _eigenvalue_ratio(matrix: LowRankLogits) -> float:
    """Sum of eigenvalues over the sum of their sizes; those of rows @ columns are those of columns @ rows, and zeros."""
    values = torch.linalg.eigvals((matrix.columns.double() @ matrix.rows.double()).cpu())
    return float(values.sum().real / values.abs().sum().clamp_min(1e-300))


def _share_copied(matrix: LowRankLogits) -> float:
    """Share of rows whose diagonal element is among the row's largest, a share `LARGEST` of them."""
    logits = matrix.rows @ matrix.columns
    rank = (logits > logits.diagonal()[:, None]).sum(1)
    return float((rank < max(1, round(LARGEST * len(logits)))).double().mean())


def _on_diagonal(pattern: Float[Tensor, "batch head query key"], distance: int, first: int) -> Float[Tensor, " head"]:
    """Mean attention to the key `distance` places before, of queries whose key is at `first` or later."""
    return pattern.diagonal(-distance, 2, 3)[..., first:].double().mean((0, 2))


def _observed(trace: Trace, layer: int, first: int, length: int) -> dict[str, Float[Tensor, " head"]]:
    """What a layer's heads did in the run on repeated tokens."""
    pattern = trace["pattern", layer].double()
    network = trace.network.at("head")
    stage = next(x for x in network.stages if any(y.kind == "head" and y.layer == layer for y in x.steps))
    heads = trace.on(network).stage_function(stage)(trace[stage.stream])
    heads = torch.stack([x for x, step in zip(heads, stage.steps, strict=True) if step.kind == "head"]).double()
    norm, final = trace.decoder.norm, trace["final_post"].double()
    if norm.kind != "none":
        heads = norm.center(heads) * torch.rsqrt(norm.center(final).square().mean(-1, keepdim=True) + norm.eps)
    of_tokens = directions(trace.decoder, trace.tokens)[..., :-1].to(heads)
    attended = pattern.clone()
    attended[..., 0] = 0
    logits = torch.einsum("hbqd,bhqk,bkd->bhq", norm.scale(heads), attended.to(heads), of_tokens)
    return {
        "observed copying": logits[..., first + length :].mean((0, 2)),
        "observed induction": _on_diagonal(pattern, length - 1, first + 1),
        "observed previous_token": _on_diagonal(pattern, 1, first),
    }
