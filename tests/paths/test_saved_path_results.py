"""Results of paths, lenses and interventions come back from files as they were, and know their tokens without a model."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest
import torch
import zoo

import tl_jets as tj
from tl_jets import ResidualNetwork
from tl_jets.core.results import Result


def assert_same(found, wanted, name: str) -> None:
    """Every field equal, in tensors, labels, tables, and other results."""
    assert type(found) is type(wanted), name
    if isinstance(wanted, Result):
        for field in dataclasses.fields(wanted):
            if not field.metadata.get("handle"):
                assert_same(getattr(found, field.name), getattr(wanted, field.name), f"{name}.{field.name}")
    elif isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    else:
        assert found == wanted, name


RESULTS = {
    "lengths": lambda net, trace: tj.path_lengths(net, trace, targets=[3, 5]),
    "sources": lambda net, trace: tj.path_sums(net, trace, by="source"),
    "paths": lambda net, trace: tj.exponential_expansion(net, linearize="detached", top=5)(trace).statistics(),
    "interactions": lambda net, trace: tj.paths.interactions(net, trace, positions=[0, -1]),
    "ablations": lambda net, trace: tj.ablation_effect(net, trace, targets=[3, 5]),
    "path ablations": lambda net, trace: tj.path_ablation(net, trace, "embed > 0_mlp > ln_final"),
    "iterative": lambda net, trace: tj.iterative_jet_lens(net, trace, targets=[3]),
    "iterative, bare": lambda net, trace: tj.iterative_jet_lens(net, trace, measures=False),
    "joint": lambda net, trace: tj.joint_jet_lens(net, trace, order=1),
    "joint, detached": lambda net, trace: tj.joint_jet_lens(net, trace, linearize="detached", targets=[3, 5]),
    "measures": lambda net, trace: tj.iterative_jet_lens(net, trace).measures,
}


@pytest.mark.parametrize("kind", RESULTS)
def test_results_come_back_from_files(kind, tmp_path):
    net = ResidualNetwork(zoo.build(zoo.available(["gpt2"])[0]))
    result = RESULTS[kind](net, net.trace(zoo.tokens(net.view.model, batch=2, pos=4)))
    loaded = tj.load(result.save(tmp_path / "result.safetensors"))
    assert_same(loaded, result, kind)
    assert repr(loaded) == repr(result) and loaded._repr_html_()
    if not isinstance(result, tj.JointJetLens):  # a loaded one decodes no components
        assert loaded._repr_html_() == result._repr_html_()
    if hasattr(result, "average"):
        pd.testing.assert_frame_equal(loaded.average(), result.average())
    if hasattr(result, "to_dataframe"):
        whole = result.to_dataframe()
        pd.testing.assert_frame_equal(loaded.to_dataframe(), whole[loaded.to_dataframe().columns])
        texts = {
            text for name in ("token", "target", "token_string", "top_token") if name in whole for text in whole[name]
        }
        assert texts and not any(text.isdigit() for text in texts)  # words of the tokenizer, no ids
    if hasattr(result, "top_tokens"):
        assert loaded.top_tokens() == result.top_tokens()


def test_a_loaded_joint_lens_decodes_no_single_components(tmp_path):
    net = ResidualNetwork(zoo.build(zoo.available(["gpt2"])[0]))
    lens = tj.joint_jet_lens(net, zoo.tokens(net.view.model, batch=1, pos=3))
    loaded = tj.load(lens.save(tmp_path / "lens.safetensors"))
    assert "token_string" in lens.to_dataframe() and "token_string" not in loaded.to_dataframe()
    for call in (loaded.center_top_tokens, loaded.contributions):
        with pytest.raises(ValueError, match="which a loaded or concatenated lens is without"):
            call()
