"""What `test_shards` runs twice: in its own process, and as a script in the processes that torchrun starts."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import ClassVar
from unittest.mock import patch

import torch
import torch.distributed as dist

import tl_jets as tj
from tl_jets import CallableModel, Decoder, Norm
from tl_jets.core import processes
from tl_jets.core.prompts import token_bytes
from tl_jets.ngrams import bigram_job, jobs, sweep

PROMPTS = ("A list of", "This function is available on Unix and", "If the file", "The", "A file is opened in")
TARGETS = [[" is"], [" Windows"], [" was"], [" a"], [" is"]]
TABLE = {"top_k": 150, "chunk_size": 40, "progress": False}


class Slow(torch.nn.Module):
    """An MLP that takes its time, and may fail at one of the tokens: what it reads of token z begins with z / 1024."""

    seen: ClassVar[set[int]] = set()  # tokens that any of them has read

    def __init__(self, seconds=0.0, fails_at=-1):
        super().__init__()
        self.seconds, self.fails_at = seconds, fails_at

    def forward(self, x):
        if len(x) > 5:  # not the self-check
            time.sleep(self.seconds)
            self.seen.update((x[..., 0] * 1024).flatten().tolist())
            if bool((x[..., 0] * 1024 == self.fails_at).any()):
                raise ValueError(f"no stream at token {self.fails_at}")
        return torch.tanh(x) + x / 7


def model(seconds=0.0, fails_at=-1, seed=0):
    """1,100 tokens, 300 that may follow; every bias random."""
    source = torch.Generator().manual_seed(seed)
    weight = torch.randn(1100, 12, generator=source)
    weight[:, 0] = torch.arange(1100) / 1024
    decoder = Decoder(
        Norm("LN", torch.randn(12, generator=source), torch.randn(12, generator=source), 1e-5),
        torch.randn(12, 300, generator=source),
        torch.randn(300, generator=source),
    )
    stages = [{"0_mlp": Slow(seconds, fails_at)}, {"1_mlp": Slow()}]
    return CallableModel(torch.nn.Embedding.from_pretrained(weight), stages, decoder)


def tables(distributed):
    """Name -> table of each kind of sweep."""
    plain, tiny = model(), tj.load_tinydocs()
    options = {"distributed": distributed, "progress": False}
    found = {
        "global": tj.jet_bigrams(plain, "mlps", top_k=150, chunk_size=37, **options),
        "chosen chunks": tj.jet_bigrams(plain, "mlps", top_k=5000, **options),
        "screened": tj.jet_bigrams(plain, top_k=60, chunk_size=50, screen="bf16", **options),
        "rows": tj.jet_bigrams(plain, "mlps", per="row", top_k=3, chunk_size=64, **options),
        "columns": tj.jet_bigrams(plain, "1_mlp", columns=range(7, 90), rows=range(5, 600, 3), **options),
        "logits": tj.jet_bigrams(plain, score="logit", columns=range(7, 90), top_k=9, chunk_size=100, **options),
        "one row": tj.jet_bigrams(plain, "mlps", rows=[17], top_k=4, **options),
        "one row each": tj.jet_bigrams(plain, "mlps", rows=[17], top_k=4, per="row", **options),
        "tinydocs": tj.jet_bigrams(tiny, "mlps", top_k=30, **options),
    }
    by_path = tj.ngrams.jet_bigrams_by_path(plain, ["direct", ["0_mlp", "1_mlp"]], **TABLE, distributed=distributed)
    return found | {f"paths {label}": table for label, table in by_path.items()}


def trigrams(distributed):
    """Name -> table of heads: divided as wholes, in parts, and both."""
    network = tj.ResidualNetwork(tj.load_tinydocs())
    cases = {
        "a head": (1, {"top_k": 90}),
        "three heads": ([2, 0, 3], {"top_k": 40, "distance": 2}),
        "a pair": ([1], {"top_k": 5, "normalize": "pair", "rows": range(40, 400)}),
        "a key": ([1], {"top_k": 5, "rows": [7]}),
    }
    found = {}
    for name, (heads, options) in cases.items():
        tables = tj.jet_trigrams(network, 1, heads, **options, distributed=distributed, progress=False)
        by_head = tables if isinstance(tables, dict) else {heads: tables}
        found |= {f"{name} {head}": table for head, table in by_head.items()}
    return found


def normalizers(distributed):
    return tj.ngrams.bigram_log_normalizers(model(), "mlps", chunk_size=37, distributed=distributed)


def lens(distributed, prompts=PROMPTS, **options):
    """A lens of prompts of unequal length, in batches of at most 20 tokens."""
    network = tj.ResidualNetwork(tj.load_tinydocs())
    options |= {"max_bytes": 20 * token_bytes(network), "distributed": distributed}
    return tj.over_prompts(tj.iterative_jet_lens, network, list(prompts), targets=TARGETS, **options)


def refusals(rank):
    """Message of each refusal, and how many tokens were read until then; a sweep afterwards must still work."""
    processes.PERIOD = 0.2
    cases = {
        "options": (model(), {"top_k": 3 + rank}),
        "model": (model(seed=rank), {}),
        "rows": (model(), {"rows": [1, 2 + rank]}),
        "a path on one": (model(), {"path": "0_attn" if rank else "direct"}),
        "a row": (model(0.2, fails_at=81), {"path": "mlps", "chunk_size": 16}),
        "a head": (tj.load_tinydocs(), {"head": rank}),
        "a file": (model(), {"save": "/nowhere/table.parquet"}),
        "a file on one": (model(), {"save": "/nowhere/table.parquet"} if rank else {}),
        "prompts": (None, {"prompts": (*PROMPTS[:4], "Others" if rank else "These")}),
        "options of a lens": (None, {"top_k": 3 + rank}),
    }
    found = {}
    for name, (own, options) in cases.items():
        Slow.seen.clear()
        try:
            if own is None:
                lens(True, **options)
            elif "head" in options:
                tj.jet_trigrams(own, 0, options["head"], distributed=True)
            else:
                tj.jet_bigrams(own, options.pop("path", "direct"), **options, progress=False, distributed=True)
            found[name] = "nothing", 0
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}", len(Slow.seen)
    return found


def job(distributed, seconds=0.0):
    return bigram_job(model(seconds), ["0_mlp"], **TABLE, distributed=distributed)


def finish(folder, distributed, seconds=0.0):
    """A sweep whose state is saved whenever processes meet, and they meet after every chunk."""
    with patch.object(jobs, "STATE_SECONDS", 0.0), patch.object(processes, "PERIOD", 0.0):
        return sweep([job(distributed, seconds)], folder, progress=False)


def main():
    folder, what = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if what == "killed":
        (folder / f"pid.{rank}").write_text(str(os.getpid()))
        finish(folder / "sweep", True, 0.1)
        return
    report = {"refusals": refusals(rank)}
    report["normalizers"] = normalizers(True).tolist()
    for name, table in (tables(True) | trigrams(True)).items():
        table.save(folder / f"{name}.{rank}")
    lens(True).save(folder / f"lens.{rank}")
    report["resumed"] = {name: table.digest for name, table in finish(folder / "resumed", True).items()}
    alone = dist.new_group([1], backend="gloo")
    report["group"] = tj.jet_bigrams(model(), top_k=5, distributed=alone).digest if rank == 1 else ""
    (folder / f"report.{rank}").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
