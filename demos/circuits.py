"""Circuits of paths beside attribution patching and random paths, and jets of patched writes, on pairs of prompts.

    python demos/circuits.py PATH_OR_NAME [--top 256] [--k 8 32 128] [--random 5] [--seed 0] [--granularity sublayer]

Prints, for every pair: how much of the logit difference the first k paths of the contrast of both runs recover, beside attribution
patching and random paths of the same size (mean, lowest to highest) and paths of the clean run, for nodes and for edges; and how
attribution patching and jets of orders 2 and 3 agree with activation patching over all writes.
"""

from __future__ import annotations

import argparse

from rich import box
from rich.console import Console
from rich.table import Table

import tl_jets as tj
from tl_jets.pretrained import load_model, load_tinydocs

PAIRS = [
    (
        "When Mary and John went to the store, John gave a drink to",
        "When Mary and John went to the store, Mary gave a drink to",
        [" Mary", " John"],
    ),
    ("The capital of Japan is the city of", "The capital of France is the city of", [" Tokyo", " Paris"]),
    ("The keys to the cabinet", "The key to the cabinet", [" are", " is"]),
]
TINYDOCS = [("This function is available on Unix and", "This module is deprecated since version and", None)]


def main() -> None:
    """Print the tables for the model of the command line, or the embedded one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a local Hugging Face directory, or a model's name; default: tinydocs")
    parser.add_argument("--top", type=int, default=256, help="largest paths of each run (default: 256)")
    parser.add_argument("--k", type=int, nargs="+", default=[8, 32, 128], help="sizes of circuits (default: 8 32 128)")
    parser.add_argument("--random", type=int, default=5, help="random circuits of each size (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--granularity", choices=["sublayer", "head"], default="sublayer")
    options = parser.parse_args()
    model = load_tinydocs() if options.model is None else load_model(options.model)
    network, console = tj.ResidualNetwork(model, options.granularity), Console(width=110)
    for clean, corrupted, targets in TINYDOCS if options.model is None else PAIRS:
        pair = network.trace(clean), network.trace(corrupted)
        found = tj.contrast(network, *pair, by="path", targets=targets, top=options.top)
        console.print(f"\n{clean} / {corrupted}\n  {found}", highlight=False, markup=False)
        console.print(circuits(network, pair, found, targets, options))
        console.print(patching(network, pair, targets))


def circuits(network, pair, found, targets, options) -> Table:
    """What circuits recover, with everything else corrupted, and with everything else zero."""
    table = Table("level", "k", "nodes", "edges", box=box.SIMPLE_HEAD, show_edge=False, title_justify="left")
    table.title = "Recovered: everything else corrupted (everything else zero)"
    for name in ("contrast paths", "attribution", "random", "clean paths"):
        table.add_column(name, justify="right")
    by_clean = found.clean.mean(-1).abs().argsort(descending=True, stable=True).tolist()
    for level in ("node", "edge"):
        settings = {"k": options.k, "level": level, "targets": targets, "seed": options.seed}
        rows = tj.circuit_faithfulness(network, *pair, found, random=options.random, **settings).summary()
        own = [found.labels[i] for i in by_clean]
        of_clean = tj.circuit_faithfulness(network, *pair, own, random=0, **settings).summary()
        for k in options.k:
            cells = []
            for kind, source in (("paths", rows), ("attribution", rows), ("random", rows), ("paths", of_clean)):
                both = source[(source.circuit == kind) & (source.k == k)].set_index("baseline")
                text = "{:.2f} ({:.2f})".format(*both.recovered[["corrupted", "zero"]])
                if kind == "random":
                    text += "\n{:.2f} to {:.2f}".format(*both.loc["corrupted", ["lowest", "highest"]])
                cells.append(text)
            size = rows[(rows.circuit == "paths") & (rows.k == k)].iloc[0]
            table.add_row(level, str(k), f"{size.nodes:.0f}", f"{size.edges:.0f}", *cells)
    return table


def patching(network, pair, targets) -> Table:
    """How estimates agree with activation patching over all writes."""
    compared = tj.compare_patching(network, *pair, order=3, targets=targets)
    table = Table("method", "pearson", "spearman", "error", "closer", box=box.SIMPLE_HEAD, show_edge=False)
    table.title, table.title_justify = f"Agreement with activation patching over {len(compared.sites)} writes", "left"
    for row in compared.agreement().itertuples():
        table.add_row(row.method, *(f"{x:.2f}" for x in (row.pearson, row.spearman, row.error, row.closer)))
    return table


if __name__ == "__main__":
    main()
