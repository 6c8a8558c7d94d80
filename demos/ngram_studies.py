"""Which path of a model carries what: its corpus-free bi-grams against those of a text, and what ablation says.

    python demos/ngram_studies.py [--model MODEL] [--text FILE] [--after MODEL] [--n 1000]

Without MODEL (a local Hugging Face directory, or a model's name) the embedded model is taken; without FILE the text is what every
Python has: the docstrings of the top-level modules of its own standard library (so the numbers differ a little between versions
of Python). Printed:

1. for every path, the share of the text's n most frequent bi-grams among the path's n best, and the rank correlation of
   conditional log-probabilities over them, each beside the same with second tokens shuffled, and beside a model-free row that
   knows how frequent tokens are and nothing else;
2. the 20 best bi-grams of every path, without any text;
3. the same weighted by how often first tokens occur in the text (pseudo-joint), beside the text's own;
4. for every MLP, what ablating it does to the logits of its own best bi-grams, beside ablating the others (their mean, and the one
   that costs these bi-grams most), and beside shuffled second tokens;
5. with --after, a second checkpoint of the same vocabulary: which bi-grams rose and fell most.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

import tl_jets as tj
from tl_jets.ngrams import jet_bigrams_by_path
from tl_jets.ngrams.streams import mlp_steps
from tl_jets.ngrams.tables import NgramTable, side_by_side
from tl_jets.pretrained import load_model
from tl_jets.studies import AblationCheck, ablation_check, compare_with_counts, diff, ngram_counts

SHOWN = 20


def main() -> None:
    """Print the tables for the model and text of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local Hugging Face directory, or a model's name; default: the embedded one")
    parser.add_argument("--text", type=Path, help="a text file, paragraphs parted by empty lines; default: docstrings")
    parser.add_argument("--after", help="another checkpoint of the same vocabulary, to compare with")
    parser.add_argument("--n", type=int, default=1000, help="how many bi-grams are compared (default: %(default)s)")
    options = parser.parse_args()
    network = tj.ResidualNetwork(tj.load_tinydocs() if options.model is None else load_model(options.model))
    texts = docstrings() if options.text is None else paragraphs(options.text.read_text(encoding="utf-8"))
    console = Console(width=150)
    counts = count(network, texts)
    console.print(
        f"{len(texts):,} paragraphs, {counts.settings['total']:,} bi-grams, {len(counts):,} different; sha256 "
        f"{counts.settings['sha256'][:12]}"
    )
    found = compare_with_counts(network, counts, n=options.n)
    console.print(rendered(found.summary(), f"1. The {found.n} most frequent bi-grams of the text, by path"))
    paths = found.labels[:-1]
    plain = jet_bigrams_by_path(network, ["direct", *mlp_steps(network), "mlps"], top_k=SHOWN)
    console.print(rendered(side_by_side(plain, SHOWN), f"2. The {SHOWN} best bi-grams of every path, by log P(z2|z1)"))
    joint = {"text": counts, **{path: found.tables[path] for path in paths}}
    console.print(rendered(side_by_side(joint, SHOWN), "3. The same, weighted by the first token's share of the text"))
    checks = [ablation_check(network, step) for step in mlp_steps(network)]
    console.print(rendered(ablations(checks), "4. Change of the logit of each MLP's own 50 best bi-grams"))
    for check in checks:
        console.print(f"{check.step}: {check.verdict}", highlight=False)
    if options.after is not None:
        changed = diff(network, load_model(options.after), path="mlps", top_k=SHOWN)
        tables = {"rises": changed.rises, "falls": changed.falls}
        console.print(rendered(side_by_side(tables, SHOWN, scores=True), f"5. {repr(changed).splitlines()[0]}"))


def count(network: tj.ResidualNetwork, texts: list[str]) -> NgramTable:
    """The bi-grams of some texts in the model's tokens."""
    tokens = [network.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return ngram_counts(tokens, tokenizer=network.tokenizer)


def paragraphs(text: str) -> list[str]:
    """Paragraphs of running text, white space collapsed; examples of code are left out."""
    found = (" ".join(part.split()) for part in text.replace("\n\n\n", "\n\n").split("\n\n"))
    return [part for part in found if part.count(" ") >= 4 and ">>>" not in part]


def docstrings(files: Iterable[Path] | None = None) -> list[str]:
    """The prose of the docstrings in some files; by default the top-level modules of Python's standard library."""
    found: dict[str, None] = {}
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")) if files is None else files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found |= dict.fromkeys(paragraphs(ast.get_docstring(node) or ""))
    return list(found)


def ablations(checks: list[AblationCheck]) -> pd.DataFrame:
    """A row a check: mean changes with their 95% intervals."""
    rows = []
    for check in checks:
        step, other, summary = check.step, check.strongest_other, check.summary().set_index("what")
        wanted = {
            "own": f"own n-grams, {step} ablated",
            "own, others ablated": f"own n-grams, others ablated (mean of {len(check.components) - 1})",
            "own, strongest other": f"own n-grams, {other} ablated (strongest other)",
            "shuffled": f"shuffled n-grams, {step} ablated",
        }
        row: dict[str, str] = {"ablated": step}
        for name, what in wanted.items():
            if what in summary.index:
                mean, low, high = summary.loc[what, ["mean", "low", "high"]]
                row[name] = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
        rows.append(row)
    return pd.DataFrame(rows)


def rendered(frame: pd.DataFrame, title: str) -> Table:
    """A table of the terminal."""
    table = Table(title=title, title_justify="left")
    for column in frame.columns:
        table.add_column(str(column), justify="right" if pd.api.types.is_numeric_dtype(frame[column]) else "left")
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row))
    return table


if __name__ == "__main__":
    main()
