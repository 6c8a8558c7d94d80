"""Ratios of jet bi-gram sweeps to the bare products that they cannot do without. Not collected by the default run.

Run as a script: `python tests/benchmarks/bench_ngrams.py [--threads N] [--rows N] [--bias] [--screen]`. V = 50,257, d = 768,
random weights, path "direct". Chunk by chunk of the same rows it interleaves the bare tiled products (over the same tiles,
into one buffer), the exact scan and, where bfloat16 is fast or with `--screen`, the screened scan and the bare products in
bfloat16: a noisy machine moves them together. A ratio is the median over chunks of (scan / bare products), in time of the
clock and of the processors; `--rows` below V reads that many rows only (of a whole sweep the first chunk and the float64
scoring at the end are shares that shrink; both are printed).

With `--real` it is SmolLM2 (TL_JETS_SMOLLM2=FOLDER) and whole calls of `jet_bigrams`, in time of the processor, medians: 96 first
tokens again and again, as in a notebook, and `--rows` of them (4,096), against the bare products (of a path of MLPs: and their
evaluation). The first call of a network, and calls of a bare model, stand beside.

- exact scan 1.15, screened 0.65 where bfloat16 is fast, peak extra memory 150 MB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import live_memory

from tl_jets import CallableModel, Decoder, Norm, ResidualNetwork
from tl_jets.ngrams import VocabularyStreams, jet_bigrams
from tl_jets.ngrams.bigram_sweep import CHUNK_CPU
from tl_jets.ngrams.scan import TILE_CPU, TopScan
from tl_jets.ngrams.screen import RoundedTiles, ScreenedScan, bf16_is_fast
from tl_jets.pretrained import load_model

D_MODEL, D_VOCAB, TOP_K = 768, 50257, 100


def timed(target: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock, and of the processors."""
    start, busy = time.perf_counter(), time.process_time()
    target()
    return time.perf_counter() - start, time.process_time() - busy


def bare(states: torch.Tensor, W_U: torch.Tensor, buffer: torch.Tensor) -> None:
    for start in range(0, W_U.shape[1], TILE_CPU):
        columns = W_U[:, start : start + TILE_CPU]
        torch.mm(states, columns, out=buffer[: len(states) * columns.shape[1]].view(len(states), -1))


def report(seconds: dict[str, list[tuple[float, float]]]) -> float:
    """Print ratios to the bare products; returns the median time of these."""
    base = seconds["bare products"]
    print(f"{'':24}{'s a chunk':>10}{'fastest':>9}{'ratio':>8}{'of mins':>9}{'first':>8}{'processor':>11}")
    for name, times in seconds.items():
        ratios = [[x / y for x, y in zip(time, own, strict=True)] for time, own in zip(times, base, strict=True)]
        wall, busy = (statistics.median(column) for column in zip(*ratios, strict=True))
        middle, least = statistics.median(time for time, _ in times), min(times)[0]
        row = f"{middle:10.3f}{least:9.3f}{wall:8.3f}{least / min(base)[0]:9.3f}{ratios[0][0]:8.2f}{busy:11.3f}"
        print(f"{name:24}{row}")
    return statistics.median(time for time, _ in base)


@torch.no_grad()
def real(n_rows: int) -> None:
    """Whole calls on SmolLM2 against the bare products."""
    model = load_model(os.environ["TL_JETS_SMOLLM2"])
    print(f"{'':39}{'bare s':>8}{'ratio':>8}{'first':>8}{'bare model':>12}")
    for path in ("direct", "0_mlp", "mlps"):
        for count, top_k, rounds in ((96, 10, 7), (96, TOP_K, 7), (n_rows, TOP_K, 2)):
            network = ResidualNetwork(model)
            ids = torch.linspace(0, network.decoder.d_vocab - 1, count).long()
            streams = VocabularyStreams(network, [path])
            buffer = torch.empty(min(count, CHUNK_CPU) * TILE_CPU)

            def baseline(ids=ids, streams=streams, buffer=buffer, path=path):
                for part in ids.split(CHUNK_CPU):
                    bare(streams.states(streams.embed(part), path), streams.network.decoder.W_U, buffer)

            def call(of, ids=ids, path=path, top_k=top_k):
                return jet_bigrams(of, path, rows=ids, top_k=top_k, screen=None, progress=False)

            baseline()
            network = ResidualNetwork(model)
            first = timed(lambda of=network, call=call: call(of))[1]
            times = [(timed(baseline)[1], timed(lambda of=network, call=call: call(of))[1]) for _ in range(rounds)]
            own = [(timed(baseline)[1], timed(lambda call=call: call(model))[1]) for _ in range(2)]
            base = statistics.median(x for x, _ in times)
            ratio, plain = (statistics.median(y / x for x, y in pairs) for pairs in (times, own))
            print(
                f"{path:8} {count:6,} first tokens, best {top_k:4}{base:8.3f}{ratio:8.2f}{first / base:8.2f}{plain:12.2f}"
            )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, help="first tokens; 12 chunks, and 4,096 with --real, by default")
    parser.add_argument("--real", action="store_true", help="whole calls on SmolLM2")
    parser.add_argument("--bias", action="store_true", help="a random b_U, and logits around -100")
    parser.add_argument("--screen", action="store_true", help="screen in bfloat16 even where it is slow")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.real:
        return real(arguments.rows or 4 * CHUNK_CPU)
    arguments.rows = arguments.rows or 12 * CHUNK_CPU
    torch.manual_seed(0)
    embed = torch.nn.Embedding(D_VOCAB, D_MODEL)
    W_U = (torch.randn(D_VOCAB, D_MODEL) * (0.2 if arguments.bias else 0.02)).T
    b_U = torch.randn(D_VOCAB) - 100 if arguments.bias else torch.zeros(D_VOCAB)
    decoder = Decoder(Norm("LN"), W_U, b_U)
    model = CallableModel(embed, [{"0_mlp": torch.tanh}], decoder)
    buffer = torch.empty(CHUNK_CPU * TILE_CPU)
    fast = bf16_is_fast(W_U.device, D_MODEL)
    screens = fast or arguments.screen

    scan = TopScan(decoder, TOP_K)
    if screens:
        half, W_half = buffer.bfloat16(), W_U.bfloat16()
        screened = ScreenedScan(TopScan(decoder, TOP_K), RoundedTiles(decoder, torch.float32, W_U.device), CHUNK_CPU)
    seconds: dict[str, list[tuple[float, float]]] = {}
    for start in range(0, arguments.rows, CHUNK_CPU):
        ids = torch.arange(start, min(start + CHUNK_CPU, arguments.rows))
        states = decoder.norm(embed.weight[ids])
        work: dict[str, Callable[[], object]] = {
            "bare products": lambda s=states: bare(s, W_U, buffer),
            "exact scan": lambda s=states, i=ids: scan.add(s, i),
        }
        if screens:
            work["screened scan"] = lambda s=states, i=ids: screened.add(s, i)
            work["bare products in bf16"] = lambda s=states: bare(s.bfloat16(), W_half, half)
        for name, target in work.items():
            seconds.setdefault(name, []).append(timed(target))
    scans = {"exact scan": scan} | ({"screened scan": screened} if screens else {})
    ends = {name: timed(found.finish)[0] for name, found in scans.items()}

    bare_products = report(seconds) * arguments.rows / CHUNK_CPU
    print(f"bfloat16 is fast here: {fast}")
    for name, end in ends.items():
        whole = sum(time for time, _ in seconds[name]) / sum(time for time, _ in seconds["bare products"])
        print(
            f"{name}: all chunks {whole:.3f}, the end (float64 scoring) {end / bare_products:.3f} of their bare products"
        )
    if screens:
        print(f"rows scanned in float32 after all: {screened.scanned} of {screened.screened}")
        print(f"the same table with screening: {torch.equal(scan.finish().ids, screened.finish().ids)}")
    for screen in (None, "bf16"):
        peak = live_memory.peak_bytes(lambda s=screen: jet_bigrams(model, rows=range(2 * CHUNK_CPU), screen=s))
        print(f"peak extra memory, screen={screen!r}: {peak / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
