"""Files of sweeps that were stopped: an unfinished state, or a finished table, in which one bit is another is refused by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

import tl_jets as tj
from tl_jets import studies
from tl_jets.ngrams import bigram_job, sweep, trigram_job
from tl_jets.ngrams.jobs import State
from tl_jets.ngrams.streams import VocabularyStreams

FLIPS = 60
OPTIONS: dict[str, Any] = {"top_k": 9, "chunk_size": 6, "progress": False}


def model() -> Any:
    return zoo.build(zoo.available(["llama"])[0])


def checkpoints(folder: Path, unigram: torch.Tensor | None) -> dict[str, tj.ngrams.NgramTable]:
    options: dict[str, Any] = {"path": "mlps", "reference": "last", "n": 9, "controls": 0, "progress": False}
    return {"last": studies.track({"last": model()}, **options, unigram=unigram, folder=folder).tables[0]}


# What is swept into a folder, and the state that it leaves there when it is stopped.
SWEEPS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "bi-grams": (
        "table.parquet.state",
        lambda folder: {"table": tj.jet_bigrams(model(), "mlps", **OPTIONS, save=folder / "table.parquet")},
    ),
    "rows": (
        "a[1].parquet.state",
        lambda folder: {"table": tj.jet_bigrams(model(), "mlps", **OPTIONS, per="row", save=folder / "a[1].parquet")},
    ),
    "paths": ("unfinished.state", lambda folder: tj.ngrams.jet_bigrams_by_path(model(), **OPTIONS, folder=folder)),
    "jobs": ("mlps.parquet.state", lambda folder: sweep([bigram_job(model(), "mlps", **OPTIONS)], folder)),
    "checkpoints": ("last/unfinished.state", lambda folder: checkpoints(folder, None)),
    "joint": ("last/unfinished.state", lambda folder: checkpoints(folder, torch.full((61,), 1 / 61).double())),
}


def digests(tables: Any) -> dict[str, str]:
    return {name: table.digest for name, table in tables.items()}


@pytest.fixture
def small_chunks(monkeypatch):
    """States are saved after every chunk, and chunks are small where nobody says how large."""
    monkeypatch.setattr("tl_jets.ngrams.jobs.STATE_SECONDS", 0.0)
    for name in ("CHUNK_CPU", "CHUNK_SIZE"):
        monkeypatch.setattr(f"tl_jets.ngrams.bigram_sweep.{name}", 6)


def stopped(name: str, folder: Path, monkeypatch: Any) -> Path:
    """The state file of a sweep that was stopped after its fourth chunk."""
    state, run = SWEEPS[name]
    folder.mkdir()
    embed, chunks = VocabularyStreams.embed, []

    def stops(self: Any, tokens: Any) -> Any:
        chunks.extend([1] if len(tokens) == 6 else [])
        if len(chunks) == 5:
            raise InterruptedError
        return embed(self, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(VocabularyStreams, "embed", stops)
        with pytest.raises(InterruptedError):
            run(folder)
    return folder / state


def flipped(data: bytes, draw: np.random.Generator) -> bytes:
    changed = bytearray(data)
    changed[int(draw.integers(len(data)))] ^= 1 << int(draw.integers(8))
    return bytes(changed)


def refuses(run: Callable[[], Any], file: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        run()
    assert file.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", SWEEPS)
def test_a_bit_of_a_state_is_refused(name, tmp_path, monkeypatch, small_chunks):
    run, whole, folder = SWEEPS[name][1], tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    expected = digests(run(whole))
    state = stopped(name, folder, monkeypatch)
    good, draw = state.read_bytes(), np.random.default_rng(0)
    header = json.loads(good.split(b"\n")[1])["header"]
    assert State(state, header).load()[0] == 24
    damaged = [flipped(good, draw) for _ in range(FLIPS)]
    damaged += [good[:length] for length in (0, 1, 64, 65, 300, len(good) // 2, len(good) - 1)]
    for data in damaged:
        state.write_bytes(data)
        assert "was changed" in refuses(lambda: State(state, header).load(), state)
    assert "was changed" in refuses(lambda: run(folder), state)
    state.write_bytes(good)
    leftovers = [state.with_name(f".{state.name}.abc.tmp"), state.with_name(f".{state.name}.x1_.tmp")]
    for leftover in leftovers:
        leftover.write_bytes(good[:100])
    other = state.with_name(".mine.tmp")
    other.write_bytes(b"")
    assert State(state, header).load()[0] == 24 and all(
        leftover.exists() for leftover in leftovers
    )  # reading only reads
    assert digests(run(folder)) == expected
    assert not any(leftover.exists() for leftover in leftovers) and other.exists() and not state.exists()


def rewritten(good: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """A state that says something else, with the digest of that."""
    _, about, data = good.split(b"\n", 2)
    found = json.loads(about)
    change(found)
    body = json.dumps(found).encode() + b"\n" + to_bytes(from_bytes(data))
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def test_what_a_state_says_is_checked(tmp_path, monkeypatch, small_chunks):
    folder, run = tmp_path / "stopped", SWEEPS["rows"][1]
    state = stopped("rows", folder, monkeypatch)
    good = state.read_bytes()
    for change, message in [
        (lambda found: found.update(rows=62), r"read 0\.\.61 rows; .* says 62"),
        (lambda found: found.update(rows=-6), "says -6"),
        (lambda found: found["header"].update(tl_jets="0.0.1"), "tl_jets '0.0.1', not '"),
        (lambda found: found["header"].update(state_format=99), "state_format 99, not 2"),
        (lambda found: found["header"]["settings"].update(top_k=8), "top_k 8, not 9"),
    ]:
        state.write_bytes(rewritten(good, change))
        with pytest.raises(ValueError, match=message):
            run(folder)
    # More rows than are done, without the digest of that: rows would be skipped.
    assert b'"rows": 24' in good
    state.write_bytes(good.replace(b'"rows": 24', b'"rows": 30'))
    assert "was changed" in refuses(lambda: run(folder), state)
    state.write_bytes(to_bytes({"table/ids": from_bytes(good.split(b"\n", 2)[2])["mlps/ids"]}))  # another program's
    assert "was changed" in refuses(lambda: run(folder), state)
    state.write_bytes(rewritten(good, lambda found: None))
    assert len(run(folder)["table"]) == 61 * 9


def test_a_bit_of_a_table_that_is_gone_on_from_is_refused(tmp_path):
    """Heads have no unfinished state: their tables are what a stopped sweep leaves."""

    def run() -> Any:
        tables = tj.jet_trigrams(model(), 0, top_k=9, progress=False, folder=tmp_path)
        return {str(head): table for head, table in tables.items()} | sweep(
            [trigram_job(model(), 1, 0, top_k=9, progress=False)], tmp_path, progress=False
        )

    expected, draw, refused = digests(run()), np.random.default_rng(0), 0
    for name in ("L0H1.parquet", "L1H0.parquet"):
        file = tmp_path / name
        good = file.read_bytes()
        for _ in range(FLIPS):
            file.write_bytes(flipped(good, draw))
            try:
                # A bit that says nothing of the table.
                assert tj.ngrams.NgramTable.load(file).digest in expected.values()
            except ValueError as error:
                refused += name in str(error)
                damaged = file.read_bytes()
        file.write_bytes(damaged)
        assert name in refuses(run, file)
        file.write_bytes(good)
    assert refused > FLIPS


def test_what_cannot_be_written_is_refused_before_the_sweep(tmp_path, monkeypatch):
    def never(*given: Any) -> None:
        raise AssertionError("the vocabulary was read")

    monkeypatch.setattr(VocabularyStreams, "states", never)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    long, options = "x" * 250, {"top_k": 3, "progress": False}
    for file in ("nowhere/a.parquet", "file/a.parquet", "folder", f"{long}.parquet"):
        with pytest.raises(
            OSError, match=r"(cannot be written|is no regular file).*(Make the directory|Save elsewhere)"
        ):
            tj.jet_bigrams(model(), **options, save=tmp_path / file)
    with pytest.raises(OSError, match="cannot be written"):
        sweep([bigram_job(model(), name=long, **options)], tmp_path)
    with pytest.raises(OSError, match=r"file"):
        tj.ngrams.jet_bigrams_by_path(model(), **options, folder=tmp_path / "file")
    with pytest.raises(OSError, match=r"file"):
        tj.jet_trigrams(model(), 0, 0, **options, folder=tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]  # nothing temporary is left
