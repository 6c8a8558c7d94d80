"""The largest detached paths of a prompt, and the ablation that confirms or refutes each.

    python demos/top_paths.py [--model MODEL] [--prompt PROMPT] [--top 20]

Without MODEL (a local Hugging Face directory, or a model's name) the embedded model is taken. A detached path has an exact
*effect*: what it adds to the answer's logit, centered over the vocabulary, while norm scales, attention patterns and gates
stay as they are. In an ablation they respond:

- path ablation: what arrives along this path alone is taken away, and every step of it is evaluated again by the model
  (`tj.path_ablation`); the fall of the answer's centered logit is what to compare with the effect;
- step ablation: the writes of all steps of the path become zero, and with them every other path through these steps.

A path is *confirmed* if the fall under its own ablation is within a factor of two of its effect, *refuted* if it is less than
a tenth of it or of the other sign, and *partly* right otherwise. The control is as many paths drawn at random among those
with at least a tenth of the smallest effect in the table; and chance is what is confirmed with the falls shuffled among the paths.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

import tl_jets as tj
from tl_jets.core.tokens import token_text, visible
from tl_jets.interventions.path_ablations import verdict
from tl_jets.pretrained import load_model

PROMPT = "This function is available on Unix and"


def main() -> None:
    """Print the table for the model and prompt of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local Hugging Face directory, or a model's name; default: the embedded one")
    parser.add_argument("--prompt", default=PROMPT, help="default: %(default)r")
    parser.add_argument("--top", type=int, default=20, help="how many paths (default: %(default)s)")
    options = parser.parse_args()
    network = tj.ResidualNetwork(tj.load_tinydocs() if options.model is None else load_model(options.model))
    console = Console(width=120)
    console.print(table(network, options.prompt, options.top))


def table(network: tj.ResidualNetwork, prompt: str, top: int) -> Table:
    """The largest paths with both ablations, and how many of them, and of random ones, are confirmed."""
    trace = network.trace(prompt)
    every = tj.exponential_expansion(network, linearize="detached")(trace, positions=-1).statistics()
    effects = dict(zip(every.labels, every.effect[:, 0, 0].tolist(), strict=True))
    effects.pop("ln_final_bias", None)  # the constant of the decoder itself passes through nothing
    ranked = sorted(effects, key=lambda path: -abs(effects[path]))
    chosen, others = ranked[:top], ranked[top:]
    others = [path for path in others if abs(effects[path]) > abs(effects[chosen[-1]]) / 10]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:top].tolist()
    drawn = [others[i] for i in order]
    tested = [*chosen, *drawn]
    ablated = tj.path_ablation(network, trace, tested)
    falls = dict(zip(tested, (-ablated.centered[:, 0, 0, 0]).tolist(), strict=True))
    moving = [path for path in chosen if tj.Path.parse(path).length]
    zeroed = dict(zip(moving, (-tj.ablation_effect(network, trace, moving).centered[:, 0, 0, 0]).tolist(), strict=True))
    answer = visible(token_text(network.tokenizer, int(every.model_top_ids[0, 0])))
    found = Table(title=f"{top} of {len(effects):,} detached paths to the answer {answer!r} after {prompt!r}")
    for heading in ("effect", "path ablation", "step ablation"):
        found.add_column(heading, justify="right")
    found.add_column("verdict")
    found.add_column("path")
    for path in chosen:
        steps = f"{zeroed[path]:+.2f}" if path in zeroed else ""
        found.add_row(f"{effects[path]:+.2f}", f"{falls[path]:+.2f}", steps, verdict(effects[path], falls[path]), path)
    lines = []
    for name, paths in ((f"these {len(chosen)}", chosen), (f"{len(drawn)} random paths", drawn)):
        counts = Counter(verdict(effects[path], falls[path]) for path in paths)
        pairs = [effects[path] for path in paths], [falls[path] for path in paths]
        text = ", ".join(f"{counts[kind]} {kind}" for kind in ("confirmed", "partly", "refuted"))
        lines.append(f"{name}: {text}; rank correlation of effect and fall {spearmanr(*pairs).statistic:+.2f}")
        chance = confirmed_by_chance(*pairs)
        mean, as_many = sum(chance) / len(chance), sum(n >= counts["confirmed"] for n in chance) / len(chance)
        lines.append(f"falls shuffled: {mean:.1f} confirmed, as many in {as_many:.1%} of shuffles")
    found.caption = "\n".join(lines)
    return found


def confirmed_by_chance(effects: list[float], falls: list[float], draws: int = 1000) -> list[int]:
    """How many of the paths are confirmed if their falls are shuffled among them, draw by draw."""
    generator = random.Random(0)
    counts = []
    for _ in range(draws):
        shuffled = generator.sample(falls, len(falls))
        counts.append(sum(verdict(*pair) == "confirmed" for pair in zip(effects, shuffled, strict=True)))
    return counts


if __name__ == "__main__":
    main()
