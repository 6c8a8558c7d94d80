"""Tables that do not fit are refused before the sweep, by an estimate that holds; nobody makes records that were not asked for."""

from __future__ import annotations

import json
from typing import Any

import live_memory
import pytest
import torch
from commands import run, share_models, tinydocs

import tl_jets as tj
from tl_jets.cli import ngrams as command
from tl_jets.cli import session
from tl_jets.core import free_memory
from tl_jets.ngrams import bigram_sweep, trigrams
from tl_jets.ngrams.streams import VocabularyStreams

V = 1000


def toy() -> tj.CallableModel:
    source = torch.Generator().manual_seed(0)
    decoder = tj.Decoder(tj.Norm("RMS"), torch.randn(8, V, generator=source), torch.randn(V, generator=source))
    embed = torch.nn.Embedding.from_pretrained(torch.randn(V, 8, generator=source))
    return tj.CallableModel(embed, [{"0_mlp": torch.tanh}], decoder)


@pytest.fixture
def asked(monkeypatch):
    """What is asked to fit."""
    found: list[int] = []
    for module in (bigram_sweep, trigrams):
        monkeypatch.setattr(module, "check_fits", lambda n_bytes, *words: found.append(n_bytes))
    return found


PATHS = ["direct", "0_mlp", "mlps"]
SWEEPS: dict[str, Any] = {
    "rows": lambda: tj.ngrams.jet_bigrams_by_path(toy(), PATHS, top_k=400, per="row", progress=False),
    "one path": lambda: tj.jet_bigrams(toy(), top_k=V, per="row", progress=False),
    "more than there are": lambda: tj.jet_bigrams(toy(), top_k=10**30, per="row", progress=False),
    "all pairs": lambda: tj.ngrams.jet_bigrams_by_path(toy(), PATHS, top_k=V * V, progress=False),
    "few of them": lambda: tj.jet_bigrams(toy(), top_k=20_000, rows=range(200), progress=False),
    "skip-trigrams": lambda: tj.jet_trigrams(tinydocs(), 1, 0, top_k=100_000, rows=range(500), progress=False),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_the_estimate_holds(name, asked):
    peak = live_memory.peak_bytes(SWEEPS[name])
    assert len(asked) == 1 and peak < 1.05 * asked[0] + 32e6  # of rows that are read at a time, whatever comes out
    assert asked[0] < 2 * peak


def test_what_does_not_fit_is_refused_before_the_sweep(capsys, monkeypatch):
    share_models(monkeypatch)

    def never(*given: Any) -> None:
        raise AssertionError("the vocabulary was read")

    monkeypatch.setattr(free_memory, "free_bytes", lambda: 3 * 2**30)
    model = tinydocs()
    with monkeypatch.context() as patch:
        patch.setattr(VocabularyStreams, "states", never)
        with pytest.raises(ValueError, match=r"16,777,216 bi-grams .* 3 GiB is left; it takes about 6\.75 GiB"):
            tj.ngrams.jet_bigrams_by_path(model, [*PATHS, "1_mlp", "2_mlp", "3_mlp"], per="row", top_k=100_000)
        for options in (("--per", "row", "--top-k", "100000"), ("--per", "row", "--top-k", "4000", "--json", "-")):
            error = run(capsys, "ngrams", *options, status=2)
            assert "must fit in memory, of which 3 GiB is left" in error and "Take a smaller top_k" in error
    with pytest.raises(ValueError, match="best skip-trigrams of 4 heads must fit in memory"):
        tj.jet_trigrams(model, 1, top_k=10**9)
    monkeypatch.setattr(free_memory, "free_bytes", lambda: None)
    assert len(tj.jet_bigrams(model, per="row", rows=[1], top_k=10**30)) == 4096


def test_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(free_memory, "_of_system", lambda: 900)
    monkeypatch.setattr(free_memory, "GROUP", tmp_path)
    assert free_memory.free_bytes() == 900  # no group
    for name, text in (("max", "1000\n"), ("current", "700\n"), ("stat", "anon 5\ninactive_file 30\nfile 4\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory.free_bytes() == 330
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory.free_bytes() == 900
    monkeypatch.undo()
    left = free_memory.free_bytes()
    assert left is None or left > 2**20


def test_records_are_made_for_json_only_and_one_after_another(capsys, monkeypatch, tmp_path):
    share_models(monkeypatch)
    made, frames = [], []
    records, to_frame = command._records, tj.ngrams.NgramTable.to_dataframe

    def counted(table: tj.ngrams.NgramTable) -> Any:
        for record in records(table):
            made.append(1)
            yield record

    def framed(self: tj.ngrams.NgramTable, **options: Any) -> Any:
        frames.append(len(self))
        return to_frame(self, **options)

    monkeypatch.setattr(command, "_records", counted)
    monkeypatch.setattr(tj.ngrams.NgramTable, "to_dataframe", framed)
    asked = ("ngrams", "--path", "mlps", "--per", "row", "--top-k", "2")
    files = ("--save", str(tmp_path / "a.parquet"), "--html", str(tmp_path / "a.html"))
    text = run(capsys, *asked, *files)
    assert not made and max(frames, default=0) <= 1000 and "8,172 more" in text
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "7,192 more rows" in page and "8,192 n-grams" in page

    ahead, written, write = 0, 0, session.write

    def followed(file: str, text: Any) -> None:
        def parts() -> Any:
            nonlocal ahead, written
            for part in text:
                ahead = max(ahead, len(made) - written)
                written += part.count('"ids"')
                yield part

        write(file, parts())

    monkeypatch.setattr(session, "write", followed)
    run(capsys, *asked, "--json", str(tmp_path / "a.json"))
    assert len(made) == written == 8192 and ahead <= 1
    rows = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["tables"]["mlps"]["rows"]
    assert [row["ids"] for row in rows] == tj.ngrams.NgramTable.load(tmp_path / "a.parquet").ids.tolist()
    wide = run(capsys, "ngrams", "--path", "direct", "--top-k", "1500")
    assert "500 more" in wide and len(wide.splitlines()) < 1100
