"""How much of a model its n-grams are: bi-grams and skip-trigrams of its weights, mixed, predict held-out text.

    python demos/sketch.py [--model MODEL] [--text FILE] [--fitting 64] [--held-out 64] [--pos 64] [--induction L1H2,L3H2 ...]

Without MODEL (a local Hugging Face directory, or `tinydocs` or `tinycode`) the embedded model is taken. Without FILE the
text is what every Python has: the docstrings of its standard library. With `--text sampled` the model writes it itself.
The text is cut into pieces of equal length, each after the model's first token. The last pieces are held out, weights are
fitted on pieces evenly spaced among the others, and all of the others are the corpus of Kneser-Ney models.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from ngram_studies import docstrings, rendered
from rich.console import Console

from tl_jets.pretrained import load_model, load_tinycode, load_tinydocs
from tl_jets.studies import sketch

GAP = 4  # pieces between the corpus and the held-out text
SAMPLED = 1024  # pieces that a model writes


def main() -> None:
    """Print the tables for the model and text of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinydocs")
    parser.add_argument("--text", default="docstrings")
    parser.add_argument("--fitting", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--pos", type=int, default=64)
    parser.add_argument("--induction", nargs="*", default=[], help="previous-token head and induction head, L1H2,L3H2")
    options = parser.parse_args()
    torch.manual_seed(0)
    embedded = {"tinydocs": load_tinydocs, "tinycode": load_tinycode}
    model = embedded[options.model]() if options.model in embedded else load_model(options.model)
    pieces = sampled(model, options.pos) if options.text == "sampled" else cut(model, options.text, options.pos)
    corpus, held_out = pieces[: -options.held_out - GAP], pieces[-options.held_out :]
    fitting = corpus[torch.linspace(0, len(corpus) - 1, options.fitting).long()]
    numbers = [list(map(int, re.findall(r"\d+", pair))) for pair in options.induction]
    pairs = [((a, b), (c, d)) for a, b, c, d in numbers]
    found = sketch(model, fitting, held_out, corpus=corpus, induction=pairs)
    title = f"{options.model}, {options.text}: {corpus.numel():,} tokens of corpus, {found.n_fitted:,} fitted"
    console = Console(width=100)
    console.print(rendered(found.to_dataframe().round(3), f"{title}, {found.n_held_out:,} held out"))
    weights = found.weights_dataframe().round(3)
    console.print(rendered(weights[(weights["weight"] > 0) | (weights["shuffled"] > 0)], "Weights"))
    console.print(f"Of the squared centered logits on the fitting text the sketch leaves {found.unexplained:.2f}.")


def first_token(model: Any) -> int:
    """The token before every piece: that of the beginning, or else of the end of a text."""
    tokenizer = model.tokenizer
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def cut(model: Any, text: str, pos: int) -> torch.Tensor:
    """Pieces [piece, pos] of a text file, or of docstrings."""
    texts = docstrings() if text == "docstrings" else [Path(text).read_text(encoding="utf-8")]
    ids = [token for part in texts for token in model.tokenizer(part + "\n", add_special_tokens=False)["input_ids"]]
    whole = torch.tensor(ids[: len(ids) // (pos - 1) * (pos - 1)]).view(-1, pos - 1)
    return torch.cat([torch.full((len(whole), 1), first_token(model)), whole], dim=1)


def sampled(model: Any, pos: int) -> torch.Tensor:
    """Pieces [piece, pos] drawn from the model itself."""
    pieces = torch.full((SAMPLED, 1), first_token(model))
    with torch.no_grad():
        for _ in range(pos - 1):
            probabilities = model(pieces, attention_mask=torch.ones_like(pieces))[:, -1].softmax(-1)
            pieces = torch.cat([pieces, torch.multinomial(probabilities, 1)], dim=1)
    return pieces


if __name__ == "__main__":
    main()
