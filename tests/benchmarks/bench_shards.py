"""How much faster two processes of one thread each make a jet bi-gram sweep than one. Not collected by the default run.

Run as a script: `python tests/benchmarks/bench_shards.py [--processes N] [--rows N] [--rounds N] [--exact]`. V = 50,257, d = 768,
random weights, path "direct". It starts `torchrun` on this machine. In each round process 0 makes the table by itself while the
others sleep, then all make it together, in turns of either order: a noisy machine moves both. The ratio is the median over rounds
of (alone / together); everything counts that a call does, the model's fingerprint and the float64 scoring at the end included.
Of a sweep of fewer `--rows` than V these are larger shares. Beside it, the same of the time of the processor (of the busiest
process): what a machine would give that has nothing else to do.

- two processes at least 1.7 times as fast as one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from tl_jets import CallableModel, Decoder, Norm, jet_bigrams
from tl_jets.ngrams.screen import Screen

D_MODEL, D_VOCAB, TOP_K = 768, 50257, 100


@torch.no_grad()
def work(rows: int, rounds: int, screen: Screen | None) -> None:
    """One process of the benchmark."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    embed = torch.nn.Embedding(D_VOCAB, D_MODEL)
    decoder = Decoder(Norm("LN"), (torch.randn(D_VOCAB, D_MODEL) * 0.02).T, torch.zeros(D_VOCAB))
    model = CallableModel(embed, [{"0_mlp": torch.tanh}], decoder)
    first = dist.get_rank() == 0
    seconds: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    digests = set()
    for together in [together for turn in range(rounds) for together in ((False, True), (True, False))[turn % 2]]:
        dist.barrier()
        start, busy = time.perf_counter(), time.process_time()
        if together or first:
            table = jet_bigrams(
                model, rows=range(rows), top_k=TOP_K, distributed=together, screen=screen, progress=False
            )
            digests.add(table.digest)
        own = torch.tensor(time.process_time() - busy)
        dist.all_reduce(own, dist.ReduceOp.MAX)
        seconds[together].append((time.perf_counter() - start, own.item()))
    if first:
        print(
            f"{rows} rows of {D_VOCAB}, one thread a process, {dist.get_world_size()} processes, median of {rounds} rounds"
        )
        for unit, name in enumerate(("clock", "processor")):
            alone, shared = ([x[unit] for x in seconds[together]] for together in (False, True))
            ratios = [x / y for x, y in zip(alone, shared, strict=True)]
            times = f"alone {statistics.median(alone):6.2f} s, together {statistics.median(shared):6.2f} s"
            print(f"{name:10} {times}, ratio {statistics.median(ratios):.2f}   {[round(x, 2) for x in ratios]}")
        print(f"the same table: {len(digests) == 1}")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=12 * 1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--exact", action="store_true", help="no screening in bfloat16, whose unit two cores may share")
    arguments = parser.parse_args()
    if dist.is_torchelastic_launched():
        work(arguments.rows, arguments.rounds, None if arguments.exact else "auto")
        return
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    sys.exit(subprocess.run([*launch, __file__, *sys.argv[1:]], env=environment).returncode)


if __name__ == "__main__":
    main()
