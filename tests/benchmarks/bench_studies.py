"""What `studies.diff` costs, as ratios to the plain bi-gram sweeps of both models. Not collected by the default run.

Run as a script: `python tests/benchmarks/bench_studies.py [--threads N] [--rows N]`. V = 50,257, d = 768, random weights, path
"direct", one model a tenth off the other. Chunk by chunk of the same rows it interleaves the exact scans of both models and the
reading of both by `RowChanges`; a ratio is the median over chunks, in time of the clock and of the processors. At the end `diff`
reads some rows in float64; what that is of two whole sweeps is printed, too.

- 1.25 of two sweeps; that is 2.5 of one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from tl_jets import CallableModel, Decoder, Norm
from tl_jets.core.logit_reader import CHUNK_SIZE
from tl_jets.ngrams.bigram_sweep import CHUNK_CPU
from tl_jets.ngrams.scan import TopScan
from tl_jets.studies import diff
from tl_jets.studies.differences import RowChanges
from tl_jets.studies.pairs import RowScores

D_MODEL, D_VOCAB, TOP_K = 768, 50257, 100


def timed(target: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock, and of the processors."""
    start, busy = time.perf_counter(), time.process_time()
    target()
    return time.perf_counter() - start, time.process_time() - busy


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=8 * CHUNK_CPU)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    embed = torch.nn.Embedding(D_VOCAB, D_MODEL)
    first = 0.1 * torch.randn(D_VOCAB, D_MODEL)
    tables = [first, first + 0.01 * torch.randn(D_VOCAB, D_MODEL)]
    models = [
        CallableModel(embed, [{"0_mlp": torch.tanh}], Decoder(Norm("LN"), x.T, torch.zeros(D_VOCAB))) for x in tables
    ]
    scans = [TopScan(model.decoder, TOP_K) for model in models]
    changes = RowChanges(*(RowScores(model) for model in models))

    def sweep(ids: torch.Tensor) -> None:
        for model, scan in zip(models, scans, strict=True):
            scan.add(model.decoder.norm(embed.weight[ids]), ids)

    def read(ids: torch.Tensor) -> None:
        for part in ids.split(CHUNK_SIZE):
            changes.read(part)

    seconds: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for ids in torch.arange(arguments.rows).split(CHUNK_CPU):
        seconds.append((timed(lambda i=ids: sweep(i)), timed(lambda i=ids: read(i))))
    for place, what in enumerate(("clock", "processor")):
        sweeps, reads = ([pair[i][place] for pair in seconds[1:]] for i in (0, 1))  # the first chunk fills buffers
        ratio = statistics.median(mine / plain for mine, plain in zip(reads, sweeps, strict=True))
        plain, mine = min(sweeps), min(reads)
        fastest = f"{mine / plain:.3f}: {mine:.2f} s and {plain:.2f} s"
        print(f"{what:10}{ratio:6.3f} of two sweeps (of the fastest chunks {fastest})")
    whole = statistics.median(plain for (plain, _), _ in seconds) * D_VOCAB / CHUNK_CPU
    rows, exact = 0, 0.0
    read_exactly = RowScores.read

    def counted(self: RowScores, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal rows, exact
        start = time.perf_counter()
        found = read_exactly(self, tokens)
        exact += time.perf_counter() - start
        rows += len(tokens)
        return found

    RowScores.read = counted  # type: ignore[method-assign]
    diff(*models, top_k=TOP_K, rows=range(arguments.rows), progress=False)
    print(f"float64: {rows} rows, {exact:.1f} s = {exact / whole:.3f} of two whole sweeps")


if __name__ == "__main__":
    main()
