"""`tl-jets ngrams`: bi-grams and skip-trigrams of the weights, without a corpus."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tl_jets.cli.ngram_paths import EVERY, chosen_paths
from tl_jets.cli.outputs import STDOUT, check_replaceable, is_folder
from tl_jets.cli.report import MAX_ROWS, Records, Report, Table, Terminal, header
from tl_jets.cli.session import UsageError, load_network, one_line, read_token, steps, together
from tl_jets.cli.texts import legend
from tl_jets.core.logit_reader import slices
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.path import ARROW
from tl_jets.core.processes import Processes
from tl_jets.core.tokens import visible
from tl_jets.ngrams import jet_bigrams_by_path, jet_trigrams, untrained_tokens
from tl_jets.ngrams.jobs import SUFFIX
from tl_jets.ngrams.tables import NgramTable, side_by_side
from tl_jets.views import trigram_heatmap

BIGRAM_OPTIONS = ("path", "per", "score")
TRIGRAM_OPTIONS = ("head", "distance", "normalize")
# Number of records converted at a time.
AT_ONCE = 4096
# Rows of a table with `per="row"` in the terminal.
SHOWN = 20
# Width of the ranks, and of the gap between columns.
RANK_WIDTH, GAP = 6, 2


def report(options: argparse.Namespace) -> Report:
    """N-grams of the requested paths or heads."""
    is_trigram = options.trigrams is not None
    _check(options, is_trigram)
    with steps(1) as step:
        step("loading TransformerLens and the model")
        network = load_network(options.model, "sublayer")
        rows = None
        if options.token:
            n_tokens = int(network.view.model.cfg.d_vocab)  # type: ignore[attr-defined]
            rows = [read_token(network, token, n_tokens) for token in options.token]
    # Outside `steps`: the sweeps draw their own bars.
    folder = Path(options.save) if options.save and is_folder(options.save) else None
    found = (_trigrams if is_trigram else _bigrams)(options, network, rows, folder)
    first = next(iter(found.values()))
    asked = {"model": options.model, "n-grams": _what(first, options.top_k)}
    if first.settings.get("exclude_self"):
        count = first.settings.get("exclude", {}).get("count", 0)
        asked["left out"] = f"each token after itself (embeddings are tied), {count} tokens never trained (--keep-all)"
    if folder is not None:
        asked["saved"] = ", ".join(str(folder / f"{label}{SUFFIX}") for label in found)
    elif options.save:
        asked["saved"] = ", ".join(Processes.of(together()).first(lambda: _save(found, Path(options.save))))
    data = header("ngrams", model=options.model, ngram="skip-trigram" if is_trigram else "bigram")
    data["tables"] = {
        label: {**table.header, "rows": Records(len(table), partial(_records, table))} for label, table in found.items()
    }
    tables = [shown for token in rows or [None] for shown in _shown(found, token, options.scores)]
    alone = [_alone(f"{label}: {len(table):,} n-grams", table) for label, table in found.items()]
    if len(found) > 1 and not is_trigram:
        longest = max(map(len, found.values()))
        alone.insert(0, Table("Side by side", side_by_side(found, min(longest, MAX_ROWS)), total=longest))
    heads = found.values() if is_trigram else ()
    page: dict[str, Any] = {"on_page": alone, "views": lambda: [trigram_heatmap(network, table) for table in heads]}
    verdict, further = [_verdict(first, rows[0] if rows else None)], _further(options, list(found))
    return Report(data, asked, tables, legend("ngrams", *_legend(first)), verdict=verdict, further=further, **page)


def _shown(found: dict[str, NgramTable], token: int | None, scores: bool) -> Iterable[Table]:
    """The tables of the terminal, of all n-grams or of one first token."""
    is_trigram, of = next(iter(found.values())).n == 3, ""
    if token is not None:
        names = [table.names[token] for table in found.values() if token in table.names]
        of = f" {'of the key' if is_trigram else 'after'} {visible(names[0] if names else f'id:{token}')}"
        found = {label: table[token] for label, table in found.items()}
    if not is_trigram and len(found) > 1:
        return _beside(found, of, scores)
    return [_alone(label, table, of) for label, table in found.items()]


def _verdict(table: NgramTable, token: int | None) -> str:
    """What the first table says, in words."""
    own = table if token is None else table[token]
    if not len(own):
        return f"{table.path} has no such n-gram."
    names = [visible(table.names[i]) for i in own.ids[0].tolist()]
    if table.n == 3:
        return f"{table.path}: the best of all triples is {names[0]} \u2026 {names[1]} \u2192 {names[2]}."
    if token is not None:
        return f"After {names[0]}, {table.path} says {names[1]} first."
    follow = Counter(own.ids[:, 1].tolist())
    ((most, count),) = follow.most_common(1)
    said = f"The {len(own):,} best bi-grams of {table.path} end in {len(follow):,} tokens, {visible(table.names[most])} in {count}"
    hub = count > len(own) / 2 and table.settings.get("score") == "logprob"
    return f"{said}{': it follows almost anything, which --score lift takes away.' if hub else '.'}"


def _further(options: argparse.Namespace, labels: list[str]) -> list[str]:
    """What to run next."""
    found = ["--token TOKEN: after one token; --score lift: over the path's mean; --explain: what the numbers mean"]
    if options.trigrams is not None:
        found = ["--head H, --token KEY: of one head or key; --explain: what the numbers mean"]
    elif len(labels) < 3:
        found.append(f"--path {EVERY}: direct, mlps and each MLP; --path 0_mlp: one; --trigrams LAYER: of heads")
    return [*found, "--save FILE: the tables, for tl_jets.studies, which compares them with a text and ablates"]


def _check(options: argparse.Namespace, is_trigram: bool) -> None:
    """Raise UsageError for options that do not go together."""
    if options.save:
        _check_apart(options)
    others = BIGRAM_OPTIONS if is_trigram else TRIGRAM_OPTIONS
    misplaced = [name for name in others if getattr(options, name) is not None]
    if misplaced:
        what = "bi-grams: leave it or --trigrams out" if is_trigram else "skip-trigrams: give --trigrams LAYER"
        raise UsageError(f"--{misplaced[0]} is an option of {what}")
    if options.token and options.per == "global":
        raise UsageError("--token shows rows of single tokens: leave --per out, or use --per row")


def _check_apart(options: argparse.Namespace) -> None:
    """Reject an output file that could replace one of several saved tables."""
    save = Path(options.save)
    start, end = f"{save.stem}.", save.suffix or SUFFIX
    if is_folder(options.save):
        save, start, end = save / "table", "", SUFFIX
    for kind in ("html", "json"):
        file = getattr(options, kind)
        if file in (None, STDOUT):
            continue
        path = Path(file)
        is_beside = path.parent.resolve() == save.parent.resolve()
        if is_beside and path.name.startswith(start) and path.name.endswith(end):
            raise UsageError(
                f"--{kind} {file!r} may be the name of a table: several are saved as {start}PATH{end}; give another name"
            )


def _bigrams(
    options: argparse.Namespace, network: ResidualNetwork, rows: list[int] | None, folder: Path | None
) -> dict[str, NgramTable]:
    paths, firsts = chosen_paths(options.path, network, rows, whole=options.save is not None)
    per = "row" if rows is not None else options.per or "global"
    score = options.score or "logprob"
    given: dict[str, Any] = {"top_k": options.top_k, "per": per, "score": score, "rows": firsts, "folder": folder}
    given |= {"distributed": together()}
    if not options.keep_all:
        given |= _left_out(network, rows)
    return jet_bigrams_by_path(network, paths, **given)


def _left_out(network: ResidualNetwork, rows: list[int] | None) -> dict[str, Any]:
    """Where embeddings are tied: each token after itself, and tokens never trained, except those asked for."""
    found = untrained_tokens(network)
    if not found.tied:
        return {}
    others = sorted(set(found.ids.tolist()) - set(rows or []))
    return {"exclude_self": True, "exclude": others or None}


def _trigrams(
    options: argparse.Namespace, network: ResidualNetwork, rows: list[int] | None, folder: Path | None
) -> dict[str, NgramTable]:
    given: dict[str, Any] = {"top_k": options.top_k, "rows": rows, "folder": folder, "distributed": together()}
    given |= {"distance": 1 if options.distance is None else options.distance}
    given |= {"normalize": options.normalize or "vocab"}
    tables = jet_trigrams(network, options.trigrams, options.head, **given)
    return {table.path: table for table in tables.values()}


def _save(tables: dict[str, NgramTable], file: Path) -> list[str]:
    """Save every table atomically, and return the files."""
    names = [file]
    if len(tables) > 1:
        names = [file.with_name(f"{file.stem}.{label.replace(ARROW, '-')}{file.suffix or SUFFIX}") for label in tables]
    for name in names:
        check_replaceable(name)
    for name, table in zip(names, tables.values(), strict=True):
        try:
            table.save(name)
        except OSError as error:
            raise UsageError(f"cannot write {str(name)!r}: {one_line(error)}") from error
    return [str(name) for name in names]


def _records(table: NgramTable) -> Iterator[dict[str, Any]]:
    """One record an n-gram, made on demand."""
    names = {token: visible(text) for token, text in table.names.items()}
    for rows in slices(len(table), AT_ONCE):
        numbers = {name: x[rows].tolist() for name, x in {"score": table.scores, **table.parts}.items()}
        for i, ids in enumerate(table.ids[rows].tolist()):
            record = {"ids": ids, "tokens": [names[token] for token in ids]}
            yield record | {name: values[i] for name, values in numbers.items()}


def _what(table: NgramTable, top_k: int) -> str:
    kind = "skip-trigrams (key ... query -> output)" if table.n == 3 else "bi-grams"
    settings = table.settings
    if settings.get("per") == "global" and settings["rows"] != "all":
        count = settings["rows"]["count"]
        return f"the {top_k} best {kind} after {count:,} first tokens, evenly spread; --path {table.path}: all"
    if settings.get("per") == "row" or settings["rows"] != "all":
        return f"the {top_k} best {kind}{' of each token' if table.n == 2 else ''}"
    return f"the {top_k} best {kind} of the whole vocabulary"


def _alone(title: str, table: NgramTable, of: str = "") -> Table:
    """One table: a row an n-gram, with its score and parts."""
    heads = ("key", "query", "output") if table.n == 3 else ("first", "then")
    names = {f"token_{i}": name for i, name in enumerate(heads, 1)}
    frame = table[:MAX_ROWS].to_dataframe(escape=True).drop(columns=[f"id_{i}" for i in range(1, table.n + 1)])
    frame = frame.rename(columns=lambda name: names.get(name, name.replace("_", " ")))
    if table.n == 2 and table.settings.get("score", "logprob") == "logprob":
        frame.insert(3, "probability", [f"{share:.1%}" for share in np.exp(frame["score"])])
    frame.insert(0, "rank", range(len(frame)))
    notes = [table.note] if table.note else []
    return Table(f"{title}{of}", frame, notes=notes, top=_top(table, of), total=len(table), more="more: --json, --save")


def _beside(found: Mapping[str, NgramTable], of: str, scores: bool) -> Iterator[Table]:
    """Several tables as columns, as many side by side as the terminal has room for."""
    longest = max(map(len, found.values()))
    top = min(longest, _top(next(iter(found.values())), of))
    room = Terminal().width - RANK_WIDTH
    group: list[pd.DataFrame] = []
    used = 0
    for label, table in found.items():
        frame = side_by_side({label: table}, top, scores=scores).reindex(range(top))
        frame[label] = frame[label].fillna("")
        width = frame[label].str.len().max() + GAP + (RANK_WIDTH + GAP if scores else 0)
        if group and used + width > room:
            yield _joined(group, of, longest)
            group, used = [], 0
        group.append(frame.rename(columns={f"{label} score": "score"}))
        used += max(width, len(label) + GAP)
    yield _joined(group, of, longest)


def _joined(group: list[pd.DataFrame], of: str, total: int) -> Table:
    title = f"Bi-grams by path{of}: {', '.join(frame.columns[0] for frame in group)}"
    frame = pd.concat(group, axis=1).reset_index()
    return Table(title, frame, top=len(frame), total=total, more="more rows: --json, --save")


def _top(table: NgramTable, of: str) -> int:
    """Number of rows to show, for one token (`of`) or for all."""
    return SHOWN if table.settings.get("per") == "row" and not of else MAX_ROWS


def _legend(table: NgramTable) -> list[str]:
    """The entries of the legend that a table needs."""
    if table.n == 3:
        keys = [f"attention|{table.settings.get('normalize')}", "log prob", "score|trigram"]
    else:
        shown = ["log normalizer"] if "log_normalizer" in table.parts else []
        keys = [f"score|{table.settings.get('score', 'logprob')}", *shown, "direct"]
    return [*keys, "control", "\u00b7"]
