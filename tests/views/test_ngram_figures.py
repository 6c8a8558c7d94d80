"""Figures of studies of n-grams: the numbers on their axes are those of the results."""

from __future__ import annotations

import pytest
import torch
import zoo
from test_figures import drawn, ticks

from tl_jets.studies import mass, mass_change, roles, search, sketch
from tl_jets.views import figures

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


def widths(panel):
    return [bar.get_width() for bar in panel.patches]


def lines(panel, label):
    """Ends of the control lines: from the one with the label on, those of its color."""
    (first,) = [line for line in panel.lines if line.get_label() == label]
    return [tuple(line.get_xdata()) for line in panel.lines if line.get_color() == first.get_color()]


def test_masses_stand_beside_shuffled_lists(network):
    found = {path: mass(network, [(3, 4), (5, 6), (7, 9)], path=path, controls=50) for path in ("direct", "mlps")}
    (ax,) = drawn(figures.masses(found, log=True)).axes
    assert widths(ax) == pytest.approx([each.value for each in found.values()])
    assert ticks(ax.yaxis) == ["direct", "mlps"] and ax.get_xscale() == "log" and ax.get_xlabel() == "mean of P(z2|z1)"
    assert lines(ax, "shuffled lists") == [each.control_interval for each in found.values()]
    assert widths(drawn(figures.masses(found["mlps"])).axes[0]) == pytest.approx([found["mlps"].value])
    with pytest.raises(ValueError, match="of one kind"):
        figures.masses(found | {"sum": mass(network, [(3, 4), (5, 6)], reduce="sum")})


def test_changes_of_masses_stand_beside_every_control():
    llamas = [spec for spec in zoo.available(["llama"]) if spec.processing == "raw"]
    models = {name: zoo.fresh(llamas[0], seed=seed) for name, seed in (("a", 1), ("b", 2), ("c", 3))}
    lists = {"x": [(3, 4), (5, 6), "w7"], "y": [(8, 9), (10, 11)]}
    found = mass_change(models, lists, contexts=5, controls=4, progress=False)
    for model in ("b", "c"):
        panels = drawn(figures.mass_changes(found, model=model)).axes
        frame = found.to_dataframe().query("model == @model")
        assert [panel.get_title(loc="left") for panel in panels] == [
            f"bi-grams: {model} less a",
            f"tokens: {model} less a",
        ]
        for panel, kind in zip(panels, ("bi-grams", "tokens"), strict=True):
            own = frame[frame["kind"] == kind]
            assert widths(panel) == pytest.approx(own["change"].tolist())
            for name in ("matched", "as_likely"):
                ends = list(zip(own[f"{name}_low"], own[f"{name}_high"], strict=True))
                assert lines(panel, name.replace("_", " ")) == ends
    assert ticks(panels[0].yaxis) == ["x (2)", "y (2)"] and ticks(panels[1].yaxis) == ["x (1)"]
    with pytest.raises(ValueError, match="model must be"):
        figures.mass_changes(found, model="a")


def test_roles_are_the_overlaps(network):
    found = roles(network, n=20, progress=False)
    ax, _ = drawn(figures.roles(found)).axes
    values = torch.tensor(ax.images[0].get_array().data)
    assert torch.equal(values, found.overlap.clone().fill_diagonal_(0))
    assert ticks(ax.yaxis) == ticks(ax.xaxis) == found.labels
    n = len(found.labels)
    assert ax.texts[1].get_text() == f"{float(found.overlap[0, 1]):.2f}" and ax.texts[n + 1].get_text() == ""


def test_promoters_stand_beside_their_control_sets(network):
    found = search(network, [3, 4], controls=40, n_tokens=8, progress=False)
    for panel, kind in zip(drawn(figures.promoters(found, top=4)).axes, found.counts, strict=True):
        frame = found.top(4, kind)
        assert widths(panel) == pytest.approx(frame["score"].tolist())
        assert ticks(panel.yaxis) == frame["component"].tolist()
        assert lines(panel, "control sets") == list(zip(frame["control_low"], frame["control_high"], strict=True))
        assert [bar.get_alpha() for bar in panel.patches] == [1.0 if x < 0.05 else 0.35 for x in frame["chance"]]


def test_a_sketch_stands_beside_what_else_predicts(network):
    texts = torch.tensor([[3, 4, 5, 6], [7, 4, 5, 3]])
    found = sketch(network, texts[:1], texts[1:], progress=False)
    perplexity, kl, weights = drawn(figures.sketch(found, top=3)).axes
    assert widths(perplexity) == pytest.approx(found.nats.exp().tolist()) and ticks(perplexity.yaxis) == found.names
    assert widths(kl) == pytest.approx(found.kl.tolist())
    best = found.weights.sort(descending=True, stable=True)
    assert widths(weights) == pytest.approx(best.values[:3].tolist())
    assert ticks(weights.yaxis) == [found.labels[i] for i in best.indices[:3].tolist()]
    (marks,) = [line for line in weights.lines if line.get_label() == "shuffled tokens"]
    assert list(marks.get_xdata()) == found.shuffled_weights[best.indices[:3]].tolist()
