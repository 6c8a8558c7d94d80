"""`tl-jets ngrams`: what the weights say after every token of the vocabulary, without a corpus."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

from tl_jets.cli.arguments import FILES_HELP, TOKEN_HELP, add_command, add_files, add_model, at_least
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
from tl_jets.ngrams.bigrams import Per
from tl_jets.ngrams.jobs import SUFFIX
from tl_jets.ngrams.join import NORMALIZES
from tl_jets.ngrams.scan import SCORES
from tl_jets.ngrams.streams import DIRECT, MLPS, mlp_steps
from tl_jets.ngrams.tables import NgramTable, side_by_side
from tl_jets.views import trigram_heatmap

DESCRIPTION = """\
A path that mixes no positions is a function of one token. Evaluated on the
whole vocabulary it is a table of bi-grams: exact, from the weights alone. A
head gives skip-trigrams: how much a query token looks at a key token, and what
the head then writes of the key.

paths (--path):
  direct            the embedding, decoded at once
  mlps              all MLPs, without attention
  3_mlp             one MLP alone, of the embedding
  1_mlp > 3_mlp     one MLP of another's output

what the numbers mean:
  score      log-probability, in nats: of the second token after the first;
             of skip-trigrams log attention + log-probability of the output
  The controls are in Python: whether a text has these n-grams
  (tl_jets.studies.compare_with_counts), and whether the model says less of
  them without the component (tl_jets.studies.ablation_check).
"""
EPILOG = f"""\
{FILES_HELP}

examples:
  tl-jets ngrams
  tl-jets ngrams --path mlps --top-k 1000 --save mlps.parquet
  tl-jets ngrams --token " Victor"
  tl-jets ngrams --trigrams 1 --head 0 --head 2
  tl-jets ngrams --trigrams 1 --top-k 1000 --save heads/

cost: about V^2 d_model multiply-adds a path (GPT-2 small: a quarter of a minute
on two cores), a fraction of that a head.
"""
BIGRAM_OPTIONS = ("path", "per", "score")
TRIGRAM_OPTIONS = ("head", "distance", "normalize")
# N-grams of a table; the functions take more.
MOST = 1_000_000
# Records that are made ready for a file at a time.
AT_ONCE = 4096


def add_to(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(
        commands,
        "ngrams",
        run,
        summary="bi-grams and skip-trigrams of the weights, without a corpus",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add_model(parser, prompt=False)
    add = parser.add_argument
    add(
        "--path",
        action="append",
        metavar="PATH",
        help="a path of bi-grams, see above; repeat it for more (default: direct, mlps, and each MLP)",
    )
    add("--per", choices=get_args(Per), help="best of all (global), or of each first token (row) (default: global)")
    add("--score", choices=SCORES, help="of bi-grams: log-probability in nats, or the logit (default: logprob)")
    add("--trigrams", type=at_least(0), metavar="LAYER", help="skip-trigrams of this layer's heads, not bi-grams")
    add("--head", action="append", type=at_least(0), metavar="H", help="a head; repeat it for more (default: all)")
    add("--distance", type=at_least(0), metavar="N", help="places from key to query (default: 1)")
    add(
        "--normalize",
        choices=NORMALIZES,
        help="of attention: over the vocabulary as keys, over key and query alone, or raw scores (default: vocab)",
    )
    add(
        "--token",
        action="append",
        metavar="TOKEN",
        help=f"only n-grams whose first token (of skip-trigrams: the key) is this, {TOKEN_HELP}; repeat it for more",
    )
    add(
        "--top-k",
        type=at_least(1, at_most=MOST),
        default=20,
        metavar="N",
        help="how many n-grams a table, or a row of it",
    )
    add("--scores", action="store_true", help="show scores beside tables that stand side by side, too")
    add(
        "--save",
        metavar="FILE|DIR/",
        help="also save the tables as Parquet (NgramTable.load reads them); the names of several tables get their path: "
        "FILE.parquet becomes FILE.mlps.parquet; DIR/ keeps each as DIR/mlps.parquet when it is finished, and the same command "
        "goes on from there after it was stopped",
    )
    add_files(parser, "one page that opens offline in a browser")


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
    # The sweeps draw bars of their own.
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
    """Refuse to write what would replace one of several tables: hours later nobody would see it."""
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
    """Save every table, atomically; returns the files."""
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
    """The tables of a page, and of every head how its best keys and queries meet."""
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
    """A table as plain values: where it comes from, and a record an n-gram, made when it is asked for."""
    return {**table.header, "rows": Records(len(table), partial(_records, table))}


def _records(table: NgramTable) -> Iterator[dict[str, Any]]:
    names = {token: visible(text) for token, text in table.names.items()}
    for rows in slices(len(table), AT_ONCE):
        numbers = {name: x[rows].tolist() for name, x in {"score": table.scores, **table.parts}.items()}
        for i, ids in enumerate(table.ids[rows].tolist()):
            record = {"ids": ids, "tokens": [names[token] for token in ids]}
            yield record | {name: values[i] for name, values in numbers.items()}
