"""What is true of results of every kind: files, pickles, foreign and newer files by name, `concat` or its refusal."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import sys
from dataclasses import fields, replace
from typing import Any

import pandas as pd
import pytest
import torch
from every_result import another, classes_of, every_result, same
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tl_jets as tj
from tl_jets.core.averages import Averaged
from tl_jets.core.results import Result, _digest

KINDS = [
    *("AblationCheck", "AblationEffect", "AblationJet", "BlockNorms", "Circuit", "CircuitFaithfulness", "Contrast"),
    *(
        "DetachedJacobian",
        "DetachedSpectra",
        "FirstOrderEffects",
        "Flow",
        "HeadScores",
        "Interactions",
        "IterativeJetLens",
        "JetCache",
    ),
    *(
        "JointFlow",
        "JointJetLens",
        "Mass",
        "MassChange",
        "Measures",
        "ModelDiff",
        "NgramTable",
        "PatchingComparison",
        "PathCache",
    ),
    *(
        "PathStatistics",
        "Promoters",
        "Roles",
        "SimplexSolution",
        "SingularVectors",
        "Sinks",
        "Sketch",
        "TextComparison",
        "TraceValues",
    ),
    *("Track", "UntrainedTokens", "Verdict"),
]


@pytest.fixture(params=KINDS)
def result(request: Any) -> Any:
    """One result of each kind."""
    return next(own for kind, own in every_result().items() if kind.__name__ == request.param)


def test_every_kind_is_here():
    made = set(every_result())  # first, for it imports what is loaded on first use
    ours = {kind for kind in classes_of(Result) if getattr(sys.modules[kind.__module__], kind.__name__, None) is kind}
    ours = {kind for kind in ours if kind.__module__.startswith("tl_jets.")}  # a test may have made a class of its own
    assert sorted(kind.__name__ for kind in ours) == KINDS and ours == made


def test_it_comes_back_from_files_and_pickles(result, tmp_path):
    stream = io.BytesIO()
    torch.save(result, stream)
    stream.seek(0)
    loaded = tj.load(result.save(tmp_path / "result"))
    pickled = [pickle.loads(pickle.dumps(result)), torch.load(stream, weights_only=False)]
    is_of_model = any(
        field.metadata.get("handle") and getattr(result, field.name) is not None for field in fields(result)
    )
    if type(result).__name__ == "DetachedJacobian":  # what the map gives is in files, and computed on request before
        result = replace(result, parts=result.contributions)
    for found in (loaded, *pickled, tj.load(loaded.save(tmp_path / "again"))):
        assert same(found, result)
        like = loaded if is_of_model else result  # some results decode more while their model is there
        assert repr(found) == repr(like)
        if hasattr(result, "to_dataframe") and type(result).__name__ != "PathCache":  # which needs the model
            pd.testing.assert_frame_equal(found.to_dataframe(), like.to_dataframe())
    changed = None if isinstance(result, tj.ngrams.NgramTable) else another(result)
    assert changed is None or not same(changed, result), "the comparison sees a tensor"


def test_its_file_is_written_wholly_or_not_at_all(result, tmp_path, monkeypatch):
    file = tmp_path / "result"
    file.write_bytes(b"old")

    def fail(*args: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        result.save(file)
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["result"]


def test_a_newer_damaged_or_foreign_file_is_refused_by_name(result, tmp_path):
    file = result.save(tmp_path / "file.tl")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"file\.tl"):
        tj.load(file)
    if isinstance(result, tj.ngrams.NgramTable):  # a Parquet file: tests/ngrams/test_tables.py
        return
    file.write_bytes(whole)
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["tl_jets"])
    tensors = load_file(file)
    about["tl_jets"], about["result"]["fields"]["hue"] = "9.8.7", 1
    text = json.dumps(about)
    own = {name: values for name, values in tensors.items() if name}
    save_file(tensors, file, metadata={"tl_jets": text, "digest": _digest(text, own)})
    said = rf"file\.tl' was written by tl-jets 9\.8\.7; .* \['hue'\] of its {re.escape(type(result).__name__)}"
    with pytest.raises(ValueError, match=said):
        tj.load(file)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"file\.tl' .*of another program"):
        tj.load(file)


def test_it_is_concatenated_or_refused_by_name(result):
    if not isinstance(result, Averaged):
        with pytest.raises(TypeError, match=rf"got {type(result).__name__}\.|Type-check error"):
            tj.concat([result, result])
        return
    found = tj.concat([result, result])
    assert type(found) is type(result) and len(found.tokens) == 2 * len(result.tokens)
    values, wanted = (table.to_dataframe() for table in (found, pickle.loads(pickle.dumps(result))))
    numbers = [column for column in wanted.columns if column != "batch" and wanted[column].dtype.kind == "f"]
    assert len(values) == 2 * len(wanted)
    for column in numbers:
        assert sorted(values[column].fillna(7)) == sorted([*wanted[column].fillna(7)] * 2), column


def test_tables_within_results_follow_one_another():
    flow = next(own for kind, own in every_result().items() if kind.__name__ == "Flow")
    found = tj.concat([flow, flow], rows=[[3, 1], [0, 2]])
    for places, own in (({0: 3, 1: 1}, 0), ({0: 0, 1: 2}, 1)):
        half = found.check.iloc[len(flow.check) * own :][: len(flow.check)].reset_index(drop=True)
        pd.testing.assert_frame_equal(half, flow.check.assign(batch=flow.check["batch"].map(places)))
    assert set(found.check["batch"]) <= {0, 1, 2, 3} and len(found.agreement()) > 0
    from dataclasses import replace

    with pytest.raises(ValueError, match="check must be equal in all results; got DataFrame and None"):
        tj.concat([flow, replace(flow, check=None)])
    with pytest.raises(ValueError, match="check must have the same columns, batch among them"):
        tj.concat([flow, replace(flow, check=flow.check.drop(columns="batch"))])
