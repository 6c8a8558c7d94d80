"""What the product with `W_U` would lose in a bf16 model's own precision, against float64, on text.

Run as a script: `python tests/benchmarks/bench_precision.py FOLDER`, with the folder that `tests/real/get_model.py` makes. It
prints rows of the documentation's page on costs, in Markdown: states and logits rounded as a native product rounds them.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = (
    "The Eiffel Tower is in the city of Paris. Water boils at a hundred degrees, and freezes at zero. "
    "She went to the market and bought"
)


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    tokens = AutoTokenizer.from_pretrained(sys.argv[1])(TEXT, return_tensors="pt")["input_ids"]
    states = model(tokens, output_hidden_states=True).hidden_states[-1][0]  # after the final norm
    W_U = model.lm_head.weight.T.bfloat16()
    true = states.double() @ W_U.double()
    products = {
        "float32 (tl-jets)": states @ W_U.float(),
        "states in bf16, sums in float32": states.bfloat16().float() @ W_U.float(),
        "native: states and logits in bf16": (states.bfloat16() @ W_U).double(),
    }
    print("| product with W_U | largest error, logits | mean KL, nats | largest KL | best token changed |")
    print("|---|---|---|---|---|")
    log_p = true.log_softmax(-1)
    for name, found in products.items():
        kl = (log_p.exp() * (log_p - found.double().log_softmax(-1))).sum(-1)
        changed = int((found.argmax(-1) != true.argmax(-1)).sum())
        error = float((found - true).abs().max())
        print(f"| {name} | {error:.1e} | {kl.mean():.1e} | {kl.max():.1e} | {changed} of {len(kl)} |")


if __name__ == "__main__":
    main()
