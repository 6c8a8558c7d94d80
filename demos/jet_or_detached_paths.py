"""Paths of jets or detached paths: how much of each form is the model's own answer, and which paths make a prediction.

    python demos/jet_or_detached_paths.py [MODEL]

Without MODEL (a local Hugging Face directory, or a model's name) the embedded model is taken. Three tables:

1. for the jets of Algorithm 2 (order 0, order 1, order 1 with norm-matched centers) and for detached paths: how many paths
   there are, how much of what the unembedding reads they leave over, and how many of them decode to the model's own answer,
   whatever they pass through (the jets of order 1 carry it into every path);
2. the 20 detached paths with the largest effect on the answer after one prompt;
3. how much of the answer all paths of every length are.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tl_jets import DivergenceWarning, ResidualNetwork
from tl_jets.core.tokens import token_text, visible
from tl_jets.paths.expansion import exponential_expansion
from tl_jets.paths.statistics import path_lengths
from tl_jets.pretrained import load_model

FORMS: dict[str, dict[str, Any]] = {
    "jets, order 0": {"order": 0},
    "jets, order 1": {"order": 1},
    "jets, order 1, matched centers": {"order": 1, "center_scale": "match"},
    "detached": {"linearize": "detached"},
}
STORIES = [
    "Once upon a time, there was a little girl named Lily. She loved to play",
    "Tom and his dog went to the park. They saw a big tree and",
    "One day, a small bird wanted to fly high in the sky, but it was",
    'Mom said, "It is time to eat." Ben was very happy because',
]
DOCS = [
    "If the file does not exist, an error is",
    "This function is available on Unix and",
    "The default value of this parameter is",
    "The server process is started by the",
]


def main() -> None:
    """Print the tables for the model of the command line."""
    warnings.simplefilter("ignore", DivergenceWarning)  # how much is left is what the table is about
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", help="a local Hugging Face directory, or a model's name; none: the embedded one"
    )
    options = parser.parse_args()
    network = ResidualNetwork(load(options.model))
    prompts = STORIES if options.model else DOCS
    console = Console(width=110)
    console.print(compare(network, prompts))
    console.print(largest(network, prompts[0]))
    console.print(lengths(network, prompts))


def load(name: str | None) -> Any:
    """The model in float64, where exactness shows."""
    if name is not None:
        return load_model(name, dtype=torch.float64)
    from tl_jets.pretrained import load_tinydocs

    return load_tinydocs(dtype=torch.float64)


def compare(network: ResidualNetwork, prompts: list[str]) -> Table:
    """Remainder and copies of every form, averaged over the prompts and all their positions."""
    trace = network.trace(prompts)
    table = Table(title=f"{len(prompts)} prompts, {int(trace.valid.sum())} positions")
    for heading in ("form", "paths", "remainder", "paths that decode to the model's answer"):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    for form, options in FORMS.items():
        paths = exponential_expansion(network, **options)(trace)
        statistics = paths.statistics()
        copies = float(statistics.copies[:, statistics.valid].double().mean())
        table.add_row(form, f"{len(paths):,}", f"{paths.relative_remainder:.2g}", f"{copies:.0%}")
    return table


def largest(network: ResidualNetwork, prompt: str) -> Table:
    """The detached paths with the largest effect on the model's answer after a prompt."""
    top = exponential_expansion(network, linearize="detached", top=20, rank="effect")(prompt, positions=-1)
    statistics = top.statistics()
    answer = visible(token_text(network.tokenizer, int(statistics.model_top_ids[0, 0])))
    logits = network.decoder.logits(top.truth[0, 0])
    total = float(logits.max() - logits.mean())
    table = Table(title=f"effect on the answer {answer!r} (logit over the mean: {total:.2f}) after {prompt!r}")
    for heading in ("effect", "norm", "says", "path"):
        table.add_column(heading, justify="left" if heading in ("path", "says") else "right")
    says = statistics.top_tokens()
    for i, path in enumerate(statistics.labels):
        effect, norm = float(statistics.effect[i, 0, 0]), float(statistics.norm[i, 0, 0])
        table.add_row(f"{effect:+.3f}", f"{norm:.3f}", visible(says[path][0][0]), path)
    rest = total - float(statistics.effect.sum())
    table.add_row(f"{rest:+.3f}", "", "", f"the other {top.expansion.count - len(top):,} paths together")
    return table


def lengths(network: ResidualNetwork, prompts: list[str]) -> Table:
    """How much of the logits the paths of every length are."""
    table = Table(title="all detached paths by number of writes, averaged over the prompts")
    for heading in ("writes", "paths", "norm", "share", "effect on the answer", "cosine"):
        table.add_column(heading, justify="right")
    for row in path_lengths(network, prompts).average().to_dict("records"):
        numbers = [f"{row[name]:.3f}" for name in ("norm", "share", "effect", "cosine")]
        table.add_row(row["length"], f"{row['count']:,}", *numbers)
    return table


if __name__ == "__main__":
    main()
