"""What expansions cost against a forward pass: orders 0 to 3, uniform and optimal weights, three kinds of expansion.

Run as a script: `python tests/benchmarks/bench_costs.py [--rounds N] [--tokens N] [--threads N]`. It prints the table of the
documentation's page on costs, in Markdown. One process; every round measures a forward pass and every cell once, so that a noisy
machine moves all of them together; medians over rounds.

- blocks: `jet_expand` at the stage of the middle block, with the embeddings and the writes of all earlier blocks as centers;
  the jets of a whole block, attention included, in Taylor arithmetic.
- joint lens: the components' jets of the final norm, in closed form; every measure and the control are part of it, and so is the
  lens' own forward pass.
- iterative lens: one call gives all orders up to k; it has no weights.

A trace (one forward pass) is part of the lenses, and not of `jet_expand`, which is evaluated on a ready one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tl_jets import ResidualNetwork, Trace, iterative_jet_lens, jet_expand, joint_jet_lens, load_tinydocs

ORDERS = (0, 1, 2, 3)
WEIGHTS = ("uniform", "optimal")
FORWARD = "forward pass"


def gpt2_small(tokenizer: PreTrainedTokenizerFast) -> ResidualNetwork:
    """GPT-2 small's size with random weights: 12 layers, d_model 768, 50,257 tokens."""
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config()).eval()
    model = TransformerBridge.boot_transformers("gpt2", hf_model=hf, tokenizer=tokenizer, device="cpu")
    return ResidualNetwork(model.eval().requires_grad_(False), "block")


def work(network: ResidualNetwork, n_tokens: int) -> dict[tuple[str, int, str], Callable[[], object]]:
    """What is measured, by (what, order, weights)."""
    model, d_vocab = network.view.model, network.decoder.W_U.shape[1]
    tokens = torch.randint(0, d_vocab, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    network.decoder.metric(centered=True)  # once a model, and measured elsewhere
    trace = network.trace(tokens)
    middle = len(network.stages) // 2
    step = network.stages[middle].steps[0].label
    centers = [*network.sources, *(s.write for stage in network.stages[:middle] for s in stage.steps)]
    found: dict[tuple[str, int, str], Callable[[], object]] = {(FORWARD, 0, ""): lambda: model(tokens)}
    for weights in WEIGHTS:
        for order in ORDERS:
            expansion = jet_expand(network, step, centers=centers, order=order, weights=weights)
            # On a trace of its own: what a trace has evaluated is not evaluated again.
            found[f"`jet_expand` at `{step}`, {len(centers)} centers", order, weights] = lambda expansion=expansion: (
                expansion.evaluate(Trace(network, trace.recording))
            )
    for weights in WEIGHTS:
        for order in ORDERS:
            found[f"joint lens, {len(network.components)} centers", order, weights] = (
                lambda order=order, weights=weights: joint_jet_lens(network, tokens, order=order, weights=weights)
            )
    for order in ORDERS:
        found["iterative lens, all orders up to", order, "none"] = lambda order=order: iterative_jet_lens(
            network, tokens, order=order
        )
    return found


@torch.no_grad()
def medians(jobs: dict[tuple[str, int, str], Callable[[], object]], rounds: int) -> dict[tuple[str, int, str], float]:
    """Median seconds of every job over rounds that interleave them; one round before is not counted."""
    seconds: dict[tuple[str, int, str], list[float]] = {key: [] for key in jobs}
    for round_ in range(rounds + 1):
        for key, job in jobs.items():
            start = time.perf_counter()
            job()
            if round_:
                seconds[key].append(time.perf_counter() - start)
    return {key: statistics.median(times) for key, times in seconds.items()}


def table(found: dict[tuple[str, int, str], float]) -> list[str]:
    """Ratios to the forward pass as a Markdown table: a row for each kind and weights, a column an order."""
    forward = next(seconds for key, seconds in found.items() if key[0] == FORWARD)
    rows = list(dict.fromkeys((what, weights) for what, _, weights in found if what != FORWARD))
    lines = [
        "| expansion | weights | " + " | ".join(f"order {order}" for order in ORDERS) + " |",
        "|---|---|" + "---|" * len(ORDERS),
    ]
    for what, weights in rows:
        cells = [f"{found[what, order, weights] / forward:.1f}" for order in ORDERS]
        lines.append(f"| {what} | {weights} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measure both models and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tinydocs = load_tinydocs()
    networks = {
        "GPT-2 small's size, random weights": gpt2_small(tinydocs.tokenizer),
        "tinydocs": ResidualNetwork(tinydocs, "block"),
    }
    for name, network in networks.items():
        found = medians(work(network, arguments.tokens), arguments.rounds)
        print(f"\n{name}: {arguments.tokens} tokens, {1000 * found[FORWARD, 0, '']:.0f} ms a forward pass\n")
        print("\n".join(table(found)))


if __name__ == "__main__":
    main()
