"""Which score of bi-grams agrees with a text: the share of a path's best pairs that occur in it. Not collected by the default run.

Run as a script: `TL_JETS_SMOLLM2=FOLDER python tests/benchmarks/bench_bigram_scores.py [--rows N] [PATH ...]`. The text is
the docstrings of the standard library and of the packages installed beside it, 12 million characters; the first tokens
are drawn at random (seed 0), without tokens never trained, and no token follows itself. The control permutes second tokens.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import sysconfig
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

import tl_jets as tj
from tl_jets.ngrams import jet_bigrams_by_path, untrained_tokens

CHARACTERS, SHORTEST = 12_000_000, 200


def texts() -> list[str]:
    """Docstrings in a random order."""
    found: set[str] = set()
    for file in Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"):
        try:
            tree = ast.parse(file.read_text())
        except (SyntaxError, ValueError, OSError):
            continue
        nodes = [x for x in ast.walk(tree) if isinstance(x, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        found |= {text for x in nodes if len(text := ast.get_docstring(x) or "") > SHORTEST}
    chosen, total = [], 0
    ordered = sorted(found)
    random.Random(0).shuffle(ordered)
    for text in ordered:
        if total > CHARACTERS:
            break
        chosen.append(text)
        total += len(text)
    return chosen


def share(pairs: np.ndarray, known: set[tuple[int, int]]) -> float:
    return float(np.mean([(int(one), int(two)) in known for one, two in pairs]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("paths", nargs="*", default=["direct", "0_mlp", "mlps"])
    arguments = parser.parse_args()
    folder = os.environ["TL_JETS_SMOLLM2"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    model = TransformerBridge.boot_transformers(folder, hf_model=loaded, tokenizer=tokenizer, device="cpu")
    network = tj.ResidualNetwork(model)
    known: set[tuple[int, int]] = set()
    for ids in tokenizer(texts(), add_special_tokens=False)["input_ids"]:
        known.update(pairwise(ids))
    untrained = untrained_tokens(network)
    print(untrained, f"\n{len(known):,} bi-grams of the text")
    others = np.setdiff1d(np.arange(network.decoder.d_vocab), untrained.ids.numpy())
    draw = np.random.default_rng(0)
    rows = torch.from_numpy(draw.permutation(others)[: arguments.rows])
    for score in ("logprob", "centered", "lift"):
        options = {"score": score, "rows": rows, "exclude_self": True, "exclude": untrained.ids, "top_k": 1000}
        for path, table in jet_bigrams_by_path(network, arguments.paths, progress=False, **options).items():
            pairs = table.ids.numpy()
            shuffled = [share(np.stack([pairs[:, 0], draw.permutation(pairs[:, 1])], 1), known) for _ in range(5)]
            measured = f"best 100 {share(pairs[:100], known):.2f}  best 1000 {share(pairs, known):.3f}"
            print(f"{path:8} {score:9} {measured}  shuffled {np.mean(shuffled):.3f}", flush=True)


if __name__ == "__main__":
    main()
