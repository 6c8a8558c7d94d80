"""Time and memory of many prompts: one call a prompt, `over_prompts`, and one call on all.

Run as a script: `python tests/benchmarks/bench_prompts.py FOLDER [--prompts N] [--every] [--max-bytes N]`. FOLDER holds a Hugging
Face model; prompts are of 5 to 60 tokens, from Python's documentation. Each way runs in a process of its own, for its peak of
resident memory; seconds are of one thread's CPU, without loading. `--every` reads every position, not the last alone.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pydoc_data.topics import topics
from typing import Any

import torch

import tl_jets as tj
from tl_jets.pretrained import load_model

WAYS = ("one a call", "over_prompts", "all in one call")


def prompts_of(network: tj.ResidualNetwork, n: int, seed: int = 0) -> list[str]:
    """Pieces of Python's documentation, of 5 to 60 tokens."""
    draw = torch.Generator().manual_seed(seed)
    words = re.sub(r"[^\w.,;:()' -]+", " ", " ".join(topics[name] for name in sorted(topics))).split()
    found: list[str] = []
    while len(found) < n:
        start = int(torch.randint(len(words) - 60, (), generator=draw))
        text = " ".join(words[start : start + int(torch.randint(3, 50, (), generator=draw))])
        if 5 <= network.tokenize(text)["input_ids"].shape[1] <= 60:
            found.append(text)
    return found


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds, and the peak of resident memory in MB: before, and during the calls."""
    torch.set_num_threads(1)
    network = tj.ResidualNetwork(load_model(options.folder))
    prompts = prompts_of(network, options.prompts)
    given: dict[str, Any] = {"positions": None if options.every else -1}
    tj.iterative_jet_lens(network, prompts[0], **given)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if way == "one a call":
        lens = tj.concat([tj.iterative_jet_lens(network, prompt, **given) for prompt in prompts])
    elif way == "over_prompts":
        lens = tj.over_prompts(tj.iterative_jet_lens, network, prompts, max_bytes=options.max_bytes, **given)
    else:
        lens = tj.iterative_jet_lens(network, prompts, **given)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kl = float(lens.kl[:-1].nanmean())
    tokens = int(network.tokenize(prompts)["attention_mask"].sum())
    return {"tokens": tokens, "seconds": seconds, "before": before / 1024, "peak": peak / 1024, "mean KL": kl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--max-bytes", type=int)
    parser.add_argument("--way", choices=WAYS, action="append")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.way[0], options)))
        return
    for way in options.way or WAYS:
        arguments = [argument for argument in sys.argv[1:] if argument not in ("--way", *WAYS)]
        command = [sys.executable, __file__, *arguments, "--way", way, "--child"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{way:16} " + "  ".join(f"{name} {value:,.2f}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
