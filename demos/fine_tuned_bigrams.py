"""What fine-tuning changed: the bi-grams of tinydocs before and after it was trained on with source code.

    python demos/fine_tuned_bigrams.py [--path mlps] [--n 1000] [--plot FILE.svg]

`tl_jets.studies.diff` reads off the weights of both models which bi-grams of a path rose and fell most. Whether these are what
the second text taught, and what it took away, real counts say: of Python source (the modules of the standard library, without
docstrings and comments), and of documentation (their docstrings, and the pages of `help()`), which every Python has. Of the
longer text as many bi-grams are drawn as the shorter one has; first tokens are those that occur 10 times or more in both, so that
both can tell what follows. (tinycode was trained on modules with their docstrings and comments: some prose may rise, too.) Printed:

1. the share of the largest rises and falls that are likelier in source, likelier in documentation, and in neither text, and their
   *lean*, the first share minus the second; in brackets the same with second tokens shuffled;
2. the largest rises and falls, with the probabilities of the path before and after, and those in both texts;
3. what follows, in words: to which text a list leans, if the 95% intervals of its lean, and of its lean beyond that of shuffled
   ones, are on that side of zero (bootstrap over bi-grams).

Section 5.3 of Chen et al. (arXiv 2410.06024); the comparison with texts and the control are ours. Cost: half a minute.
"""

from __future__ import annotations

import argparse
import io
import sysconfig
import tokenize
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
from tl_jets.ngrams.tables import NgramTable, side_by_side
from tl_jets.studies import ModelDiff, bootstrap_interval, diff, ngram_counts

SOURCE, DOCS, NEITHER = "likelier in source", "likelier in documentation", "in neither"
# Okabe and Ito's vermilion and blue.
COLORS = {"rises": "#D55E00", "falls": "#0072B2"}
# First tokens that occur this often in both texts are looked at.
KNOWN = 10


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

    def kinds(self, table: NgramTable, *, draws: int = 20) -> tuple[Tensor, Tensor]:
        """Whether each bi-gram is likelier in source, likelier in documentation, in neither; and, shuffled, how often.

        Returns:
            Of the table, and the mean over lists with second tokens shuffled. Shape [bi-gram, 3] each.
        """
        draw, shuffled = np.random.default_rng(0), []
        for _ in range(draws):
            order = torch.from_numpy(draw.permutation(len(table)))
            shuffled.append(self._kinds(torch.stack([table.ids[:, 0], table.ids[order, 1]], dim=1)))
        return self._kinds(table.ids), torch.stack(shuffled).mean(0)

    def _kinds(self, ids: Tensor) -> Tensor:
        code, docs = probabilities(self.code, ids), probabilities(self.docs, ids)
        return torch.stack([code > docs, docs > code, (code == 0) & (docs == 0)], dim=1).double()

    def summary(self) -> pd.DataFrame:
        """Which text rises and falls are of."""
        rows = []
        for name, table in (("rises", self.changed.rises), ("falls", self.changed.falls)):
            own, chance = self.kinds(table)
            pairs = zip(own.mean(0).tolist(), chance.mean(0).tolist(), strict=True)
            cells = dict(zip((SOURCE, DOCS, NEITHER), (f"{x:.2f} ({y:.2f})" for x, y in pairs), strict=True))
            leans = f"{float(lean(own).mean()):+.2f} ({float(lean(chance).mean()):+.2f})"
            rows.append({"bi-grams": f"the {len(table):,} largest {name}", **cells, "lean": leans})
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
            own, chance = self.kinds(table)
            beyond = lean(own) - lean(chance)
            ends = [*bootstrap_interval(lean(own)), *bootstrap_interval(beyond)]
            text = "to source" if min(ends) > 0 else "to documentation" if max(ends) < 0 else "to neither text"
            means = [
                f"{float(x.mean()):+.2f} [{low:+.2f}, {high:+.2f}]"
                for x, low, high in zip((lean(own), beyond), ends[::2], ends[1::2], strict=True)
            ]
            found.append(
                f"What {name} most along {self.changed.path} leans {text}: lean {means[0]}, beyond that of shuffled ones "
                f"{means[1]}. {float(own[:, 2].mean()):.0%} occur in neither."
            )
        return found


def lean(kinds: Tensor) -> Tensor:
    """1 for bi-grams that are likelier in source, -1 for those likelier in documentation, 0 for others. Shape [bi-gram]."""
    return kinds[:, 0] - kinds[:, 1]


def probabilities(counts: NgramTable, ids: Tensor) -> Tensor:
    """P(z2 | z1) of some pairs in a text; 0 for those that it does not have."""
    base = int(max(counts.ids.max(), ids.max())) + 1
    keys, order = (counts.ids[:, 0] * base + counts.ids[:, 1]).sort()
    wanted = ids[:, 0] * base + ids[:, 1]
    place = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
    share = counts.parts["count"] / counts.parts["context_count"]
    return torch.where(keys[place] == wanted, share[order][place], 0.0)


def code_lines(text: str) -> list[str]:
    """The lines of a module without comments, docstrings (and other texts that stand alone) and empty lines.

    Args:
        text: Python source.
    """
    lines = text.split("\n")
    statement: list[tokenize.TokenInfo] = []
    layout = (tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column]
        elif token.type == tokenize.NEWLINE:
            if statement and all(part.type == tokenize.STRING for part in statement):
                first, last = statement[0].start[0], statement[-1].end[0]
                lines[first - 1 : last] = [""] * (last - first + 1)
            statement = []
        elif token.type not in layout:
            statement.append(token)
    return [line.rstrip() for line in lines if line.strip()]


def of_size(texts: Sequence[Sequence[int]], size: int) -> list[Sequence[int]]:
    """Texts drawn at random until they have so many bi-grams; all of them if they have fewer."""
    order = np.random.default_rng(0).permutation(len(texts))
    before = np.cumsum([0, *(max(0, len(texts[i]) - 1) for i in order)])[:-1]
    return [texts[i] for i in order[before < size]]


def compare(files: Sequence[Path], *, path: str = "mlps", n: int = 1000) -> FineTuning:
    """The bi-grams of a path that changed most from tinydocs to tinycode, and the real ones of both texts.

    Args:
        files: Python modules.
        path: As `diff` takes it.
        n: How many rises, and how many falls.
    """
    before, after = tj.load_tinydocs(), tj.load_tinycode()
    source = [f"{line}\n" for file in files for line in code_lines(file.read_text(encoding="utf-8"))]
    prose = docstrings(files) + [x for topic in topics.values() for x in paragraphs(topic)]
    texts = [before.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (source, prose)]
    size = min(sum(max(0, len(ids) - 1) for ids in text) for text in texts)
    code, docs = (ngram_counts(of_size(text, size), tokenizer=before.tokenizer) for text in texts)
    occurrences = [torch.bincount(x.ids[:, 0], x.parts["count"], before.cfg.d_vocab) for x in (code, docs)]
    known = (torch.stack(occurrences) >= KNOWN).all(0).nonzero()[:, 0]
    return FineTuning(diff(before, after, path=path, top_k=n, rows=known.tolist()), code, docs)


def plot(found: FineTuning, file: Path) -> None:
    """Which text rises and falls are of (dashed: second tokens shuffled); and the largest of them, before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    shares, *movers = figure.subplots(1, 3)
    for i, (name, color) in enumerate(COLORS.items()):
        table = getattr(found.changed, name)
        own, chance = found.kinds(table)
        places = [kind + 0.4 * i - 0.2 for kind in range(3)]
        shares.bar(places, own.mean(0).tolist(), 0.36, color=color, label=f"the {len(table):,} largest {name}")
        shares.bar(places, chance.mean(0).tolist(), 0.36, fill=False, ls="--")
        frame, axis = found.movers(table), movers[i]
        rows, values = range(len(frame)), {name: frame[name].astype(float).tolist() for name in frame.columns[1:]}
        axis.hlines(rows, values["before"], values["after"], color=color)
        axis.plot(values["before"], rows, "o", mfc="white", mec=color, label="before")
        axis.plot(values["after"], rows, "o", color=color, label="after")
        axis.plot(values["in source"], rows, "k|", label="in source")
        axis.plot(values["in documentation"], rows, "kx", ms=4, label="in documentation")
        axis.set_yticks(rows, frame["bi-gram"], fontsize=8, parse_math=False)
        axis.set(xlim=(-0.03, 1.03), title=f"largest {name}: P(z2 | z1)")
        axis.invert_yaxis()
    shares.set_xticks(range(3), [kind.replace(" ", "\n", 1) for kind in (SOURCE, DOCS, NEITHER)], fontsize=8)
    shares.set_title(f"share of bi-grams of {found.changed.path}; dashed: shuffled")
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    shares.legend(frameon=False, fontsize=8)
    movers[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file)


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="mlps", help="direct, mlps, or an MLP such as 0_mlp (default: %(default)s)")
    parser.add_argument("--n", type=int, default=1000, help="how many rises and falls (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="a file for a figure of both (SVG, PNG, PDF)")
    options = parser.parse_args()
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found = compare(files, path=options.path, n=options.n)
    console = Console(width=150)
    console.print(
        f"{found.code.settings['total']:,} bi-grams of source, {found.docs.settings['total']:,} of documentation; mean KL "
        f"{float(found.changed.kl.mean()):.2f} nats over {len(found.changed.first):,} first tokens"
    )
    title = f"1. What changed most along {options.path}, and where it occurs (with second tokens shuffled)"
    console.print(rendered(found.summary(), title))
    console.print(rendered(found.movers(found.changed.rises), "2. P(z2|z1): rose most"))
    console.print(rendered(found.movers(found.changed.falls), "   fell most"))
    console.print("3. What follows")
    for line in found.conclusions():
        console.print(f"- {line}")
    if options.plot is not None:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
