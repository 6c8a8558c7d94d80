"""Tables of n-grams, best first, and their Parquet files.

The columns are `id_1 .. id_n`, `token_1 .. token_n`, `score`, and further numbers (`parts`). A table carries its path,
settings and the model's fingerprint; tables are comparable if their settings are equal. pandas, DuckDB, polars and
datasets read the files, in which everything but the columns is JSON in the schema's metadata; nothing is unpickled.

Example:
    >>> import torch
    >>> names = {0: " more", 1: " than", 2: " has", 3: " been"}
    >>> table = NgramTable.ranked(
    ...     torch.tensor([[2, 3], [0, 1], [0, 3]]), torch.tensor([-0.4, -0.1, -3.0]), names=names, path="mlps"
    ... )
    >>> table
    NgramTable(3 bi-grams by log-probability; path mlps)
      token_1 token_2  score
    0   ·more   ·than   -0.1
    1    ·has   ·been   -0.4
    2   ·more   ·been   -3.0
    >>> len(table["more"]), table.where(token_2=" been", min_score=-1).ids.tolist()
    (2, [[2, 3]])
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.atomic_files import write_atomically
from tl_jets.core.logit_reader import rank
from tl_jets.core.notebook import dataframe_html
from tl_jets.core.options import check_integers
from tl_jets.core.results import Result
from tl_jets.core.tokens import visible, writable

# Key in the metadata of the Parquet schema.
METADATA_KEY = b"tl_jets.ngrams"
FORMAT_VERSION = 1
SHOWN_ROWS = 10
# Rows written at a time.
SAVED_ROWS = 2**18
# Maximum number of missing tokens named in a note.
NOTED = 3
_ORDERS = {1: "uni-grams", 2: "bi-grams", 3: "tri-grams"}
_UNITS = {"logprob": "log-probability", "logit": "logit", "centered": "centered logit", "lift": "lift (nats)"}


@dataclass(frozen=True, eq=False, repr=False)
class NgramTable(Result):
    """n-grams of a model, best first, ties by ids; on the CPU.

    `table["at"]` and `table[17]` are the n-grams that begin with a token; if none begins with the text, a space is put
    before it. Slices select rows: `table[:20]`. Without a match the table is empty, and `note` names similar tokens.

    Attributes:
        ids: Token ids. Shape [row, n].
        scores: Nats (log-probabilities) or logits, see `settings["score"]`. Shape [row].
        names: Text of each id; lone surrogates are escaped.
        path: What was decoded: `direct`, `3_mlp`, `1_mlp > 3_mlp`, `mlps`, `L3H2`, ...
        settings: Options of the computation, plain JSON values.
        fingerprint: Of the model's weights; empty if unknown.
        parts: Further numbers by column name, such as `log_normalizer`. Shape [row] each.
        note: Which tokens a look-up did not find; not saved.

    Raises:
        ValueError: Shapes disagree, ids are not integers or have no name, a score is NaN, a part has the name of another
            column, or the settings are not JSON.
    """

    ids: Int[Tensor, "row n"]
    scores: Float[Tensor, " row"]
    names: Mapping[int, str] = field(repr=False)
    path: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    parts: Mapping[str, Float[Tensor, " row"]] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        if self.ids.is_floating_point() or self.ids.is_complex() or self.ids.dtype is torch.bool:
            raise ValueError(f"ids must be whole numbers, token ids; got {self.ids.dtype}. Convert them with .long().")
        if self.ids.ndim != 2 or self.scores.shape != self.ids.shape[:1] or not self.ids.shape[1]:
            raise ValueError(
                f"ids must be [row, n] and scores [row]; got {tuple(self.ids.shape)} and {tuple(self.scores.shape)}. "
                "Give one row an n-gram."
            )
        if bool(self.scores.isnan().any()):
            raise ValueError(
                f"Scores must be numbers, for tables are sorted by them; those of {int(self.scores.isnan().sum())} of "
                f"{len(self.scores)} rows are NaN. Leave these rows out, or look where the NaN comes from."
            )
        for name, values in self.parts.items():
            if values.shape != self.scores.shape or name in (*self._columns("id"), *self._columns("token"), "score"):
                raise ValueError(
                    f"A part must be [row] = {tuple(self.scores.shape)} under a name of its own; got {name!r} of shape "
                    f"{tuple(values.shape)}."
                )
        try:
            settings = json.loads(json.dumps(dict(self.settings), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings must be plain JSON values; got {self.settings!r} ({error}).") from error
        ids = self.ids.detach().cpu().long()
        present = ids.unique().tolist()
        nameless = [token for token in present if token not in self.names]
        if nameless:
            raise ValueError(f"Every id of a table must have a name; {nameless[:5]} have none. See tokens.token_names.")
        for token in present:
            if not isinstance(self.names[token], str):
                raise ValueError(
                    f"The names of ids must be texts; id {token} has {self.names[token]!r}. See tokens.token_names."
                )
        own: dict[str, Any] = {"ids": ids, "settings": settings, "scores": self.scores.detach().cpu().double()}
        own["names"] = {token: writable(self.names[token]) for token in present}
        own["parts"] = {name: x.detach().cpu().double() for name, x in self.parts.items()}
        for name, value in own.items():
            object.__setattr__(self, name, value)

    @classmethod
    def ranked(
        cls,
        ids: Int[Tensor, "row n"],
        scores: Float[Tensor, " row"],
        *,
        parts: Mapping[str, Float[Tensor, " row"]] | None = None,
        top_k: int | None = None,
        **about: Any,
    ) -> NgramTable:
        """A table of n-grams in any order, sorted by (score, ids) and cut to `top_k`; arguments are the attributes."""
        order = rank(ids, scores)[:top_k]
        return cls(ids[order], scores[order], parts={name: x[order] for name, x in (parts or {}).items()}, **about)

    # Looking

    @property
    def n(self) -> int:
        """Number of tokens in an n-gram."""
        return self.ids.shape[1]

    def _columns(self, kind: str) -> list[str]:
        """Names of the columns `id_1..` or `token_1..`."""
        return [f"{kind}_{i}" for i in range(1, self.n + 1)]

    @property
    def header(self) -> dict[str, Any]:
        """Path, settings and fingerprint."""
        return {"path": self.path, "settings": dict(self.settings), "fingerprint": self.fingerprint}

    @property
    def _kind(self) -> str:
        return _ORDERS.get(self.n, f"{self.n}-grams")

    def __repr__(self) -> str:
        unit = _UNITS.get(self.settings.get("score", "logprob"), "score")
        model = f"; model {self.fingerprint[:12]}" if self.fingerprint else ""
        note = f": {self.note}" if self.note else ""
        tied = "; tied embeddings" if self.settings.get("tied_embeddings") else ""
        title = f"NgramTable({len(self):,} {self._kind} by {unit}; path {self.path}{tied}{model}){note}"
        if not len(self):
            return title
        more = f"\n... {len(self) - SHOWN_ROWS:,} more" if len(self) > SHOWN_ROWS else ""
        shown = self[:SHOWN_ROWS].to_dataframe(escape=True).drop(columns=self._columns("id"))
        return f"{title}\n{shown.to_string()}{more}"

    def _body(self) -> str:
        frame = self[: 2 * SHOWN_ROWS].to_dataframe().drop(columns=self._columns("id"))
        return dataframe_html(frame, rows=len(frame), total=len(self))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: str | int | slice) -> NgramTable:
        """Rows of a slice, or n-grams that begin with a token; without any, an empty table with a `note`."""
        if isinstance(key, slice):
            return self._rows(torch.arange(len(self), device="cpu")[key])
        if isinstance(key, str):
            return self.where(token_1=key)
        if isinstance(key, int):
            return self.where(id_1=key)
        raise TypeError(f"A table is indexed by a token's text, its id, or a slice of rows; got {type(key).__name__}.")

    def __contains__(self, key: object) -> bool:
        return isinstance(key, (str, int)) and len(self[key]) > 0

    def __iter__(self) -> Any:
        raise TypeError(
            "A table is not iterated over, since table[0] is token 0. Use table.to_dataframe().itertuples()."
        )

    def where(
        self,
        *,
        min_score: float | int | None = None,
        max_score: float | int | None = None,
        **columns: str | int | Collection[str] | Collection[int],
    ) -> NgramTable:
        """The rows that meet all conditions, with the same header; `note` names tokens not found in their column.

        Args:
            min_score: Smallest score.
            max_score: Largest score.
            **columns: `id_2=17`, `token_1=" more"`, or alternatives: `token_2=[" than", " of"]`.

        Raises:
            ValueError: There is no such column.

        Example:
            >>> given = {"names": {0: "a", 1: "b", 2: "c"}, "path": "direct"}
            >>> table = NgramTable.ranked(torch.tensor([[0, 1], [0, 2]]), torch.tensor([-1.0, -2.0]), **given)
            >>> found = table.where(id_1=0, token_2=["c", "B"])
            >>> len(found), found.note
            (1, "none of these 2 bi-grams has 'B' as token_2; 'b' is a token_2")
        """
        keep = torch.ones(len(self), dtype=torch.bool, device="cpu")
        notes = [self.note] if self.note else []
        if min_score is not None:
            keep &= self.scores >= min_score
        if max_score is not None:
            keep &= self.scores <= max_score
        known = self._columns("id") + self._columns("token")
        for name, wanted in columns.items():
            if name not in known:
                raise ValueError(f"A condition must be on a column, one of {known}; got {name!r}.")
            kind, _, place = name.partition("_")
            column = self.ids[:, int(place) - 1]
            values: list[Any] = [wanted] if isinstance(wanted, (str, int)) else list(wanted)
            of_value = {value: self._named(value, column) if kind == "token" else [value] for value in values}
            ids = torch.tensor(list(chain.from_iterable(of_value.values())), dtype=torch.long, device="cpu")
            found = torch.isin(column, ids)
            keep &= found
            # Of alternative ids, one suffices; every text should be there.
            met = {value: bool(tokens if kind == "token" else found.any()) for value, tokens in of_value.items()}
            absent = [value for value in met if len(self) and not met[value]]
            notes += [self._absence(value, f"token_{place}") for value in absent[:NOTED]]
            notes += [f"{len(absent) - NOTED} more are not there"] if len(absent) > NOTED else []
        return replace(self._rows(keep.nonzero()[:, 0]), note="; ".join(notes))

    def _named(self, text: str, column: Int[Tensor, " row"]) -> list[int]:
        """Ids in a column with a text, else with a space before it; several tokens may share a text."""
        for wanted in (text, f" {text}"):
            ids = [token for token, name in self.names.items() if name == wanted and bool((column == token).any())]
            if ids:
                return ids
        return []

    def _absence(self, wanted: str | int, name: str) -> str:
        """Says that no n-gram has a token in a column, and where one with other spaces or case stands."""
        alike = {}
        if isinstance(wanted, str):
            tokens = [t for t, text in self.names.items() if text.strip().casefold() == wanted.strip().casefold()]
            for other, column in zip(self._columns("token"), self.ids.T, strict=True):
                alike[other] = sorted({self.names[token] for token in tokens if bool((column == token).any())})
        others = "".join(f"; {', '.join(map(repr, texts))} is a {other}" for other, texts in alike.items() if texts)
        text = repr(wanted) if isinstance(wanted, str) else f"id {wanted}"
        return f"none of these {len(self):,} {self._kind} has {text} as {name}{others}"

    def _mapped(self, change: Any, names: Any = None) -> NgramTable:
        """Tables stay on the CPU when the result that holds them moves."""
        return self

    def _rows(self, index: Tensor) -> NgramTable:
        parts = {name: x[index] for name, x in self.parts.items()}
        return replace(self, ids=self.ids[index], scores=self.scores[index], parts=parts)

    def to_dataframe(self, *, escape: bool = False) -> pd.DataFrame:
        """Columns id_1.., token_1.., score and parts, best first; `escape` shows spaces and line breaks in tokens."""
        names = {token: visible(text) if escape else text for token, text in self.names.items()}
        columns: dict[str, Any] = {name: ids.numpy() for name, ids in zip(self._columns("id"), self.ids.T, strict=True)}
        for name, ids in zip(self._columns("token"), self.ids.T.tolist(), strict=True):
            columns[name] = [names[token] for token in ids]
        columns["score"] = self.scores.numpy()
        return pd.DataFrame(columns | {name: x.numpy() for name, x in self.parts.items()})

    # Files

    @property
    def digest(self) -> str:
        """sha256 of the whole table; equal tables have equal digests."""
        total = hashlib.sha256(json.dumps([self.header, sorted(self.names.items())], sort_keys=True).encode())
        for name, values in {"ids": self.ids, "scores": self.scores, **self.parts}.items():
            total.update(f"{name} {tuple(values.shape)}".encode())
            total.update(values.contiguous().numpy().tobytes())
        return total.hexdigest()

    def save(self, file: str | Path) -> Path:
        """Write the table as Parquet, atomically, replacing an existing file; returns the file.

        Raises:
            OSError: The directory does not exist or is not writable.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        about = self.header | {"version": FORMAT_VERSION, "tl_jets": version("tl-jets"), "digest": self.digest}
        types = dict.fromkeys(self._columns("id"), pa.int64()) | dict.fromkeys(self._columns("token"), pa.string())
        types |= dict.fromkeys(("score", *self.parts), pa.float64())
        schema = pa.schema(list(types.items()), {METADATA_KEY: json.dumps(about)})
        known = torch.tensor(sorted(self.names), dtype=torch.long, device="cpu")
        texts = pa.array([self.names[token] for token in known.tolist()], pa.string())

        def write(stream: BinaryIO) -> None:
            with pq.ParquetWriter(stream, schema, write_page_checksum=True) as writer:
                for start in range(0, max(1, len(self)), SAVED_ROWS):
                    rows = slice(start, start + SAVED_ROWS)
                    ids = self.ids[rows].T.contiguous()
                    tokens = [texts.take(pa.array(torch.searchsorted(known, column).numpy())) for column in ids]
                    numbers = [x[rows].numpy() for x in (self.scores, *self.parts.values())]
                    columns = [*(pa.array(column.numpy()) for column in ids), *tokens, *map(pa.array, numbers)]
                    writer.write_table(pa.Table.from_arrays(columns, schema=schema))

        return write_atomically(file, write)

    @classmethod
    def load(cls, file: str | Path) -> NgramTable:
        """A table from a file that `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is truncated, changed, or not such a table.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not Path(file).is_file():
            raise FileNotFoundError(f"A table is a file that NgramTable.save wrote; there is none at {str(file)!r}.")
        try:
            data = Path(file).read_bytes()  # all at once, in case the file is being replaced
            found = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
            about = json.loads((found.schema.metadata or {}).get(METADATA_KEY, b"null"))
        except (pa.ArrowException, OSError, RecursionError, ValueError) as error:
            raise ValueError(
                f"A table must be an intact Parquet file that NgramTable.save wrote; {str(file)!r} is truncated, damaged "
                f"or something else ({error}). Delete it and make it again."
            ) from error
        if not isinstance(about, dict):
            raise ValueError(
                f"A table must be a file that NgramTable.save wrote; {str(file)!r} is a Parquet file of something else "
                f"(its metadata has no JSON object {METADATA_KEY.decode()!r}). Read it with pandas."
            )
        if about.get("version") != FORMAT_VERSION:
            writer = f"tl-jets {about['tl_jets']}" if "tl_jets" in about else "the tl-jets that wrote it"
            raise ValueError(
                f"A table must have version {FORMAT_VERSION} of the format for this tl-jets, {version('tl-jets')}; "
                f"{str(file)!r} has version {about.get('version')} of the format. Install {writer}."
            )
        return _read(cls, found, about, str(file))


def _read(cls: type[NgramTable], found: Any, about: dict[str, Any], file: str) -> NgramTable:
    """A table from an Arrow table and its metadata; raises ValueError unless both are as written."""
    try:
        n = sum(name.startswith("id_") for name in found.column_names)
        texts = [found.column(f"token_{i}").to_pylist() for i in range(1, n + 1)]
        wanted = [*(f"id_{i}" for i in range(1, n + 1)), *found.column_names[2 * n :]]
        columns = {name: torch.tensor(found.column(name).to_numpy(), device="cpu") for name in wanted}
        ids = torch.stack([columns.pop(f"id_{i}") for i in range(1, n + 1)], dim=1)
        names = {t: text for i in range(n) for t, text in zip(ids[:, i].tolist(), texts[i], strict=True)}
        table = cls(ids, columns.pop("score"), names, about["path"], about["settings"], about["fingerprint"], columns)
        is_whole = table.digest == about["digest"]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{file!r} lacks what a table must have ({error}). Make it again.") from error
    if not is_whole:
        raise ValueError(f"{file!r} was changed after NgramTable.save wrote it. Make it again.")
    return table


def side_by_side(tables: Mapping[str, NgramTable], k: int = 20, *, scores: bool = False) -> pd.DataFrame:
    """The best n-grams of several tables by rank (0 is the best), a column each, as `·more·than`; short columns are padded.

    Args:
        tables: Tables by column name.
        k: Number of rows.
        scores: Add a column `<name> score` after each.

    Example:
        >>> table = NgramTable.ranked(torch.tensor([[0, 1]]), torch.tensor([-1.0]), names={0: "a", 1: " b"}, path="direct")
        >>> side_by_side({"direct": table, "again": table}).values.tolist()
        [['a ·b', 'a ·b']]
    """
    check_integers(0, k=k)
    columns: dict[str, Any] = {}
    for name, table in tables.items():
        best = table[:k]
        texts = {token: visible(text) for token, text in best.names.items()}
        columns[name] = pd.Series([" ".join(texts[token] for token in row) for row in best.ids.tolist()], dtype=object)
        if scores:
            columns[f"{name} score"] = pd.Series(best.scores.tolist(), dtype=float)
    frame = pd.DataFrame(columns)
    frame = frame.fillna({name: "" for name in tables})
    frame.index = pd.RangeIndex(len(frame), name="rank")
    return frame
