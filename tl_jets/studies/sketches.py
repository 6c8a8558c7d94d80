r"""The sketch of a model by its n-grams: how well they predict text and the model, mixed with one weight each.

.. math::
    \text{sketch}(t) = W_U \sum_i w_i \, e_i(t) + b_U, \qquad w \ge 0, \quad \sum_i w_i \le 1

The e_i are what paths hold at position t, after the final norm, functions of token ids alone:

- bi-grams: the stream of the current token along a path (`tl_jets.ngrams.streams`).
- skip-trigrams: the writes of a layer's heads, where head h moves from each earlier token what it writes of that token
  alone, weighted by attention from (key token, query token) scores alone, normalized over the context
  (`tl_jets.ngrams.head_maps`). All keys but the query's own stand at one `distance`.

- induction, on request: as a head's skip-trigrams, but the key at a place is what a previous-token head wrote of the token before
  it, and both heads read embeddings with the first MLP's write (`tl_jets.ngrams.induction`); the first place is no key.

So no other layer reads what an attention layer wrote. The weights are the same at all positions. They minimize the squared
distance of centered logits to the model's own over a fitting text (before a softcap), a quadratic program, solved exactly;
what is left of the sum 1 predicts b_U alone. They are not fitted to the tokens of the text.

Rows beside it: the model; its mean final state over the fitting text (one distribution, no n-grams); the sketch whose
tables are those of shuffled tokens, with weights of its own; and models of a corpus: unigram, Kneser-Ney bi- and tri-grams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tl_jets.adapters.callables import CallableModel
from tl_jets.core.logit_reader import slices
from tl_jets.core.model_marks import model_mark
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.notebook import dataframe_html
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.results import Result
from tl_jets.jets.simplex import SimplexSolution, gram, simplex_qp
from tl_jets.ngrams.compositions import Compositions
from tl_jets.ngrams.float32 import full_float32
from tl_jets.ngrams.head_maps import HeadReader
from tl_jets.ngrams.induction import Heads, induction_paths
from tl_jets.ngrams.streams import PathInput, VocabularyStreams
from tl_jets.studies.counts import KneserNey, TokenInput, unigram_probabilities
from tl_jets.studies.text_comparison import every_path

# Positions whose logits are held at once, and texts in one forward pass.
POSITIONS, TEXTS = 64, 8
SKETCH, SHUFFLED = "sketch", "sketch, shuffled tokens"

States = Float[Tensor, "component row d_model"]


@dataclass(frozen=True, eq=False, repr=False)
class Sketch(Result):
    """How well a model's n-grams predict held-out text and the model.

    Attributes:
        labels: Components: paths of bi-grams, layers' skip-trigrams (`3_attn`), and induction (`L0H1, then L2H3`).
        weights: Weight of each component. Shape [component].
        shuffled_weights: Weights with shuffled tokens. Shape [component].
        unexplained: Share of the model's squared centered logits on the fitting text that the sketch leaves.
        names: What predicts the held-out text: the model, the sketch, controls, models of the corpus.
        nats: Mean of -log P(next token) on the held-out text, in nats. Shape [predictor].
        kl: Mean KL(model || predictor) there, in nats. Shape [predictor].
        n_fitted: Number of fitted predictions.
        n_held_out: Number of held-out predictions.
        distance: Places from key to query.
        seed: Seed of the shuffled tokens.
        model: Name of the model and a digest of its weights.
    """

    labels: list[str]
    weights: Float[Tensor, " component"]
    shuffled_weights: Float[Tensor, " component"]
    unexplained: float
    names: list[str]
    nats: Float[Tensor, " predictor"]
    kl: Float[Tensor, " predictor"]
    n_fitted: int
    n_held_out: int
    distance: int = 1
    seed: int = 0
    model: str | None = None

    def to_dataframe(self) -> pd.DataFrame:
        """One row per predictor: nats and perplexity per held-out token, and KL(model || predictor) in nats."""
        columns = {"predictor": self.names, "nats": self.nats.tolist(), "perplexity": self.nats.exp().tolist()}
        return pd.DataFrame({**columns, "kl": self.kl.tolist()})

    def weights_dataframe(self) -> pd.DataFrame:
        """One row per component: its weight, and that with shuffled tokens."""
        columns = {"component": self.labels, "weight": self.weights.tolist()}
        return pd.DataFrame({**columns, "shuffled": self.shuffled_weights.tolist()})

    def __repr__(self) -> str:
        used = int((self.weights > 0).sum())
        return (
            f"Sketch({used} of {len(self.labels)} components have weight; {self.n_held_out:,} held-out tokens)\n"
            f"{self.to_dataframe().round(3).to_string(index=False)}"
        )

    def _body(self) -> str:
        return dataframe_html(self.to_dataframe(), rows=len(self.names))


@torch.no_grad()
@full_float32()
def sketch(
    model: Any,
    fitting: Int[Tensor, "text pos"],
    held_out: Int[Tensor, "other_text pos"],
    *,
    paths: Sequence[PathInput] | None = None,
    layers: Sequence[int] | None = None,
    induction: Sequence[tuple[Heads, Heads]] = (),
    distance: int = 1,
    corpus: TokenInput | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Sketch:
    """Predict text by a model's bi-grams and skip-trigrams alone, beside the model, controls and n-grams of a corpus.

    Args:
        model: A model or a `ResidualNetwork`.
        fitting: Token ids on which weights are fitted to the model's logits. Shape [text, pos].
        held_out: Token ids of other texts, on which everything is measured. Shape [text, pos].
        paths: Paths of bi-grams, as in `jet_bigrams`; None for `direct`, every MLP, and `mlps`.
        layers: Layers whose heads' skip-trigrams are components; None for all, `[]` for none.
        induction: Pairs of a previous-token head and an induction head, each (layer, head), that are components, too.
        distance: Places from key to query, for rotary embeddings, as in `jet_trigrams`.
        corpus: Token ids of the texts of unigram and Kneser-Ney models, none of them held out; None for `fitting`.
        seed: Random seed of the shuffled tokens.
        progress: Show a bar in a terminal over components.

    Raises:
        ValueError: Texts are too short, or a held-out text is among the fitting ones; or see `jet_bigrams`, `jet_trigrams`.
        NotImplementedError: A layer's heads have no skip-trigrams; pass `layers`.

    Source: Chen et al., arXiv 2410.06024 (n-grams of paths, Lemma 1); weights shared by positions are ours. Cost: both
    texts' forward passes, a path's MLPs on their tokens, logits of six predictors. Memory: states of all components.

    Example:
        >>> import tl_jets as tj
        >>> model = tj.load_tinydocs()
        >>> texts = model.to_tokens(["Return the number of bytes.", "Raise an error if not."])[:, :6]
        >>> sketch(model, texts[:1], texts[1:], paths=["direct", "mlps"], layers=[0]).labels
        ['direct', 'mlps', '0_attn']
    """
    _check_texts(fitting, held_out)
    network = ResidualNetwork(model).at("sublayer")
    decoder = network.decoder
    components = _Components(network, paths, layers, distance, progress, induction)
    shuffled = _shuffled(torch.cat([fitting.flatten(), held_out.flatten()]), seed)
    truth, final = _final_states(network, fitting), _final_states(network, held_out)
    solution = _fitted(decoder, components(fitting), truth)
    of_shuffled = _fitted(decoder, components(shuffled[fitting.cpu()]), truth).weights[:-1]
    predicted = {
        "model": final,
        SKETCH: _mixed(components(held_out), solution.weights[:-1]),
        SHUFFLED: _mixed(components(shuffled[held_out.cpu()]), of_shuffled),
        "model's mean state": truth.mean(0).expand_as(final),
    }
    readers = {name: _reader(decoder, state) for name, state in predicted.items()}
    readers |= _corpus_readers(fitting if corpus is None else corpus, held_out, decoder.d_vocab)
    nats, kl = _measured(readers, held_out[:, 1:].flatten())
    measured = (float(solution.objective / _size(decoder, truth)), list(readers), nats, kl, len(truth), len(final))
    return Sketch(components.labels, solution.weights[:-1], of_shuffled, *measured, distance, seed, model_mark(network))


def _shuffled(tokens: Int[Tensor, " token"], seed: int) -> Int[Tensor, " id"]:
    """A token for each id: those that occur are permuted among themselves, others stay."""
    known = tokens.cpu().unique()
    generator = torch.Generator().manual_seed(seed)
    found = torch.arange(int(known.max()) + 1, device="cpu")
    found[known] = known[torch.randperm(len(known), generator=generator, device="cpu")]
    return found


class _Components:
    """What each component holds at every position of texts but the last, after the final norm."""

    def __init__(
        self,
        network: ResidualNetwork,
        paths: Sequence[PathInput] | None,
        layers: Sequence[int] | None,
        distance: int,
        progress: bool,
        induction: Sequence[tuple[Heads, Heads]] = (),
    ):
        self.streams = VocabularyStreams(network, every_path(network) if paths is None else paths)
        view: Any = network.view
        if layers is None:
            layers = [] if isinstance(view, CallableModel) else range(view.n_layers)
        self.decoder, self.progress = network.decoder, progress
        # By label: a reader of a layer, some of its heads, and paths that their queries, keys and values read.
        self.heads: dict[str, tuple[HeadReader, list[int], dict[str, str]]] = {}
        shared = None
        for layer in layers:
            reader = HeadReader(network, layer, shared)
            shared = reader.streams
            self.heads[f"{layer}_attn"] = reader, list(range(reader.n_heads)), {}
        for previous, (layer, head) in induction:
            compose, label = Compositions.of(induction_paths(previous)), "L{}H{}, then L{}H{}"
            found = compose.reader(network, layer, [head]), [head], compose.reads(layer, head)
            self.heads[label.format(*previous, layer, head)] = found
        self.scores = {label: reader.scores(distance) for label, (reader, *_) in self.heads.items()}
        self.labels = [*self.streams.paths, *self.heads]
        if not self.labels:
            raise ValueError("A sketch needs one component at least; got no paths and no layers.")

    def __call__(self, texts: Int[Tensor, "text pos"]) -> States:
        """States [component, row, d_model]; rows are positions of texts, in order."""
        tokens, places = texts[:, :-1].cpu().unique(return_inverse=True)
        found: list[Tensor] = []
        embed = self.streams.embed(tokens)
        bar = tqdm(self.labels, desc="components", delay=1, leave=False, disable=None if self.progress else True)
        for label in bar:
            if label in self.heads:
                found.append(self._skip_trigrams(label, tokens, places))
            else:
                found.append(self.streams.states(embed, label)[places.flatten().to(embed.device)])
        return torch.stack([state.to(found[0]) for state in found])

    def _skip_trigrams(self, label: str, tokens: Tensor, places: Int[Tensor, "text pos"]) -> Tensor:
        """States of a layer's heads, summed, with attention from scores of single tokens."""
        (reader, heads, reads), scores = self.heads[label], self.scores[label]
        view, block, before = reader.view, reader.view.blocks[reader.layer], int("key" in reads)
        query, key, value = reader.vectors(tokens, heads, reads)
        moved, own = scores.keys(key), scores.own_keys(key)
        W_O = block.attn.W_O.detach().to(value)[heads]
        bias = scores.bias.to(query)[heads, None, None]
        rows: list[Tensor] = []
        for text in places.to(value.device):
            earlier = text.roll(before)  # the tokens that keys are of
            score = scores.capped(query[:, text] @ moved[:, earlier].mT) + bias
            itself = scores.capped((query[:, text] * own[:, earlier]).sum(-1))
            score = score.diagonal_scatter(itself, dim1=1, dim2=2)
            later = torch.ones(score.shape[1:], dtype=torch.bool, device=score.device).triu(1)
            later[:, :before] = True
            pattern = score.masked_fill(later, -torch.inf).softmax(-1)
            pattern[:, :before] = 0.0  # nothing is before the first place
            rows.append(torch.einsum("hqk,hkd,hdm->qm", pattern, value[:, text], W_O))
        write, post = torch.cat(rows), view.post_norm(reader.layer)
        write = write if post is None else post(write)
        return self.decoder.norm(write * float(getattr(block, "residual_contribution_scale", 1.0)))


def _final_states(network: ResidualNetwork, texts: Tensor) -> Float[Tensor, "row d_model"]:
    """The model's final streams after the final norm, at every position but each text's last."""
    found = []
    for part in texts[:, :-1].split(TEXTS):
        mask = None if isinstance(network.view, CallableModel) else torch.ones_like(part)
        found.append(network.decoder.norm(network.trace(part, attention_mask=mask)[FINAL_STREAM]).flatten(0, 1))
    return torch.cat(found)


def _fitted(decoder: Any, states: States, truth: Float[Tensor, "row d_model"]) -> SimplexSolution:
    """Weights shared by all rows, of the components and of a state of zeros."""
    states = torch.cat([states, torch.zeros_like(states[:1])])
    metric = decoder.metric(centered=True).gram[:-1, :-1]
    total = metric.new_zeros(len(states), len(states), dtype=torch.float64)
    for part in slices(len(truth), POSITIONS):
        total += gram(states[:, part].double() - truth[part].double(), metric).sum(0)
    return simplex_qp(total, _size(decoder, truth))


def _size(decoder: Any, truth: Tensor) -> Float[Tensor, ""]:
    """Sum of squared centered logits of states, without b_U."""
    metric = decoder.metric(centered=True).gram[:-1, :-1]
    wide = truth.double()
    return ((wide @ metric.double()) * wide).sum()


def _mixed(states: States, weights: Float[Tensor, " component"]) -> Float[Tensor, "row d_model"]:
    return torch.einsum("c,crd->rd", weights.to(states), states)


def _reader(decoder: Any, states: Tensor) -> Callable[[slice], Tensor]:
    """Log-probabilities [row, d_vocab] of some rows."""
    return lambda part: decoder.logits(states[part]).double().log_softmax(-1)


def _corpus_readers(corpus: TokenInput, texts: Tensor, d_vocab: int) -> dict[str, Callable[[slice], Tensor]]:
    """Log-probabilities of the unigram (one added to every count) and of Kneser-Ney models of a corpus."""
    unigram = unigram_probabilities(corpus, d_vocab, add=1).log()
    contexts = [text[: end + 1][-2:] for text in texts.tolist() for end in range(len(text) - 1)]

    def kneser_ney(n: int) -> Callable[[slice], Tensor]:
        model = KneserNey(corpus, d_vocab, n)
        return lambda part: torch.stack([model.row(context) for context in contexts[part]]).log()

    names = {"corpus unigram": lambda part: unigram.expand(len(contexts[part]), -1)}
    return names | {"corpus Kneser-Ney bi-gram": kneser_ney(2), "corpus Kneser-Ney tri-gram": kneser_ney(3)}


def _measured(readers: dict[str, Callable[[slice], Tensor]], targets: Int[Tensor, " row"]) -> tuple[Tensor, Tensor]:
    """Mean nats of the next tokens, and mean KL from the first reader, of each reader."""
    nats = torch.zeros(len(readers), dtype=torch.float64, device="cpu")
    kl = nats.clone()
    for part in slices(len(targets), POSITIONS):
        aim = next(iter(readers.values()))(part)
        for index, read in enumerate(readers.values()):
            found = read(part).to(aim.device)
            nats[index] -= found.gather(1, targets[part, None].to(aim.device)).sum().cpu()
            kl[index] += (aim.exp() * (aim - found)).sum().cpu()
    return nats / len(targets), kl / len(targets)


def _check_texts(fitting: Tensor, held_out: Tensor) -> None:
    for name, texts in (("fitting", fitting), ("held_out", held_out)):
        if texts.ndim != 2 or len(texts) == 0 or texts.shape[1] < 3 or texts.is_floating_point():
            raise ValueError(
                f"{name} must be token ids [text, pos], three positions at least; got {list(texts.shape)}."
            )
    shared = set(map(tuple, fitting.tolist())) & set(map(tuple, held_out.tolist()))
    if shared:
        raise ValueError(f"Held-out texts must be others than the fitting ones; {len(shared)} are in both.")
