"""What best predicts an ablation: direct attribution, jet weights, or the sum of all detached paths through a component?

    python demos/what_predicts_ablation.py [--model MODEL] [--granularity head]

Without MODEL (a local Hugging Face directory, or a model's name) the embedded model is taken. For every prompt and every
component, the component's write is replaced by zero, or by its mean over the prompts, and the answer is read at the last
position: by how much its logit, centered over the vocabulary, falls, and KL(clean || ablated). Three predictions are made
from the clean run alone:

- direct attribution: the answer's centered logit of the component's write, under the final norm's own scale;
- gradient x write: the ordinary gradient of that logit at the component's write, times the write (attribution patching to zero),
  which lets scales, patterns and gates respond, to first order;
- jet weights: the component's weight in the joint jet lens (order 0; never negative);
- detached paths: the answer's centered logit of all detached paths through the component;
- their length: that of the centered logits of all these paths, whatever the token;
- and, as a control that knows nothing of the answer, the length of the component's write.

Printed: Spearman's rank correlation over components, averaged over the prompts. The fall of the logit is compared with
the predictions, the KL with their absolute values.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor

from tl_jets import ResidualNetwork, Trace, joint_jet_lens
from tl_jets.interventions.ablation_effects import ablation_effect
from tl_jets.paths.statistics import path_sums
from tl_jets.pretrained import load_model

STORIES = [
    "Once upon a time, there was a little girl named Lily. She loved to play",
    "Tom and his dog went to the park. They saw a big tree and",
    "One day, a small bird wanted to fly high in the sky, but it was",
    'Mom said, "It is time to eat." Ben was very happy because',
    "The sun was hot and the cat wanted to",
    "Lily found a red ball in the",
    "The boy was sad because he could not",
    "They all lived happily",
]
DOCS = [
    "If the file does not exist, an error is",
    "This function is available on Unix and",
    "The default value of this parameter is",
    "The server process is started by the",
    "Return a new list containing all items of the",
    "If the optional argument is not given, the",
    "The table must have a primary",
    "Raises an exception if the",
]


def main() -> None:
    """Print the table for the model of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local Hugging Face directory, or a model's name; default: the embedded one")
    parser.add_argument("--granularity", choices=("sublayer", "head"), default="head", help="what the components are")
    options = parser.parse_args()
    network = ResidualNetwork(load(options.model), options.granularity)
    prompts = STORIES if options.model else DOCS
    steps = [step.label for step in network.steps if step.kind != "attn_bias"]
    title = f"Spearman's rank correlation over {len(steps)} components, mean and standard deviation of {len(prompts)} prompts"
    table = Table(title=title)
    table.add_column("prediction")
    for mode in ("zero", "mean"):
        table.add_column(f"{mode}: fall of the logit", justify="right")
        table.add_column(f"{mode}: KL", justify="right")
    for name, cells in correlations(network, prompts, steps).items():
        table.add_row(name, *(f"{values.mean():+.2f} ({values.std():.2f})" for values in cells))
    Console(width=120).print(table)


def load(name: str | None) -> Any:
    """The model of that name, or the embedded one."""
    if name is not None:
        return load_model(name)
    from tl_jets.pretrained import load_tinydocs

    return load_tinydocs()


def correlations(network: ResidualNetwork, prompts: list[str], steps: list[str]) -> dict[str, list[Tensor]]:
    """By prediction: for zero and mean ablation, the correlation with the logit's fall and with the KL [prompt]."""
    found: dict[str, list[list[float]]] = {}
    reference = network.trace(prompts)
    for prompt in prompts:
        trace = network.trace(prompt)
        effects = [ablation_effect(network, trace, steps)]
        effects.append(ablation_effect(network, trace, steps, mode="mean", reference=reference))
        answer = int(effects[0].target_ids)
        for name, predicted in predictions(network, trace, steps, answer).items():
            row = []
            for effect in effects:
                row.append(rank_correlation(predicted, -effect.centered[:, 0, 0, 0]))
                row.append(rank_correlation(predicted.abs(), effect.kl[:, 0, 0]))
            found.setdefault(name, []).append(row)
    return {name: list(torch.tensor(rows, dtype=torch.float64).T) for name, rows in found.items()}


def predictions(network: ResidualNetwork, trace: Trace, steps: list[str], answer: int) -> dict[str, Tensor]:
    """What is predicted of every step, from the clean forward pass [step]."""
    norm = network.decoder.norm
    writes = torch.stack([trace[f"{step}_out"][0, -1] for step in steps])
    last = norm.center(trace["final_post"][0, -1])
    scale = torch.rsqrt(last.pow(2).mean() + norm.eps) if norm.kind != "none" else 1.0
    logits = network.decoder.logits(norm.scale(norm.center(writes)) * scale, 0.0)
    lens = joint_jet_lens(network, trace, positions=-1)
    paths = path_sums(network, trace, positions=-1, targets=answer)
    return {
        "direct attribution": (logits[:, answer] - logits.mean(-1)).detach(),
        "gradient x write": gradient_times_write(network, trace, steps, answer),
        "jet weights": torch.stack([lens.weights[lens.labels.index(f"{step}_out"), 0, 0] for step in steps]),
        "all detached paths": torch.stack([paths.effect[paths.labels.index(step), 0, 0] for step in steps]),
        "length of their logits": torch.stack([paths.norm[paths.labels.index(step), 0, 0] for step in steps]),
        "length of the write (control)": writes.norm(dim=-1),
    }


def gradient_times_write(network: ResidualNetwork, trace: Trace, steps: list[str], answer: int) -> Tensor:
    """To first order, by how much the answer's centered logit falls if a step writes nothing at any position [step]."""
    model = network.view.model
    layers = [step for label in steps for step in network.steps if step.label == label]
    sites = [f"blocks.{step.layer}.hook_{'mlp' if step.kind == 'mlp' else 'attn'}_out" for step in layers]
    added: dict[str, Tensor] = {}

    def add(write: Tensor, hook: Any, name: str) -> Tensor:
        added[name] = torch.zeros_like(write, requires_grad=True)
        return write + added[name]

    with torch.enable_grad(), model.hooks([(name, partial(add, name=name)) for name in dict.fromkeys(sites)]):
        logits = model(trace.tokens)[0, -1]
        found = torch.autograd.grad(logits[answer] - logits.mean(), list(added.values()))
    gradients = dict(zip(added, found, strict=True))
    return torch.stack(
        [(gradients[site] * trace[f"{step}_out"]).sum() for site, step in zip(sites, steps, strict=True)]
    )


def rank_correlation(predicted: Tensor, found: Tensor) -> float:
    """Spearman's rank correlation of two vectors."""
    return float(spearmanr(predicted.detach().numpy(), found.detach().numpy()).statistic)


if __name__ == "__main__":
    main()
