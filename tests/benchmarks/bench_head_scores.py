"""Scores of heads from the weights beside their attention on repeated random tokens. Not collected by the default run.

Run as a script: `TL_JETS_SMOLLM2=FOLDER python tests/benchmarks/bench_head_scores.py [--stream STREAM ...]`; `--tinydocs` for the
embedded model. Printed for each stream that heads may read: the heads with the largest scores, and the rank correlations
of all heads beside those of shuffled ones. SmolLM2-135M takes about two minutes a stream on one thread.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import pandas as pd

import tl_jets as tj
from tl_jets.studies import head_scores

SHOWN = 8


def load() -> Any:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = os.environ["TL_JETS_SMOLLM2"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    return TransformerBridge.boot_transformers(folder, hf_model=loaded, tokenizer=tokenizer, device="cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", nargs="*", default=["direct", "effective", "mlps"])
    parser.add_argument("--tinydocs", action="store_true")
    arguments = parser.parse_args()
    network = tj.ResidualNetwork(tj.load_tinydocs() if arguments.tinydocs else load())
    pd.set_option("display.width", 200)
    for stream in arguments.stream:
        found = head_scores(network, stream=stream, observe=4, progress=False)
        print(f"\n{stream}: copied with permuted columns {float(found.copied_control.mean()):.3f} on average")
        print(f"previous_token of uniform attention {found.previous_token_control:.3f}")
        print(found.agreement().round(2).to_string(index=False))
        for score in ("copying", "copied", "previous_token", "observed_copying", "observed_induction"):
            best = found.top(score, SHOWN)
            print(f"{score}: {', '.join(f'{a} {b:.2f}' for a, b in zip(best['head'], best[score], strict=True))}")
        for seen in ("observed_induction", "observed_previous_token"):
            print(found.top(seen, SHOWN).round(2).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
