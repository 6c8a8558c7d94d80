"""What fine-tuning changed: the bi-grams of tinydocs before and after it was trained on with source code.

    python demos/fine_tuned_bigrams.py [--path mlps] [--n 1000]

`tl_jets.studies.diff` reads off the weights of both models which bi-grams of a path rose and fell most. Whether these are what
the second text taught, and what it took away, real counts say: of Python source (the modules of the standard library), and of
documentation (their docstrings, and the pages of `help()`), which every Python has. Printed:

1. the share of the largest rises and falls that are likelier in source, likelier in documentation, and in neither text; in
   brackets the same with second tokens shuffled;
2. the largest rises and falls, with the probabilities of the path before and after, and those in both texts;
3. what follows, in words.

Section 5.3 of Chen et al. (arXiv 2410.06024); the comparison with texts and the control are ours. Cost: half a minute.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pandas as pd
import torch
from ngram_studies import SHOWN, docstrings, paragraphs, rendered
from rich.console import Console
from torch import Tensor

import tl_jets as tj
from tl_jets.studies import ModelDiff, diff, ngram_counts
from tl_jets.tables import NgramTable, side_by_side

SOURCE, DOCS, NEITHER = "likelier in source", "likelier in documentation", "in neither"


@dataclass(frozen=True)
class FineTuning:
    """What fine-tuning changed, and the texts that it is compared with.

    Attributes:
        changed: From tinydocs to tinycode.
        code: Bi-grams of Python source.
        docs: Bi-grams of documentation.
    """

    changed: ModelDiff
    code: NgramTable
    docs: NgramTable

    def shares(self, table: NgramTable, *, draws: int = 20) -> dict[str, tuple[float, float]]:
        """Shares of bi-grams that are likelier in one text than in the other, and the means with second tokens shuffled."""
        draw, shuffled = np.random.default_rng(0), []
        for _ in range(draws):
            order = torch.from_numpy(draw.permutation(len(table)))
            shuffled.append(self._shares(torch.stack([table.ids[:, 0], table.ids[order, 1]], dim=1)))
        own, chance = self._shares(table.ids), np.mean(shuffled, axis=0).tolist()
        return dict(zip((SOURCE, DOCS, NEITHER), zip(own, chance, strict=True), strict=True))

    def _shares(self, ids: Tensor) -> list[float]:
        code, docs = probabilities(self.code, ids), probabilities(self.docs, ids)
        return [float(x.double().mean()) for x in (code > docs, docs > code, (code == 0) & (docs == 0))]

    def summary(self) -> pd.DataFrame:
        """Which text rises and falls are of."""
        rows = []
        for name, table in (("rises", self.changed.rises), ("falls", self.changed.falls)):
            cells = {kind: f"{own:.2f} ({chance:.2f})" for kind, (own, chance) in self.shares(table).items()}
            rows.append({"bi-grams": f"the {len(table):,} largest {name}", **cells})
        return pd.DataFrame(rows)

    def movers(self, table: NgramTable, k: int = SHOWN) -> pd.DataFrame:
        """The first bi-grams of a table: probabilities of the path before and after, and in both texts."""
        best = table[:k]
        columns = {"before": best.parts["before"].exp(), "after": best.parts["after"].exp()}
        columns |= {"in source": probabilities(self.code, best.ids)}
        columns |= {"in documentation": probabilities(self.docs, best.ids)}
        texts = side_by_side({"bi-gram": best}, k).reset_index(drop=True)
        return texts.assign(**{name: [f"{x:.2f}" for x in values.tolist()] for name, values in columns.items()})

    def conclusions(self) -> list[str]:
        """What follows from the numbers, in words."""
        found = []
        for name, table in (("rose", self.changed.rises), ("fell", self.changed.falls)):
            shares = self.shares(table)
            (source, by_chance), (docs, docs_by_chance), (neither, _) = (shares[x] for x in (SOURCE, DOCS, NEITHER))
            text = "source" if source > docs else "documentation"
            above = source > by_chance if source > docs else docs > docs_by_chance
            found.append(
                f"What {name} most along {self.changed.path}: bi-grams {f'of {text}' if above else 'of neither text'} "
                f"({source:.0%} are likelier in source, {docs:.0%} in documentation; shuffled {by_chance:.0%} and "
                f"{docs_by_chance:.0%}). {neither:.0%} occur in neither."
            )
        return found


def probabilities(counts: NgramTable, ids: Tensor) -> Tensor:
    """P(z2 | z1) of some pairs in a text; 0 for those that it does not have."""
    base = int(max(counts.ids.max(), ids.max())) + 1
    keys, order = (counts.ids[:, 0] * base + counts.ids[:, 1]).sort()
    wanted = ids[:, 0] * base + ids[:, 1]
    place = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
    share = counts.parts["count"] / counts.parts["context_count"]
    return torch.where(keys[place] == wanted, share[order][place], 0.0)


def compare(files: Sequence[Path], *, path: str = "mlps", n: int = 1000) -> FineTuning:
    """The bi-grams of a path that changed most from tinydocs to tinycode, and the real ones of both texts.

    Args:
        files: Python modules.
        path: As `diff` takes it.
        n: How many rises, and how many falls.
    """
    before, after = tj.load_tinydocs(), tj.load_tinycode()
    tokenizer = before.tokenizer
    lines = [[x.rstrip() for x in file.read_text(encoding="utf-8").splitlines() if x.strip()] for file in files]
    (newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    tokens = iter(tokenizer([line for module in lines for line in module], add_special_tokens=False)["input_ids"])
    code = [[token for _ in module for token in (*next(tokens), newline)] for module in lines]
    prose = docstrings(files) + [x for topic in topics.values() for x in paragraphs(topic)]
    docs = tokenizer(prose, add_special_tokens=False)["input_ids"]
    changed = diff(before, after, path=path, top_k=n)
    return FineTuning(changed, ngram_counts(code, tokenizer=tokenizer), ngram_counts(docs, tokenizer=tokenizer))


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="mlps", help="direct, mlps, or an MLP such as 0_mlp (default: %(default)s)")
    parser.add_argument("--n", type=int, default=1000, help="how many rises and falls (default: %(default)s)")
    options = parser.parse_args()
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found = compare(files, path=options.path, n=options.n)
    console = Console(width=150)
    console.print(
        f"{found.code.settings['total']:,} bi-grams of source, {found.docs.settings['total']:,} of documentation; mean KL "
        f"{float(found.changed.kl.mean()):.2f} nats"
    )
    title = f"1. What changed most along {options.path}, and where it occurs (with second tokens shuffled)"
    console.print(rendered(found.summary(), title))
    console.print(rendered(found.movers(found.changed.rises), "2. P(z2|z1): rose most"))
    console.print(rendered(found.movers(found.changed.falls), "   fell most"))
    console.print("3. What follows")
    for line in found.conclusions():
        console.print(f"- {line}")


if __name__ == "__main__":
    main()
