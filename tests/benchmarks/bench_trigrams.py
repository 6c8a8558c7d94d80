"""Ratios of exact skip-trigrams to one bi-gram sweep's bare products. Not collected by the default run.

Run as a script: `python tests/benchmarks/bench_trigrams.py [--threads N] [--heads N] [--flat] [--memory]`. A model of GPT-2 small's
size (V = 50,257, d = 768, 12 heads; two layers) with random weights: large ones that make attention and outputs sharp, or
(`--flat`) as initialized, where nothing stops early. The base, [V, d] x [d, V] tile by tile, is measured by slices between the
parts of the search, at every step of its progress bar, so that a noisy machine moves both together; their time is taken off.

- exact top 1,000 of one head at most 0.5 of a bi-gram sweep, all 12 heads of a layer at most 4.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import live_memory
import zoo
from transformer_lens.model_bridge import TransformerBridge

import tl_jets.ngrams.trigrams as trigrams
from tl_jets import ResidualNetwork, jet_trigrams

D_MODEL, D_VOCAB, TILE, SLICE = 768, 50257, 2048, 1024


class Interleaved:
    """A progress bar that times a slice of the base at each step."""

    def __init__(self, W_U: torch.Tensor):
        self.W_U, self.states, self.buffer = W_U, torch.randn(SLICE, D_MODEL), torch.empty(SLICE * TILE)
        self.seconds, self.products = 0.0, 0
        self.start = 0

    def __call__(self, **options: Any) -> Interleaved:
        return self

    def __enter__(self) -> Interleaved:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, count: int) -> None:
        began = time.perf_counter()
        columns = self.W_U[:, self.start : self.start + TILE]
        torch.mm(self.states, columns, out=self.buffer[: SLICE * columns.shape[1]].view(SLICE, -1))
        self.seconds += time.perf_counter() - began
        self.products += SLICE * columns.shape[1]
        self.start = (self.start + TILE) % D_VOCAB // TILE * TILE

    def sweep(self) -> float:
        """Seconds that the whole base takes at the mean of the slices."""
        return self.seconds / self.products * D_VOCAB**2


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--flat", action="store_true")
    parser.add_argument("--memory", action="store_true", help="measure live tensors instead of time")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, architectures=["GPT2LMHeadModel"])
    hf = GPT2LMHeadModel(config).eval().requires_grad_(False)
    if not arguments.flat:
        zoo.randomize(hf)
    model = TransformerBridge.boot_transformers("tiny", hf_model=hf, tokenizer=zoo.tokenizer(), device="cpu")
    network = ResidualNetwork(model)
    trigrams.tqdm = bar = Interleaved(hf.lm_head.weight.T)  # type: ignore[misc, assignment]
    heads = list(range(arguments.heads))
    if arguments.memory:
        peak = live_memory.peak_bytes(lambda: jet_trigrams(network, 1, heads))
        print(f"peak of live tensors: {peak / 1e6:.0f} MB (buffers of the base included)")
        return
    for _ in range(12):
        bar.update(0)
    before, began = bar.seconds, time.perf_counter()
    jet_trigrams(network, 1, heads)
    taken = time.perf_counter() - began - (bar.seconds - before)
    print(
        f"{len(heads)} head(s), top 1,000: {taken:.1f} s, {taken / bar.sweep():.2f} of a bi-gram sweep ({bar.sweep():.1f} s)"
    )


if __name__ == "__main__":
    main()
