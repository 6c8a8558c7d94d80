"""Tables of n-grams: rows, lookups, files that are whole or refused."""

from __future__ import annotations

import json
import os
import stat
from importlib.metadata import version

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tl_jets.core.logit_reader import rank, rounded
from tl_jets.core.tokens import token_names
from tl_jets.ngrams import tables
from tl_jets.ngrams.tables import NgramTable, side_by_side

NAMES = {0: " at", 1: "at", 2: "\n", 3: "<b>&'\"|`", 4: "\ufffd", 5: "\ufffd", 6: " least", 7: "", 8: "at "}


def table(rows=12, n=2, seed=0, **options):
    """Random n-grams over nine awkward tokens, with two parts."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 9, (rows, n), generator=source)
    draw = torch.randn(3, rows, generator=source, dtype=torch.float64)
    defaults = {
        "names": NAMES | {99: "elsewhere"},
        "path": "0_mlp > 2_mlp",
        "settings": {"score": "logit", "top_k": rows, "rows": {"count": 3}, "shape": (1, 2)},
        "fingerprint": "f" * 64,
        "parts": {"log_normalizer": draw[1], "attention": draw[2]},
    }
    return NgramTable.ranked(ids, draw[0], **defaults | options)


def test_ranked_sorts_by_score_and_ids():
    ids = torch.tensor([[3, 1], [2, 9], [2, 4], [0, 0], [5, 5]])
    scores = torch.tensor([-1.0, -1.0, -1.0 - 1e-14, -0.5, -2.0], dtype=torch.float64)
    found = NgramTable.ranked(ids, scores, names={i: str(i) for i in range(10)}, path="direct", top_k=4)
    assert found.ids.tolist() == [[0, 0], [2, 4], [2, 9], [3, 1]]
    assert found.scores.tolist() == [-0.5, -1.0 - 1e-14, -1.0, -1.0]
    tiny = torch.tensor([-1e-13, -1e-15, -1e-14], dtype=torch.float64)  # near zero, digits are digits
    assert rank(torch.arange(3)[:, None], tiny).tolist() == [1, 2, 0]
    assert torch.allclose(rounded(tiny), tiny, rtol=2**-40, atol=0)


def test_columns_and_conditions():
    found = table(40)
    frame = found.to_dataframe()
    columns = ["id_1", "id_2", "token_1", "token_2", "score", "log_normalizer", "attention"]
    assert list(frame.columns) == columns
    assert (frame["token_1"] == frame["id_1"].map(NAMES)).all()
    assert frame["score"].is_monotonic_decreasing
    for condition, expected in [
        ({"id_1": 3}, frame["id_1"] == 3),
        ({"id_2": [3, 5, 77]}, frame["id_2"].isin([3, 5])),
        ({"token_2": "\ufffd"}, frame["id_2"].isin([4, 5])),
        ({"token_1": "at", "min_score": 0}, (frame["id_1"] == 1) & (frame["score"] >= 0)),
        ({"token_1": "least", "max_score": 1.0}, (frame["id_1"] == 6) & (frame["score"] <= 1)),
        ({"token_1": ["nowhere"]}, frame["id_1"] < 0),
    ]:
        where = found.where(**condition).to_dataframe()
        pd.testing.assert_frame_equal(where, frame[expected].reset_index(drop=True), check_dtype=False)
    assert found["at"].ids[:, 0].unique().tolist() == [1]  # an exact match comes before " at"
    assert found["least"].digest == found[" least"].digest == found[6].digest
    assert "least" in found and 6 in found and "nowhere" not in found and None not in found
    assert len(found[3:5]) == 2 and found[3:5].scores.tolist() == frame["score"][3:5].tolist()
    assert found[::3].scores.tolist() == frame["score"][::3].tolist()


def test_what_is_not_there_is_said():
    names = {0: " the", 1: "The", 2: "the", 3: " than", 4: "<b>", 5: "cat"}
    ids = torch.tensor([[0, 3], [1, 3], [5, 2], [4, 5]])
    found = NgramTable.ranked(ids, -torch.arange(4.0), names=names, path="direct")
    # "the" is the name of a second token; as a first token there is only " the".
    assert found["the"].ids.tolist() == [[0, 3]] and not found["the"].note and not found[" the"].note
    assert found.where(token_2="the").ids.tolist() == [[5, 2]] and found.where(token_2=" the").note
    for key, note in [
        ("THE", "none of these 4 bi-grams has 'THE' as token_1; ' the', 'The' is a token_1; 'the' is a token_2"),
        ("than", "none of these 4 bi-grams has 'than' as token_1; ' than' is a token_2"),
        (" cat", "none of these 4 bi-grams has ' cat' as token_1; 'cat' is a token_1; 'cat' is a token_2"),
        ("dog", "none of these 4 bi-grams has 'dog' as token_1"),
        (77, "none of these 4 bi-grams has id 77 as token_1"),
    ]:
        empty = found[key]
        assert len(empty) == 0 and empty.note == note and key not in found
        assert repr(empty) == f"NgramTable(0 bi-grams by log-probability; path direct): {note}"
    assert "&lt;B&gt;" in found["<B>"]._repr_html_() and "<B>" not in found["<B>"]._repr_html_()
    # Among others that are there, too; in every place; and nothing is said where single conditions are met.
    some = found.where(token_1=["The", "teh"], id_2=[3, 77])
    assert some.ids.tolist() == [[1, 3]] and some.note == "none of these 4 bi-grams has 'teh' as token_1"
    assert repr(some[:1]).splitlines()[0].endswith(some.note) and some.digest == found["The"].digest
    assert found.where(token_1="cat", token_2="cat").note == "" and found.where(min_score=1.0).note == ""
    assert found["teh"]["cat"].note == found["teh"].note == "none of these 4 bi-grams has 'teh' as token_1"
    assert found.where(id_2=list(range(90, 99))).note.endswith("id 92 as token_2; 6 more are not there")


def test_errors(as_users_run_it):
    with pytest.raises(ValueError, match="one of \\['id_1'"):
        table().where(token_3="at")
    with pytest.raises(TypeError, match="float"):
        table()[0.5]
    with pytest.raises(TypeError, match="not iterated"):
        list(table())
    with pytest.raises(ValueError, match="have a name; \\[7\\]"):
        NgramTable(torch.tensor([[7]]), torch.zeros(1), {}, "direct")
    with pytest.raises(ValueError, match="scores \\[row\\]"):
        NgramTable(torch.tensor([7]), torch.zeros(1), {7: ""}, "direct")
    with pytest.raises(ValueError, match="name of its own; got 'score'"):
        NgramTable(torch.tensor([[7]]), torch.zeros(1), {7: ""}, "direct", parts={"score": torch.zeros(1)})
    for settings in ({"x": torch.zeros(1)}, {"x": float("nan")}):
        with pytest.raises(ValueError, match="plain JSON"):
            NgramTable(torch.tensor([[7]]), torch.zeros(1), {7: ""}, "direct", settings)


def test_printing_escapes_tokens():
    found = table(30)
    text = repr(found)
    assert text.startswith("NgramTable(30 bi-grams by logit; path 0_mlp > 2_mlp; model ffffffffffff)\n")
    assert len(text.splitlines()) == 1 + 1 + 10 + 1 and text.endswith("... 20 more")
    assert "\\n" in repr(found[2]) and "\u2205" in repr(found[7])
    html = found._repr_html_()
    assert "<b>" not in html and "&lt;b&gt;&amp;" in html
    assert "0_mlp &gt; 2_mlp" in html
    assert repr(found[:0]) == "NgramTable(0 bi-grams by logit; path 0_mlp > 2_mlp; model ffffffffffff)"
    assert "tri-grams by log-probability" in repr(table(n=3, settings={}))


def test_side_by_side():
    short = NgramTable.ranked(torch.tensor([[0, 6]]), torch.tensor([-1.5]), names=NAMES, path="direct")
    frame = side_by_side({"direct": short, "deep": table(5)}, 3, scores=True)
    assert list(frame.columns) == ["direct", "direct score", "deep", "deep score"]
    assert frame.index.tolist() == [0, 1, 2]
    assert frame["direct"].tolist() == ["\u00b7at \u00b7least", "", ""]
    assert frame["direct score"][0] == -1.5 and np.isnan(frame["direct score"][1])
    assert frame["deep score"].tolist() == table(5).scores[:3].tolist()


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("rows", [0, 1, 500])
def test_a_file_gives_back_the_table(tmp_path, rows, n):
    saved = table(rows, n)
    file = saved.save(tmp_path / "table.parquet")
    loaded = NgramTable.load(file)
    assert loaded.digest == saved.digest
    assert loaded.header == saved.header
    assert loaded.settings["shape"] == [1, 2]
    assert torch.equal(loaded.ids, saved.ids) and torch.equal(loaded.scores, saved.scores)
    assert list(loaded.parts) == ["log_normalizer", "attention"] and loaded.names == saved.names
    pd.testing.assert_frame_equal(pd.read_parquet(file), saved.to_dataframe(), check_dtype=False)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~_umask()


def _umask():
    value = os.umask(0)
    os.umask(value)
    return value


def test_tables_differ_by_any_of_their_contents():
    same = table()
    assert same.digest == table().digest
    others = [
        table(seed=1),
        table(path="direct"),
        table(fingerprint=""),
        table(settings={}),
        table(names=NAMES | {0: "of"}),
        table(parts={}),
        same[:11],
    ]
    assert len({same.digest, *(other.digest for other in others)}) == 8


def test_truncated_and_damaged_files_are_refused(tmp_path):
    file = table(50).save(tmp_path / "table.parquet")
    whole, digest = file.read_bytes(), table(50).digest
    for length in range(0, len(whole), 97):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated, damaged or something else"):
            NgramTable.load(file)
    draw = np.random.default_rng(0)
    refused = 0
    for position in draw.choice(len(whole), 300, replace=False):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(draw.integers(8))
        file.write_bytes(damaged)
        try:
            assert NgramTable.load(file).digest == digest  # a bit that says nothing of the table
        except ValueError:
            refused += 1
    assert refused > 150


def test_foreign_files_are_refused(tmp_path):
    file = tmp_path / "foreign.parquet"
    pd.DataFrame({"id_1": [1], "score": [0.5]}).to_parquet(file)
    with pytest.raises(ValueError, match="Parquet file of something else"):
        NgramTable.load(file)
    file.write_text("id_1,score\n1,0.5\n")
    with pytest.raises(ValueError, match="something else"):
        NgramTable.load(file)
    with pytest.raises(FileNotFoundError, match="none at"):
        NgramTable.load(tmp_path / "absent.parquet")
    with pytest.raises(FileNotFoundError, match="none at"):
        NgramTable.load(tmp_path)


def test_edited_files_are_refused(tmp_path):
    file = table().save(tmp_path / "table.parquet")
    original = pq.read_table(file)

    def rewritten(change):
        about = json.loads(original.schema.metadata[tables.METADATA_KEY])
        found = change(original, about) or original
        pq.write_table(found.replace_schema_metadata({tables.METADATA_KEY: json.dumps(about).encode()}), file)

    rewritten(lambda found, about: None)
    assert NgramTable.load(file).digest == table().digest
    for change, message in [
        (lambda found, about: about.update(path="direct"), "was changed"),
        (lambda found, about: about.update(version=2), "version 2 of the format"),
        (lambda found, about: about.pop("settings") and None, "lacks what a table must have"),
        (lambda found, about: found.drop_columns(["score"]), "lacks what a table must have"),
        (lambda found, about: found.drop_columns(["id_2"]), "lacks what a table must have"),
        (lambda found, about: found.slice(0, 5), "was changed"),
        (lambda found, about: found.set_column(4, "score", pa.array(np.zeros(12))), "was changed"),
    ]:
        rewritten(change)
        with pytest.raises(ValueError, match=message):
            NgramTable.load(file)


FOREIGN = {
    "a list": [1, 2],
    "a text": "mlps",
    "a number": 1,
    "deeply nested": "[" * 100_000,
    "no JSON": "{version: 1",
    "no text": b"\xff\xfe",
    "nothing": {},
    "the version only": {"version": 1},
    "no digest": {"version": 1, "path": "mlps", "settings": {}, "fingerprint": ""},
    "settings of a list": {"version": 1, "path": "mlps", "settings": [1], "fingerprint": "", "digest": ""},
    "settings of a number": {"version": 1, "path": "mlps", "settings": 7, "fingerprint": "", "digest": ""},
    "settings that are deep": '{"version": 1, "path": "", "fingerprint": "", "digest": "", "settings": {"a": %s}}'
    % ("[" * 900 + "]" * 900),
    "a later version": {"version": 2, "tl_jets": "9.1"},
    "other types": {"version": 1, "path": 5, "settings": {}, "fingerprint": None, "digest": 7},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_metadata_is_refused(tmp_path, name, as_users_run_it):
    about, file = FOREIGN[name], table().save(tmp_path / "table.parquet")
    encoded = about if isinstance(about, (str, bytes)) else json.dumps(about)
    if name == "a text":
        encoded = json.dumps(about)
    pq.write_table(pq.read_table(file).replace_schema_metadata({tables.METADATA_KEY: encoded}), file)
    with pytest.raises(ValueError, match=r"'.*table\.parquet'.*(again|pandas|Install)") as caught:
        NgramTable.load(file)
    assert len(str(caught.value)) < 700
    if name == "a later version":
        assert "Install tl-jets 9.1." in str(caught.value)


def test_foreign_columns_are_refused(tmp_path, as_users_run_it):
    file = table(n=2).save(tmp_path / "table.parquet")
    original = pq.read_table(file)
    ids = original.column("id_1").to_numpy()
    for name, values in {
        "id_1": pa.array(ids.astype(float)),
        "id_2": pa.array([None, *ids[1:]]),
        "token_1": pa.array([None] * len(ids), pa.string()),
        "token_2": pa.array(ids),
        "score": pa.array(["best"] * len(ids)),
        "attention": pa.array([[1.0]] * len(ids)),
    }.items():
        pq.write_table(original.set_column(original.column_names.index(name), name, values), file)
        with pytest.raises(ValueError, match=r"lacks what a table must have|was changed"):
            NgramTable.load(file)
    pq.write_table(original.append_column("id_1", pa.array(ids)), file)
    with pytest.raises(ValueError, match="lacks what a table must have"):
        NgramTable.load(file)


def test_a_file_says_which_version_wrote_it(tmp_path):
    file = table().save(tmp_path / "table.parquet")
    assert json.loads(pq.read_schema(file).metadata[tables.METADATA_KEY])["tl_jets"] == version("tl-jets")


def test_what_is_no_table_is_refused(as_users_run_it):
    ids, scores, names = torch.tensor([[0, 1], [1, 2]]), torch.tensor([-1.0, -2.0]), {0: "a", 1: "b", 2: "c"}
    for make in (NgramTable, lambda *given: NgramTable.ranked(*given[:2], names=given[2], path=given[3])):
        for wrong in (ids.float(), ids.bool()):
            with pytest.raises(ValueError, match="ids must be whole numbers, token ids; got torch"):
                make(wrong, scores, names, "direct")
        with pytest.raises(ValueError, match="those of 1 of 2 rows are NaN"):
            make(ids, torch.tensor([-1.0, torch.nan]), names, "direct")
        with pytest.raises(ValueError, match="names of ids must be texts; id 1 has 7"):
            make(ids, scores, names | {1: 7}, "direct")
        assert make(ids, torch.tensor([-1.0, -torch.inf]), names, "direct").scores[1] == -torch.inf


def test_lone_surrogates_are_written_as_their_escapes(tmp_path):
    names = {0: "\ud800", 1: " a\udc80b", 2: "\U0001f600"}
    found = NgramTable.ranked(torch.tensor([[0, 1], [2, 2]]), torch.tensor([-1.0, -2.0]), names=names, path="direct")
    frame = found.to_dataframe()
    assert frame["token_1"].tolist() == ["\\ud800", "\U0001f600"] and frame["token_2"][0] == " a\\udc80b"
    assert NgramTable.load(found.save(tmp_path / "table.parquet")).digest == found.digest
    assert len(found.where(token_2=" a\\udc80b")) == 1

    class Tokenizer:
        def decode(self, ids):
            return "".join(names[token] for token in ids)

    assert token_names(Tokenizer(), [torch.tensor([0, 1, 2])]) == {0: "\\ud800", 1: " a\\udc80b", 2: "\U0001f600"}


def test_a_table_is_saved_in_parts(tmp_path, monkeypatch):
    expected = table(500, 3)
    monkeypatch.setattr(tables, "SAVED_ROWS", 64)
    monkeypatch.setattr(NgramTable, "to_dataframe", None)
    file = expected.save(tmp_path / "table.parquet")
    assert NgramTable.load(file).digest == expected.digest and pq.ParquetFile(file).num_row_groups == 8


def test_saving_is_atomic(tmp_path, monkeypatch):
    file = table().save(tmp_path / "table.parquet")

    def fails(stream, *args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        table(seed=1).save(file)
    assert NgramTable.load(file).digest == table().digest
    assert list(tmp_path.iterdir()) == [file]
    monkeypatch.undo()
    assert NgramTable.load(table(seed=1).save(file)).digest == table(seed=1).digest
    with pytest.raises(FileNotFoundError):
        table().save(tmp_path / "absent" / "table.parquet")
