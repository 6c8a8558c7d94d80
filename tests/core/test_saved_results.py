"""Results in files: every kind of field comes back as it was; what is damaged or foreign is refused."""

from __future__ import annotations

import io
import json
import pickle
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import tl_jets as tj
from tl_jets.core.measures import Measures
from tl_jets.core.results import Result, handle


@dataclass(frozen=True, eq=False)
class Everything(Result):
    """A field of every kind."""

    numbers: Tensor
    by_path: dict[str, Tensor]
    by_index: dict[Any, Any]
    labels: list[str]
    nothing: None
    rest: tuple[Any, ...]
    table: pd.DataFrame
    inner: Result | None = None
    model: Any = handle()


# `load` makes classes of this package only.
Everything.__module__ = "tl_jets.core.results"


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setattr("tl_jets.core.results.Everything", Everything, raising=False)
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randn(3, 4, generator=draw, dtype=torch.float64)
    numbers[0, 0], numbers[1, 1] = torch.nan, -torch.inf
    inner = Everything(numbers.bfloat16(), {}, {}, [], None, (), pd.DataFrame({"x": [1.5]}))
    result = Everything(
        numbers=numbers.T,  # not contiguous
        by_path={"embed > 0_mlp": numbers[0], "the same memory": numbers},
        by_index={7: "�", (1, "a"): numbers > 0, "none": torch.zeros(0, 5, dtype=torch.int64)},
        labels=[" Paris", "</script>", ""],
        nothing=None,
        rest=(1, 2.5, True, [None, float("inf")]),
        table=pd.DataFrame({"token": [" a", "b"], "logit": [0.1, np.nan], "pos": [3, 4]}),
        inner=inner,
        model=torch.nn.Linear(2, 2),
    )
    return result, result.save(tmp_path / "result.safetensors")


def test_every_field_comes_back(saved):
    result, file = saved
    loaded = tj.load(file)
    assert type(loaded) is Everything and loaded.model is None and loaded.nothing is None
    for name in ("labels", "rest"):
        assert getattr(loaded, name) == getattr(result, name) and type(getattr(loaded, name)) is type(
            getattr(result, name)
        )
    assert list(loaded.by_path) == list(result.by_path) and list(loaded.by_index) == list(result.by_index)
    for found, wanted in [
        (loaded.numbers, result.numbers),
        (loaded.inner.numbers, result.inner.numbers),
        *zip(loaded.by_path.values(), result.by_path.values(), strict=True),
        *((loaded.by_index[key], result.by_index[key]) for key in [(1, "a"), "none"]),
    ]:
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert torch.equal(torch.nan_to_num(found.float()), torch.nan_to_num(wanted.float()))
        assert torch.equal(found.isnan(), wanted.isnan())
    pd.testing.assert_frame_equal(loaded.table, result.table)
    pd.testing.assert_frame_equal(loaded.inner.table, result.inner.table)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_pickles_hold_every_field_but_no_model(saved, how):
    """`pickle` and `torch.save` give a result whose file has the digest of the first one's: of all tensors and fields."""
    result, file = saved
    if how == "pickle":
        copy = pickle.loads(pickle.dumps(result))
    else:
        stream = io.BytesIO()
        torch.save(result, stream)
        stream.seek(0)
        copy = torch.load(stream, weights_only=False)
    assert copy.model is None and result.model is not None
    about = []
    for path in (file, copy.save(file.with_name("copy"))):
        with safe_open(path, "pt") as opened:
            about.append(opened.metadata())
    assert about[0] == about[1] and len(about[0]["digest"]) == 64


def test_a_result_moves_with_all_its_tensors_and_without_its_model(saved):
    moved = saved[0].to("meta")
    assert {
        x.device.type
        for x in [moved.numbers, moved.by_path["embed > 0_mlp"], moved.by_index[1, "a"], moved.inner.numbers]
    } == {"meta"}
    assert moved.model is saved[0].model and moved.model.weight.device.type == "cpu"


def test_one_flipped_bit_is_refused(saved):
    file = saved[1]
    good, draw = file.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        changed = bytearray(good)
        changed[int(draw.integers(len(good)))] ^= 1 << int(draw.integers(8))
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=r"`load` reads what `save` of a result wrote; .*result\.safetensors"):
            tj.load(file)
    file.write_bytes(good)
    assert tj.load(file).labels == saved[0].labels


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x00" * 64, b"{}", b"\xff" * 9])
def test_foreign_files_are_refused(tmp_path, data):
    file = tmp_path / "foreign"
    file.write_bytes(data)
    with pytest.raises(ValueError, match="something else, or damaged"):
        tj.load(file)
    for metadata in ({"format": "pt"}, None):
        save_file({"weight": torch.zeros(2)}, file, metadata=metadata)
        with pytest.raises(
            ValueError, match=r"damaged \(a safetensors file of another program, without tl-jets metadata"
        ):
            tj.load(file)


def test_what_a_newer_version_wrote_is_named(saved):
    """A field more, here in an inner result, or another format; digest and version are the writer's."""
    from tl_jets.core.results import _digest

    file, this = saved[1], version("tl-jets")
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["tl_jets"])
    tensors = load_file(file)

    def written(change):
        newer = json.loads(json.dumps(about)) | {"tl_jets": "9.8.7"}
        change(newer)
        text = json.dumps(newer)
        save_file(tensors, file, metadata={"tl_jets": text, "digest": _digest(text, tensors)})
        return tj.load(file)

    assert written(lambda newer: None).labels == saved[0].labels
    said = rf"result\.safetensors' was written by tl-jets 9\.8\.7; this is {re.escape(this)}, which does not know "
    for change, unknown in [
        (
            lambda newer: newer["result"]["fields"]["inner"]["fields"].update(hue=1),
            r"the fields \['hue'\] of its Everything",
        ),
        (lambda newer: newer["result"]["fields"].update(b=1, a=[2]), r"the fields \['a', 'b'\] of its Everything"),
        (lambda newer: newer.update(format=2), "its format 2"),
        (
            lambda newer: newer["result"].update(result=["tl_jets.nowhere", "X"]),
            r"its kind of result, tl_jets\.nowhere\.X",
        ),
        (
            lambda newer: newer["result"].update(result=["tl_jets.core.measures", "Nothing"]),
            r"its kind of result, tl_jets\.core\.measures\.Nothing",
        ),
    ]:
        with pytest.raises(ValueError, match=f"{said}{unknown}. Update tl-jets"):
            written(change)


@pytest.mark.parametrize("named", [["os", "system"], ["tl_jets.core.decoder", "Decoder"]])
def test_only_results_are_made(tmp_path, named):
    """A file that names another class, with a digest that is right."""
    from tl_jets.core.results import _digest

    about = json.dumps({"format": 1, "tl_jets": "0", "result": {"result": named, "fields": {}}})
    header = {"tl_jets": about, "digest": _digest(about, {})}
    save_file({"": torch.zeros(0)}, tmp_path / "file", metadata=header)
    with pytest.raises(ValueError, match="something else, or damaged"):
        tj.load(tmp_path / "file")


def test_what_cannot_be_saved_is_named_before_a_file_is_touched(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    result = Everything(torch.zeros(1), {}, {"a": {"b": torch.nn.ReLU()}}, [], None, (), pd.DataFrame())
    with pytest.raises(TypeError, match=r"result\.by_index\[a\]\[b\] is a ReLU"):
        result.save(file)
    assert file.read_bytes() == b"old"


def test_a_table_of_n_grams_is_loaded_too(tmp_path):
    table = tj.jet_bigrams(tj.load_tinydocs(), top_k=3, rows=[1, 2])
    table.save(tmp_path / "table.parquet")
    assert tj.load(tmp_path / "table.parquet").digest == table.digest


def test_measures(tmp_path):
    lens = tj.iterative_jet_lens(tj.load_tinydocs(), ["This function is", "A list of"])
    loaded = tj.load(lens.measures.save(tmp_path / "measures"))
    assert type(loaded) is Measures
    for name, values in lens.measures.items():
        torch.testing.assert_close(getattr(loaded, name), values, equal_nan=True, atol=0, rtol=0)
