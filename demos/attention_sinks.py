"""Attention sinks, outlier dimensions and tied embeddings of a model, and what they do to averages.

    python demos/attention_sinks.py PATH_OR_NAME [PROMPT ...]

Prints, over the prompts: lengths of streams at sinks and elsewhere; the share of a sink's squared length in its largest
dimensions; averages of the lenses with and without sinks; weights of the joint lens with and without them; and how often
the embedding alone, decoded, gives the token itself.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from tl_jets import ResidualNetwork, iterative_jet_lens, joint_jet_lens
from tl_jets.core.tokens import token_text, visible
from tl_jets.pretrained import load_model, load_tinydocs

PROMPTS = [
    "The Eiffel Tower is in the city of",
    "When Mary and John went to the store, John gave a drink to",
    "The capital of Japan is the city of",
    "Water freezes at a temperature of zero degrees",
]
SHOWN, COMPONENTS, TOKENS = 7, 6, 1000
Table = partial(RichTable, box=box.SIMPLE_HEAD, show_edge=False, title_justify="left")


def main() -> None:
    """Print the tables for the model and prompts of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a local Hugging Face directory, or a model's name")
    parser.add_argument("prompts", nargs="*", help="default: four sentences")
    options = parser.parse_args()
    network = ResidualNetwork(load_tinydocs() if options.model is None else load_model(options.model))
    trace = network.trace(options.prompts or PROMPTS)
    lens = iterative_jet_lens(network, trace, order=1)
    labels = [lens.labels[i] for i in torch.linspace(0, len(lens.labels) - 1, SHOWN).round().int().unique().tolist()]
    console = Console(width=100)
    console.print(lens.sinks.said(lens.valid), highlight=False)
    for table in (lengths(trace, lens, labels), averages(lens, labels), weights(network, trace), tied(network)):
        console.print("", table)


def lengths(trace, lens, labels) -> RichTable:
    """Lengths of streams at sinks and elsewhere, and in which dimensions a sink's is."""
    sinks, others = lens.sinks.mask, lens.valid & ~lens.sinks.mask
    table = Table(
        "stream",
        "sinks, mean",
        "others, median",
        "others, longest",
        "share of a sink in 1, 3 dimensions",
        title="Lengths of streams",
    )
    for label in labels:
        stream = trace[label].double()
        size = stream.norm(dim=-1)
        largest = (stream[sinks].square() / size[sinks].square()[:, None]).topk(3).values.mean(0)
        cells = [size[sinks].mean(), size[others].median(), size[others].max()]
        table.add_row(label, *(f"{float(x):,.0f}" for x in cells), f"{largest[0]:.0%}, {largest.sum():.0%}")
    return table


def averages(lens, labels) -> RichTable:
    """Mean KL with and without sinks, and the median, each beside its control."""
    table = Table("layer", "order", "with sinks", "without", "median without", title="KL in nats (control)")
    every, without = lens.average(include_sinks=True), lens.average(spread=True)
    for i, row in without.iterrows():
        if row.layer in labels:
            cells = [f"{frame.kl[i]:.1f} ({frame.control_kl[i]:.1f})" for frame in (every, without)]
            table.add_row(row.layer, str(row.order), *cells, f"{row.kl_median:.1f} ({row.control_kl_median:.1f})")
    return table


def weights(network, trace) -> RichTable:
    """Components of the largest mean weights, with and without sinks."""
    joint = joint_jet_lens(network, trace)
    kept = {"with sinks": joint.valid, "without": joint.valid & ~joint.sinks.mask}
    table = Table(*kept, title="Joint lens: components by mean weight")
    columns = []
    for positions in kept.values():
        means = joint.weights[:, positions].mean(-1)
        columns.append([f"{joint.labels[i]} {means[i]:.3f}" for i in means.argsort(descending=True)[:COMPONENTS]])
    for cells in zip(*columns, strict=True):
        table.add_row(*cells)
    return table


def tied(network) -> RichTable:
    """How often the embedding alone decodes to the token itself, and which tokens it decodes to most otherwise."""
    d_vocab = network.decoder.d_vocab
    draw = torch.randperm(d_vocab, generator=torch.Generator().manual_seed(0))[:TOKENS, None]
    embedded = network.trace(draw, attention_mask=torch.ones_like(draw))["embed"][:, 0]
    best = network.decoder.logits(network.decoder.norm(embedded)).argmax(-1)
    same = best == draw[:, 0]
    found, counts = best[~same].unique(return_counts=True)
    often = ", ".join(
        f"{visible(token_text(network.tokenizer, int(found[i])))} ({counts[i]})"
        for i in counts.argsort(descending=True)[:3]
    )
    table = Table(
        "tokens drawn", "decode to themselves", "most frequent others", title="The embedding, decoded at once"
    )
    table.add_row(str(len(draw)), f"{float(same.double().mean()):.0%}", often)
    return table


if __name__ == "__main__":
    main()
