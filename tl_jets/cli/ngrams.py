"""`tl-jets ngrams`: bi-grams and skip-trigrams of the weights, without a corpus."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tl_jets.cli.output import STDOUT, Output, Records, check_replaceable, header, is_folder
from tl_jets.cli.pages import MAX_ROWS, command_page, section
from tl_jets.cli.session import UsageError, load_network, one_line, read_token, refusals, steps
from tl_jets.cli.terminal import ngrams as terminal
from tl_jets.core.logit_reader import slices
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.notebook import View
from tl_jets.core.path import ARROW
from tl_jets.core.tokens import visible
from tl_jets.ngrams import jet_bigrams_by_path, jet_trigrams
from tl_jets.ngrams.jobs import SUFFIX
from tl_jets.ngrams.streams import DIRECT, MLPS, mlp_steps
from tl_jets.ngrams.tables import NgramTable, side_by_side
from tl_jets.views import trigram_heatmap

BIGRAM_OPTIONS = ("path", "per", "score")
TRIGRAM_OPTIONS = ("head", "distance", "normalize")
# Number of records converted at a time.
AT_ONCE = 4096


def run(options: argparse.Namespace) -> None:
    """Print n-grams."""
    output = Output.of(options)
    _check_apart(output)
    is_trigram = options.trigrams is not None
    misplaced = [
        name for name in (BIGRAM_OPTIONS if is_trigram else TRIGRAM_OPTIONS) if getattr(options, name) is not None
    ]
    if misplaced:
        what = "bi-grams: leave it or --trigrams out" if is_trigram else "skip-trigrams: give --trigrams LAYER"
        raise UsageError(f"--{misplaced[0]} is an option of {what}")
    if options.token and options.per == "global":
        raise UsageError("--token shows rows of single tokens: leave --per out, or use --per row")
    with steps(1) as step, refusals():
        step("loading TransformerLens and the model")
        network = load_network(options.model, "sublayer")
        rows = None
        if options.token:
            n_tokens = int(network.view.model.cfg.d_vocab)  # type: ignore[attr-defined]
            rows = [read_token(network, token, n_tokens) for token in options.token]
    # Outside `steps`: the sweeps draw their own bars.
    folder = Path(options.save) if options.save and is_folder(options.save) else None
    with refusals():
        tables = (_trigrams if is_trigram else _bigrams)(options, network, rows, folder)
    if folder is not None:
        saved = [str(folder / f"{label}{SUFFIX}") for label in tables]
    else:
        saved = _save(tables, Path(options.save)) if options.save else []
    asked = {"model": options.model, "ngram": "skip-trigram" if is_trigram else "bigram"}
    output.write_json(header("ngrams", **asked) | {"tables": {label: table_data(t) for label, t in tables.items()}})
    if "html" in output:
        asked = terminal.asked(tables, model=options.model, top_k=options.top_k, saved=saved)
        parts = _sections(network, tables)
        output.write("html", command_page("ngrams", asked, terminal.explained(tables), *parts))
    console = output.console
    given = {"tokens": rows, "top_k": options.top_k, "scores": options.scores, "width": console.width}
    output.print(*terminal.tables(tables, model=options.model, saved=saved, **given))


def _bigrams(
    options: argparse.Namespace, network: ResidualNetwork, rows: list[int] | None, folder: Path | None
) -> dict[str, NgramTable]:
    paths = options.path
    if not paths:
        mlps = mlp_steps(network)
        paths = [DIRECT, *([MLPS, *mlps] if mlps else [])]
    per = "row" if rows is not None else options.per or "global"
    score = options.score or "logprob"
    return jet_bigrams_by_path(network, paths, top_k=options.top_k, per=per, score=score, rows=rows, folder=folder)


def _trigrams(
    options: argparse.Namespace, network: ResidualNetwork, rows: list[int] | None, folder: Path | None
) -> dict[str, NgramTable]:
    distance = 1 if options.distance is None else options.distance
    tables = jet_trigrams(
        network,
        options.trigrams,
        options.head,
        top_k=options.top_k,
        distance=distance,
        normalize=options.normalize or "vocab",
        rows=rows,
        folder=folder,
    )
    return {table.path: table for table in tables.values()}


def _table_file(file: Path, label: str) -> Path:
    """The file of one of several tables."""
    return file.with_name(f"{file.stem}.{label.replace(ARROW, '-')}{file.suffix or SUFFIX}")


def _check_apart(output: Output) -> None:
    """Reject an output file that could replace one of several saved tables."""
    if "save" not in output:
        return
    save = Path(output.files["save"])
    start, end = f"{save.stem}.", save.suffix or SUFFIX
    if is_folder(output.files["save"]):
        save, start, end = save / "table", "", SUFFIX
    for kind, file in output.files.items():
        path = Path(file)
        is_beside = file != STDOUT and path.parent.resolve() == save.parent.resolve()
        if kind != "save" and is_beside and path.name.startswith(start) and path.name.endswith(end):
            raise UsageError(
                f"--{kind} {file!r} may be the name of a table: several are saved as {start}PATH{end}; give another name"
            )


def _save(tables: dict[str, NgramTable], file: Path) -> list[str]:
    """Save every table atomically, and return the files."""
    names = [file]
    if len(tables) > 1:
        names = [_table_file(file, label) for label in tables]
    for name in names:
        check_replaceable(name)
    for name, table in zip(names, tables.values(), strict=True):
        try:
            table.save(name)
        except OSError as error:
            raise UsageError(f"cannot write {str(name)!r}: {one_line(error)}") from error
    return [str(name) for name in names]


def _sections(network: ResidualNetwork, tables: dict[str, NgramTable]) -> list[View]:
    """Tables of the HTML page, and a heatmap for every head."""
    found = []
    if len(tables) > 1 and all(table.n == 2 for table in tables.values()):
        longest = max(map(len, tables.values()))
        found.append(section("Side by side", side_by_side(tables, min(longest, MAX_ROWS)), total=longest))
    for label, table in tables.items():
        frame = table[:MAX_ROWS].to_dataframe(escape=True).drop(columns=[f"id_{i}" for i in range(1, table.n + 1)])
        names = ("key", "query", "output") if table.n == 3 else ("first", "then")
        frame = frame.rename(columns={f"token_{i}": name for i, name in enumerate(names, 1)})
        found.append(section(f"{label}: {len(table):,} n-grams", frame, total=len(table)))
        if table.n == 3:
            found.append(trigram_heatmap(network, table))
    return found


def table_data(table: NgramTable) -> dict[str, Any]:
    """A table as plain values: its header, and one record per n-gram, made on demand."""
    return {**table.header, "rows": Records(len(table), partial(_records, table))}


def _records(table: NgramTable) -> Iterator[dict[str, Any]]:
    names = {token: visible(text) for token, text in table.names.items()}
    for rows in slices(len(table), AT_ONCE):
        numbers = {name: x[rows].tolist() for name, x in {"score": table.scores, **table.parts}.items()}
        for i, ids in enumerate(table.ids[rows].tolist()):
            record = {"ids": ids, "tokens": [names[token] for token in ids]}
            yield record | {name: values[i] for name, values in numbers.items()}
