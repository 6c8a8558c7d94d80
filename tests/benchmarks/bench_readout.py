"""Ratios of the mixture scan and of the metric to what they cannot do without. Not collected by the default run.

Run as a script: `python tests/benchmarks/bench_readout.py [--threads N] [--rounds N] [--rows N]`. Every number is a
median over rounds that interleave all of the measurements, so a noisy machine moves them together.

- forward: GPT-2 small, random weights.
- bare product: [13 * rows, d_model] x [d_model, d_vocab]; full product: [12 * 4 * rows, d_model] x [...].
- limits: top-k only 0.43, all measures and control 0.75 of (forward + full product); as a whole lens, 1.4 and 1.8 of
  (forward + bare product); both metrics 8 forwards.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tl_jets.calculus import Norm
from tl_jets.core.decoder import Decoder
from tl_jets.core.lens_logits import Control, Mixture, scan_mixture

D_MODEL, D_VOCAB, LAYERS, ORDERS = 768, 50257, 12, 4


def measurements(rows: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    tokens = torch.randint(0, D_VOCAB, (1, rows))
    weight = (torch.randn(D_VOCAB, D_MODEL) * 0.1).T  # tied: a transposed view
    decoder = Decoder(Norm("none"), weight, torch.randn(D_VOCAB))
    mixture = Mixture(
        own=torch.randn(LAYERS, rows, D_MODEL),
        shared=torch.randn(rows, D_MODEL),
        alpha=torch.rand(LAYERS, ORDERS, rows),
        beta=torch.rand(LAYERS, ORDERS, rows),
        gamma=torch.ones(rows),
        bias=torch.randn(D_MODEL),
    )
    mixture.beta[:, 0] = 0  # order 0 is the logit lens
    control = Control(torch.randn(1, rows, D_MODEL), torch.rand(LAYERS, rows), torch.rand(LAYERS, rows))
    targets = torch.randint(0, D_VOCAB, (rows,))
    bare, full = torch.randn(13 * rows, D_MODEL), torch.randn(LAYERS * ORDERS * rows, D_MODEL)
    return {
        "forward": lambda: model(tokens),
        "bare product": lambda: bare @ weight,
        "full product": lambda: full @ weight,
        "top-k": lambda: scan_mixture(decoder, mixture, measures=False),
        "measures": lambda: scan_mixture(decoder, mixture),
        "measures and control": lambda: scan_mixture(decoder, mixture, control=control),
        "measures, control, target": lambda: scan_mixture(decoder, mixture, control=control, targets=targets),
        "metrics": lambda: Decoder(Norm("none"), weight, decoder.b_U).metric(centered=True),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work = measurements(arguments.rows)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(arguments.rounds):
        for name, measure in work.items():
            start = time.perf_counter()
            measure()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    forward, bare, full = median["forward"], median["bare product"], median["full product"]
    print(f"{'':28}{'seconds':>9}{'fastest':>9}{'/(F+full)':>11}{'(F+x)/(F+bare)':>16}{'/F':>7}")
    for name, value in median.items():
        ratios = value / (forward + full), (forward + value) / (forward + bare), value / forward
        print(f"{name:28}{value:9.3f}{min(seconds[name]):9.3f}{ratios[0]:11.2f}{ratios[1]:16.2f}{ratios[2]:7.1f}")


if __name__ == "__main__":
    main()
