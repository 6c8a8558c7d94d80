"""The joint lens holds the vectors of its components a few positions at a time: equal numbers, bounded memory."""

from __future__ import annotations

import pytest
import torch
import zoo
from live_memory import peak_bytes

import tl_jets as tj
from tl_jets.core.results import Result
from tl_jets.lenses import centers

SPEC = next(spec for spec in zoo.available(["gpt2"]) if spec.processing == "raw")
CASES = {
    "optimal": {"order": 1, "center_scale": "match"},
    "l2": {"objective": "l2", "embeddings": False},
    "kl": {"objective": "kl", "positions": [0, -1]},
    "uniform": {"weights": "uniform"},
    "heads": {"granularity": "head", "linearize": "detached", "targets": [3, 5]},
}


@pytest.fixture(scope="module")
def network():
    return tj.ResidualNetwork(zoo.fresh(SPEC, torch.float64))


@pytest.fixture(scope="module")
def prompts(network):
    """Two prompts of unequal length."""
    rows = zoo.tokens(network.view.model, 2, 7)
    mask = torch.ones_like(rows)
    mask[1, 5:] = 0
    return {"text_or_tokens": rows, "attention_mask": mask}


def same(found, wanted, name: str) -> None:
    """Equal results, field by field."""
    if isinstance(wanted, Result):
        for field in wanted.__dataclass_fields__:
            if field not in ("centers", "sinks"):
                same(getattr(found, field), getattr(wanted, field), f"{name}.{field}")
    elif isinstance(wanted, torch.Tensor) and wanted.is_floating_point():
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda m: f"{name}: {m}")
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), name
    else:
        assert found == wanted, name


@pytest.mark.parametrize("case", [*CASES, "given"])
def test_the_numbers_do_not_depend_on_the_tiles(network, prompts, case, monkeypatch):
    options = CASES[case] if case != "given" else {"weights": tj.joint_jet_lens(network, **prompts).weights}
    whole = tj.joint_jet_lens(network, **prompts, **options)
    assert len(whole.centers.tiles) == 1
    monkeypatch.setattr(centers, "TILE_BYTES", 8 * centers.COPIES * network.decoder.d_model * len(whole.labels) * 5)
    tiled = tj.joint_jet_lens(network, **prompts, **options)
    assert len(tiled.centers.tiles) == (1 if case == "kl" else 3) and (tiled.centers.kept is None or case == "kl")
    same(tiled, whole, case)
    for found, wanted in (
        (tiled.center_top_tokens(2), whole.center_top_tokens(2)),
        (tiled.contributions(2, labels=whole.labels[-1:0:-2]), whole.contributions(2, labels=whole.labels[-1:0:-2])),
    ):
        same(found.indices, wanted.indices, "ids")
        same(found.values, wanted.values, "values")


def test_what_is_held_does_not_grow_with_positions_and_components(network, monkeypatch):
    """Five float64 copies of all heads at all positions are what it does not hold."""
    heads = network.at("head")
    trace = heads.trace(zoo.tokens(network.view.model, 1, 12))
    held = {}
    for positions in (range(4), range(12)):
        for tile in (2**30, 1):
            monkeypatch.setattr(centers, "TILE_BYTES", tile)
            held[len(positions), tile == 1] = peak_bytes(
                lambda p=positions: tj.joint_jet_lens(heads, trace, positions=p)
            )
    copy = 8 * 8 * network.decoder.d_model * len(heads.components)  # at eight more positions
    grown = {tiled: held[12, tiled] - held[4, tiled] for tiled in (False, True)}
    assert grown[False] - grown[True] > 5 * copy, "both hold logits, and fields [center, batch, pos]"
