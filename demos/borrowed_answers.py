"""How much of a jet lens is the layer's own, and how much is borrowed from the model's own final stream.

    python demos/borrowed_answers.py [MODEL [PROMPT ...]]

Without MODEL (a local Hugging Face directory, or a model's name) the embedded model is taken. Prints, for every layer and kind of
center, the KL of the iterative lens at order 1 beside that of a random center of equal norm and angle to the final stream: the
table of the guide to lenses.
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from tl_jets import ResidualNetwork, iterative_jet_lens, load_tinydocs
from tl_jets.pretrained import load_model

PROMPTS = [
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
CENTERS = ("none", "match", "orthogonal")


def main() -> None:
    """Print the table for the model and prompts of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a local Hugging Face directory, or a model's name")
    parser.add_argument("prompts", nargs="*", help="default: four sentences of a children's story, or of documentation")
    options = parser.parse_args()
    network = ResidualNetwork(load_tinydocs() if options.model is None else load_model(options.model))
    trace = network.trace(options.prompts or (DOCS if options.model is None else PROMPTS))
    lenses = {scale: iterative_jet_lens(network, trace, order=1, center_scale=scale) for scale in CENTERS}
    table = Table(title="KL(model || lens) in nats, averaged over positions; in brackets the random-center control")
    for heading in ("layer", "logit lens", *(f"order 1, {scale}" for scale in CENTERS), "borrowed (none)"):
        table.add_column(heading, justify="right")
    averages = {scale: lens.average().set_index(["layer", "order"]) for scale, lens in lenses.items()}
    for layer in lenses["none"].labels:
        cells = [_cell(averages["none"].loc[(layer, 0)])]
        cells += [_cell(averages[scale].loc[(layer, 1)]) for scale in CENTERS]
        table.add_row(layer, *cells, f"{averages['none'].loc[(layer, 1)].borrowed_share:.2f}")
    Console(width=110).print(table)


def _cell(row: object) -> str:
    return f"{row.kl:.2f} ({row.control_kl:.2f})"  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
