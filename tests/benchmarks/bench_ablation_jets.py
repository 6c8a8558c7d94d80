"""How often a series of an ablation converges on SmolLM2-135M, and how often that can be told from its coefficients.

Run with `python tests/benchmarks/bench_ablation_jets.py FOLDER`: all sublayers and a hundred heads drawn at random, ablated at
all positions, and at all but the first. A series is good if its error at dose 1 is below 10% of the true effect. For every order
it prints how often series are good; for each criterion how often it holds, and how often a series is good where it holds.
"""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import torch

import tl_jets as tj
from tl_jets.interventions.ablation_jets import CONVERGED
from tl_jets.pretrained import load_model

PROMPTS = [
    "The Eiffel Tower is in the city of",
    "When Mary and John went to the store, John gave a drink to",
    "The capital of Japan is the city of",
    "The variable foo_barrel is set. Later the function reads foo_bar",
]
HEADS, ORDER = 100, 4


def main() -> None:
    """Measure and print the table."""
    network = tj.ResidualNetwork(load_model(sys.argv[1]))
    heads, draw = [s.label for s in network.at("head").steps if s.kind == "head"], np.random.default_rng(0)
    found = []
    for prompt in PROMPTS:
        steps = [*(step.label for step in network.steps), *draw.permutation(heads)[:HEADS].tolist()]
        for where in (None, list(range(1, network.trace(prompt).tokens.shape[1]))):
            jets = tj.ablation_effect(network, prompt, steps, order=ORDER, ablated_positions=where)
            found.append((jets.coefficients.flatten(1), jets.centered.flatten()))
            print(f"{prompt[:20]!r}: {jets}", file=sys.stderr, flush=True)
    terms, truth = torch.cat([own[0] for own in found], 1), torch.cat([own[1] for own in found])
    rows = []
    for order in range(1, ORDER + 1):
        error, last = (terms[:order].sum(0) - truth).abs(), terms[order].abs()
        good, estimated = error <= CONVERGED * truth.abs(), 2 * last <= CONVERGED * truth.abs()
        row = {"order": order, "good": float(good.double().mean()), "median error": float(error.median())}
        row |= {
            "largest error": float(error.max()),
            "errors below 2 |c_k+1|": float((error <= 2 * last).double().mean()),
        }
        for name, holds in {
            "falling": last < terms[0].abs(),
            "estimate": estimated,
            "converges": estimated & good,
        }.items():
            row |= {name: float(holds.double().mean()), f"good if {name}": float(good[holds].double().mean())}
        rows.append(row)
    print(f"{len(truth):,} ablations\n{pd.DataFrame(rows).round(3).to_string(index=False)}")


if __name__ == "__main__":
    main()
