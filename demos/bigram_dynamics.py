"""A small model's bi-grams while it is trained from scratch, path by path.

    python demos/bigram_dynamics.py [--steps 800] [--n 1000] [--plot FILE.svg] [--quick]

A Llama-style model of two layers is trained from scratch, on the CPU, on the docstrings of Python's standard library, with the
tokenizer of the embedded model. At steps that double, the n best bi-grams of every path are read off its weights (no text is
used but for how frequent first tokens are) and looked for among the text's n most frequent ones. Printed:

1. over the steps: held-out loss, hit ratio of each path with that of shuffled second tokens in brackets, and the hit ratio of what
   the model itself predicts, attention and all, averaged over places in the text;
2. the trained model by path, beside token frequencies without a model; and the share of the model's own bi-grams in each path;
3. scores over the steps of the most frequent bi-grams, and of rare but certain ones; in brackets of bi-grams of the same first
   and second tokens that never occur;
4. what follows from these numbers, in words.

Section 5.2 of Chen et al. (arXiv 2410.06024), on a laptop: three minutes of one core, tracking included. Seeds are fixed: two
runs on one machine print the same; another version of Python has another text. (`fine_tuned_bigrams.py` is section 5.3.)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from ngram_studies import rendered
from rich.console import Console
from small_training import Recipe, Text, Training, library, sample
from torch import Tensor

from tl_jets.ngrams.tables import NgramTable
from tl_jets.pretrained import TINYDOCS
from tl_jets.studies import (
    TextComparison,
    Track,
    compare_with_counts,
    hit_ratio,
    ngram_counts,
    track_by_path,
)
from tl_jets.views.figures import learning_curves

PER_KIND = 50  # bi-grams of each kind
FREQUENT, RARE, NEVER = "frequent", "rare but certain", ", never in the text"


def kinds(counts: NgramTable, seen: Tensor, seed: int) -> dict[str, Tensor]:
    """Bi-grams `[pair, 2]` whose first tokens were seen in the sample: `PER_KIND` of each kind, at most.

    The most frequent; of those that occur 8 times or more and in 9 cases of 10 after their first token, the rarest; and for each
    kind its first tokens with its second ones shuffled, as far as the text has none of these.
    """
    known = torch.isin(counts.ids[:, 0], seen)
    ids, count = counts.ids[known], counts.parts["count"][known]
    certain = (count >= 8) & (count >= 0.9 * counts.parts["context_count"][known])
    found = {FREQUENT: ids[:PER_KIND], RARE: ids[PER_KIND:][certain[PER_KIND:]].flip(0)[:PER_KIND]}
    real, draw = set(map(tuple, counts.ids.tolist())), np.random.default_rng(seed)
    for kind, pairs in list(found.items()):
        orders = (torch.from_numpy(draw.permutation(len(pairs))) for _ in range(4))
        shuffled = torch.cat([torch.stack([pairs[:, 0], pairs[order, 1]], dim=1) for order in orders])
        found[kind + NEVER] = shuffled[[tuple(row) not in real for row in shuffled.tolist()]]
    return found


@dataclass(frozen=True)
class Dynamics:
    """What was found over a training run.

    Attributes:
        run: The run.
        tracks: By path.
        kinds: Bi-grams by kind, in the order of the scores.
        final: The trained model against the text.
        counts: Bi-grams of the training text.
    """

    run: Training
    tracks: dict[str, Track]
    kinds: dict[str, Tensor]
    final: TextComparison
    counts: NgramTable

    @property
    def steps(self) -> list[int]:
        """Where the model was looked at."""
        return self.run.recipe.looked_at

    def places(self, kind: str) -> list[int]:
        """Where the bi-grams of a kind stand among those that were tracked."""
        start = sum(len(x) for x in list(self.kinds.values())[: list(self.kinds).index(kind)])
        return list(range(start, start + len(self.kinds[kind])))

    def scores(self, path: str | None, kind: str) -> list[float]:
        """Mean log P(z2|z1) of a kind over the steps: of a path, or of the model's own predictions."""
        scores = torch.stack(self.run.own_scores) if path is None else self.tracks[path].scores
        return scores[:, self.places(kind)].mean(1).tolist()

    def own_hits(self) -> list[tuple[float, float]]:
        """Hit ratio of the model's own bi-grams against the text's at each step, and that of shuffled second tokens."""
        return [(hit_ratio(x, self.counts, self.run.n), control(x, self.counts, self.run.n)) for x in self.run.own]

    def shares(self) -> dict[str, tuple[float, float]]:
        """The share of the trained model's own bi-grams that each path has, and that of shuffled second tokens."""
        own, n = self.run.own[-1], self.run.n
        return {p: (hit_ratio(x.tables[-1], own, n), control(x.tables[-1], own, n)) for p, x in self.tracks.items()}

    def over_steps(self) -> pd.DataFrame:
        """A row a step."""
        frame = pd.DataFrame({"step": self.steps, "held out, nats": [f"{x:.2f}" for x in self.run.nats]})
        for path, found in self.tracks.items():
            pairs = zip(found.hit_ratio.tolist(), found.hit_control.mean(1).tolist(), strict=True)
            frame[path] = [f"{hit:.2f} ({chance:.2f})" for hit, chance in pairs]
        return frame.assign(**{"the model itself": [f"{hit:.2f} ({chance:.2f})" for hit, chance in self.own_hits()]})

    def by_path(self) -> pd.DataFrame:
        """A row a path of the trained model."""
        shares = {path: f"{hit:.2f} ({chance:.2f})" for path, (hit, chance) in self.shares().items()}
        frame = self.final.summary()
        return frame.assign(**{"of the model's own (shuffled)": [shares.get(path, "") for path in frame["path"]]})

    def of_kinds(self) -> pd.DataFrame:
        """A row a step: mean scores of each kind and of its control, along two paths and of the model itself."""
        columns: dict[str, list[str]] = {"step": [*map(str, self.steps), "the text"]}
        conditional = (self.counts.parts["count"] / self.counts.parts["context_count"]).log().tolist()
        real = dict(zip(map(tuple, self.counts.ids.tolist()), conditional, strict=True))
        for kind in (FREQUENT, RARE):
            text = f"{np.mean([real[tuple(row)] for row in self.kinds[kind].tolist()]):.2f}"
            for path in ("direct", "mlps", None):
                pairs = zip(self.scores(path, kind), self.scores(path, kind + NEVER), strict=True)
                cells = [f"{own:.2f} ({chance:.2f})" for own, chance in pairs]
                columns[f"{kind}: {path or 'the model itself'}"] = [*cells, text]
        return pd.DataFrame(columns)

    def margins(self, path: str | None, kind: str) -> list[float]:
        """By how many nats a kind stands above bi-grams of the same tokens that never occur, over the steps."""
        return [own - chance for own, chance in zip(*(self.scores(path, kind + x) for x in ("", NEVER)), strict=True)]

    def conclusions(self) -> list[str]:
        """What follows from the numbers, in words."""
        hits = dict(zip(self.final.labels, self.final.hit_ratio.tolist(), strict=True))
        limits = dict(zip(self.final.labels, self.final.hit_control.quantile(0.975, dim=1).tolist(), strict=True))
        (no_model,) = (label for label in hits if label not in self.tracks)
        paths = sorted(self.tracks, key=lambda path: -hits[path])
        knows = [path for path in paths if hits[path] > max(hits[no_model], limits[path])]
        some = [path for path in paths if limits[path] < hits[path] and path not in knows]
        chance = [path for path in paths if path not in (*knows, *some)]
        found = [
            f"Of the text's {self.run.n} most frequent bi-grams, {_listed(paths, hits)} hold the shares in brackets; a table of "
            f"token frequencies has {hits[no_model]:.2f}. More than it: {', '.join(knows) or 'none'}; less, but more than "
            f"shuffled bi-grams: {', '.join(some) or 'none'}; no more than these: {', '.join(chance) or 'none'}."
        ]
        shares = self.shares()
        best = max(shares, key=shares.__getitem__)
        every = {tuple(row) for mine in self.tracks.values() for row in mine.tables[-1].ids.tolist()}
        together = np.mean([tuple(row) in every for row in self.run.own[-1].ids.tolist()])
        found.append(
            f"Of the {self.run.n} bi-grams that the trained model itself predicts most, {best} has most ({shares[best][0]:.0%}; "
            f"shuffled {shares[best][1]:.0%}), all paths together {together:.0%}: the rest needs attention, or longer paths."
        )
        for path in ("direct", "mlps", None):
            said = []
            for kind in (FREQUENT, RARE):
                margins = self.margins(path, kind)
                top = int(np.argmax(margins))
                most = "" if top == len(margins) - 1 else f" (at most {margins[top]:+.1f}, at step {self.steps[top]})"
                said.append(
                    f"{kind} ones {margins[-1]:+.1f} nats{most}, half of it by step {half_way(self.steps, margins)}"
                )
            name = "In what the model itself predicts" if path is None else f"Along {path}"
            found.append(f"{name}, against bi-grams of the same tokens that never occur: {'; '.join(said)}.")
        return found


def _listed(paths: list[str], values: dict[str, float]) -> str:
    return ", ".join(f"{path} ({values[path]:.2f})" for path in paths)


def half_way(steps: list[int], values: list[float]) -> int:
    """The first step at which half of the largest value is reached."""
    enough = min(max(values) / 2, max(values))
    return next(step for step, value in zip(steps, values, strict=True) if value >= enough)


def control(table: NgramTable, reference: NgramTable, n: int, draws: int = 20) -> float:
    """The mean hit ratio against a reference whose second tokens are shuffled."""
    draw, found = np.random.default_rng(0), []
    for _ in range(draws):
        order = torch.from_numpy(draw.permutation(n))
        ids = torch.stack([reference.ids[:n, 0], reference.ids[order, 1]], dim=1)
        found.append(hit_ratio(table, replace(reference[:n], ids=ids), n))
    return float(np.mean(found))


def follow(text: Text, recipe: Recipe, n: int) -> Dynamics:
    """Train the model and look at it on the way."""
    counts = ngram_counts(text.training, tokenizer=text.tokenizer)
    # How frequent first tokens are; the text's last tokens are followed by nothing.
    first = torch.zeros(text.d_vocab, dtype=torch.float64).index_add_(0, counts.ids[:, 0], counts.parts["count"])
    chosen = kinds(counts, sample(text, recipe)[:, :-1].unique(), recipe.seed)
    run = Training(recipe, text, torch.cat(list(chosen.values())), first / first.sum(), n)
    last: list[Any] = []

    def watched() -> Iterator[tuple[int, Any]]:
        for step, model in run:
            last[:] = [model]
            yield step, model

    tracks = track_by_path(watched(), pairs=run.pairs, reference=counts, n=n, unigram=run.unigram, progress=False)
    final = compare_with_counts(last[0], counts, n=n, progress=False)
    return Dynamics(run, tracks, chosen, final, counts)


def plot(found: Dynamics, file: Path) -> None:
    """Hit ratios and scores of the kinds over the steps, by path and of the model itself, each with its control."""
    steps, names = found.steps, next(iter(found.tracks.values())).pairs
    groups = {kind: [names[i] for i in found.places(kind)] for kind in (FREQUENT, RARE)}
    figure = learning_curves(found.tracks, pairs=groups, log=True)
    hits, *scores = figure.axes
    own, shuffled = zip(*found.own_hits(), strict=True)
    hits.plot(steps, own, "k")
    hits.plot(steps, shuffled, "k--", lw=1)
    for axis, kind in zip(scores, groups, strict=True):
        colors = [line.get_color() for line in axis.lines]
        axis.plot(steps, found.scores(None, kind), "k")
        for path, color in zip((*found.tracks, None), (*colors, "k"), strict=True):
            axis.plot(steps, found.scores(path, kind + NEVER), "--", lw=1, color=color)
    for axis in figure.axes:
        axis.set_xlabel("step")
    figure.suptitle("black: the model itself; dashed: second tokens shuffled, bi-grams that never occur", fontsize=9)
    figure.savefig(file)


def main() -> None:
    """Train, track, compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="of training (default: %(default)s)")
    parser.add_argument("--n", type=int, default=1000, help="how many bi-grams are compared (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="a file for the learning curves (SVG, PNG, PDF)")
    parser.add_argument("--quick", action="store_true", help="a smaller model and text: to see whether it runs")
    options = parser.parse_args()
    start = time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINYDOCS, model_max_length=2**30)
    recipe, files = Recipe(options.steps), library()
    if options.quick:
        recipe, files = replace(recipe, batch=8, context=64, d_model=32, d_mlp=96), files[:40]
    text = Text.of(files, tokenizer)
    found = follow(text, recipe, options.n)
    console = Console(width=150)
    console.print(
        f"{found.counts.settings['total']:,} bi-grams of {len(text.training):,} paragraphs, {len(found.counts):,} different; "
        f"{recipe.steps * recipe.batch * recipe.context:,} tokens of training"
    )
    hint = "in brackets: with second tokens shuffled"
    console.print(rendered(found.over_steps(), f"1. The text's {options.n:,} most frequent bi-grams, by path; {hint}"))
    console.print(rendered(found.by_path(), "2. The trained model"))
    console.print(
        rendered(
            found.of_kinds(),
            f"3. Mean log P(z2|z1) in nats, {PER_KIND} bi-grams of a kind; in brackets: that never occur",
        )
    )
    console.print("4. What follows")
    for line in found.conclusions():
        console.print(f"- {line}")
    if options.plot is not None:
        plot(found, options.plot)
    console.print(f"{time.perf_counter() - start:.0f} s in all, {time.process_time():.0f} s of processors")


if __name__ == "__main__":
    main()
